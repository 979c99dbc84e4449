"""Many independent draws of an estimator in one call: copies of the parameters along a new axis."""

from collections.abc import Callable

import torch


def copy_parameters(model: torch.nn.Module, draws: int) -> dict[str, torch.Tensor]:
    """Return each parameter repeated `draws` times along a new first axis, as leaves."""
    return {
        name: param.detach().expand(draws, *param.shape).clone().requires_grad_()
        for name, param in model.named_parameters()
    }


def forward_copies(
    model: torch.nn.Module, copies: dict[str, torch.Tensor], call: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Run `call(run)` for every copy, `run` being the model with that copy; stack the results."""

    def one(params: dict[str, torch.Tensor]) -> torch.Tensor:
        def run(*args: object, **kwargs: object) -> object:
            return torch.func.functional_call(model, params, args, kwargs)

        return call(run)

    return torch.func.vmap(one)(copies)


def assert_unbiased(
    estimate: Callable[[int], list[torch.Tensor]],
    exact: list[torch.Tensor],
    draws: int,
    batch: int = 4_000,
) -> None:
    """Compare the mean of many draws with the exact diagonal.

    `estimate(n)` returns n draws per parameter, along the first axis. Wanted: less than 1 % off in
    the sum over all parameters, and each tensor within 5 standard errors. The standard error of
    the sum is asserted to be below 0.5 %, so that with a fixed seed an unbiased estimator passes
    the 1 % and a factor of 1.03 can't.
    """
    batches = [estimate(batch) for _ in range(draws // batch)]
    drawn = [torch.cat(parts).flatten(1).sum(1) for parts in zip(*batches, strict=True)]
    total = sum(drawn)
    wanted = sum(e.sum() for e in exact)
    size = abs(wanted)
    error = total.std() / draws**0.5
    assert error < 0.005 * size, f"too few draws: {error / size:.2%}"
    assert abs(total.mean() - wanted) < 0.01 * size, f"{total.mean() / wanted:.4f}"
    for sums, diagonal in zip(drawn, exact, strict=True):
        assert abs(sums.mean() - diagonal.sum()) <= 5.0 * sums.std() / draws**0.5 + 1e-12
