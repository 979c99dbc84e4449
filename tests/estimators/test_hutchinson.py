"""Hutchinson's estimate against exact Hessians."""

import gc

import pytest
import torch
from reference.copies import assert_unbiased, copy_parameters, forward_copies
from reference.curvature import hessian_diagonal
from torch.nn import functional

from hf_sophia import hutchinson


def drawing(model, call, **options):
    generator = torch.Generator().manual_seed(1)

    def estimate(draws: int) -> list[torch.Tensor]:
        copies = copy_parameters(model, draws)
        loss = forward_copies(model, copies, call).sum()
        return list(hutchinson(loss, copies.values(), generator=generator, **options).values())

    return estimate


@pytest.mark.parametrize("options", [{}, {"probes": 4}, {"distribution": "gaussian"}], ids=str)
def test_unbiased_on_an_mlp(options) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model.double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    exact = hessian_diagonal(functional.mse_loss(model(x), y), list(model.parameters()))
    assert min(diagonal.min().item() for diagonal in exact) < 0.0, "covers negative curvature"
    estimate = drawing(model, lambda run: functional.mse_loss(run(x), y), **options)
    assert_unbiased(estimate, exact, draws=200_000, batch=20_000)


def test_unbiased_on_a_gpt2(tiny_gpt2) -> None:
    model = tiny_gpt2(
        vocab_size=11, n_embd=4, n_layer=1, n_positions=8, attn_implementation="eager"
    ).double()
    for name, param in model.named_parameters():
        if "ln" not in name:
            param.data.mul_(3.0)
    ids = torch.arange(12).view(2, 6) % 11
    exact = hessian_diagonal(model(ids, labels=ids).loss, list(model.parameters()))
    estimate = drawing(model, lambda run: run(ids, labels=ids, use_cache=False).loss)
    assert_unbiased(estimate, exact, draws=120_000, batch=5_000)


def test_rademacher_is_exact_on_a_diagonal_hessian_and_draws_both_signs() -> None:
    x = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    assert torch.allclose(hutchinson((x**3).sum(), [x])[x], 6 * x.detach(), atol=1e-6)
    # H = ones(2, 2): u * Hu is 1 + u1 u2, so 0 and 2 show that both signs are drawn.
    y = torch.nn.Parameter(torch.zeros(2))
    values = {
        round(hutchinson(0.5 * y.sum() ** 2, [y], generator=g)[y][0].item())
        for g in (torch.Generator().manual_seed(seed) for seed in range(20))
    }
    assert values == {0, 2}


def test_unreached_linear_and_frozen_parameters() -> None:
    x, unreached, linear = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    loss = (x**2).sum() + (3 * linear).sum() + (frozen * x).sum()
    result = hutchinson(loss, [x, unreached, linear, frozen])
    assert set(result) == {x, unreached, linear}
    assert torch.equal(result[x], torch.full((2,), 2.0))
    assert torch.equal(result[unreached], torch.zeros(2))
    assert torch.equal(result[linear], torch.zeros(2))
    assert torch.equal(hutchinson((3 * linear).sum(), [linear])[linear], torch.zeros(2))


def test_the_graph_stays_and_no_gradient_is_left() -> None:
    x = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    loss = (x**2).sum()
    result = hutchinson(loss, [x], probes=2)
    assert result[x].dtype == torch.float32
    assert x.grad is None
    loss.backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0, dtype=torch.bfloat16))


def test_no_memory_stays_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def refresh() -> int:
        hutchinson(model(torch.ones(4, 8)).pow(2).mean(), model.parameters())
        # Without a collection: a reference cycle would keep every refresh alive.
        return sum(type(o) in (torch.Tensor, torch.nn.Parameter) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        refresh()
        before = refresh()
        for _ in range(5):
            after = refresh()
    finally:
        gc.enable()
    assert after <= before


def test_bad_input_is_named(tiny_gpt2) -> None:
    x = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="'rademacher', 'gaussian', got 'uniform'"):
        hutchinson((x**2).sum(), [x], distribution="uniform")
    with pytest.raises(ValueError, match="probes.*0"):
        hutchinson((x**2).sum(), [x], probes=0)
    with pytest.raises(ValueError, match="one element"):
        hutchinson(x**2, [x])
    with pytest.raises(ValueError, match="with its graph"):
        hutchinson(torch.tensor(1.0), [x])
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        hutchinson((x**2).sum(), [])
    loss = (x**3).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="graph of the loss is gone"):
        hutchinson(loss, [x])
    model = tiny_gpt2(attn_implementation="sdpa")
    ids = torch.arange(12).view(2, 6)
    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        hutchinson(model(ids, labels=ids).loss, model.parameters())
