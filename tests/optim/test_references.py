"""Adam, RAdam and Sophia against float64 references, and the first two against torch's own."""

import itertools

import numpy as np
import pytest
import torch
from reference import optimizers as reference

from hf_sophia import Adam, RAdam, Sophia, WeightDecay

STEPS = 100
WEIGHT_DECAYS = [
    WeightDecay(0.0),
    WeightDecay(0.1),
    WeightDecay(0.1, weight_decouple=False),
    WeightDecay(0.01, absolute=True),
]


def random_walk(seed: int = 0, shape: tuple[int, ...] = (5, 3)) -> tuple[np.ndarray, list]:
    """A start and gradients of very different sizes per coordinate, with exact zeros among them."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-4, 2, shape)
    grads = [rng.normal(size=shape) * scales for _ in range(STEPS)]
    for t in range(10):
        grads[t][0, 0] = 0.0
    return rng.normal(size=shape), grads


def run(make, theta: np.ndarray, grads: list, before_step=None) -> list[np.ndarray]:
    param = torch.nn.Parameter(torch.tensor(theta))
    optimizer = make([param])
    path = []
    for t, grad in enumerate(grads):
        param.grad = torch.tensor(grad)
        if before_step is not None:
            before_step(optimizer, param, t)
        optimizer.step()
        path.append(param.detach().numpy().copy())
    return path


def assert_same_path(ours: list, theirs: list, tolerance: float = 1e-12) -> None:
    for t, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"step {t}")


def fields_of(wd: WeightDecay) -> dict:
    return {
        "weight_decay": wd.weight_decay,
        "weight_decouple": wd.weight_decouple,
        "absolute": wd.absolute,
    }


@pytest.mark.parametrize("wd", WEIGHT_DECAYS, ids=str)
@pytest.mark.parametrize("optimized_update", [True, False])
@pytest.mark.parametrize("eps", [1e-16, 1e-2])
def test_adam_follows_its_reference(wd, optimized_update, eps) -> None:
    theta, grads = random_walk()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": eps, "optimized_update": optimized_update}
    ours = run(lambda p: Adam(p, weight_decay=wd, **options), theta, grads)
    assert_same_path(ours, reference.adam(theta, grads, wd=fields_of(wd), **options))


@pytest.mark.parametrize("wd", WEIGHT_DECAYS, ids=str)
@pytest.mark.parametrize(
    ("optimized_update", "amsgrad", "degenerated_to_sgd"),
    list(itertools.product([True, False], repeat=3)),
)
@pytest.mark.parametrize("beta2", [0.99, 0.5])
def test_radam_follows_its_reference(
    wd, optimized_update, amsgrad, degenerated_to_sgd, beta2
) -> None:
    theta, grads = random_walk()
    options = {
        "lr": 0.01,
        "betas": (0.9, beta2),
        "eps": 1e-3,
        "optimized_update": optimized_update,
        "amsgrad": amsgrad,
        "degenerated_to_sgd": degenerated_to_sgd,
    }
    ours = run(lambda p: RAdam(p, weight_decay=wd, **options), theta, grads)
    assert_same_path(ours, reference.radam(theta, grads, wd=fields_of(wd), **options))


@pytest.mark.parametrize("wd", WEIGHT_DECAYS, ids=str)
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("rho", [0.03, 5.0])
def test_sophia_follows_its_reference(wd, k, rho) -> None:
    theta, grads = random_walk()
    rng = np.random.default_rng(1)
    # Negative entries too: Hutchinson's estimate has them, and max(h, eps) must hold.
    estimates = [rng.normal(0.5, 1.0, theta.shape) * 10.0 for _ in grads]

    def refresh(optimizer: Sophia, param: torch.Tensor, t: int) -> None:
        assert optimizer.hessian_due == (t % k == 0)
        if optimizer.hessian_due:
            optimizer.update_hessian({param: torch.tensor(estimates[t])})
            assert not optimizer.hessian_due

    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-12, "rho": rho}
    ours = run(lambda p: Sophia(p, weight_decay=wd, k=k, **options), theta, grads, refresh)
    theirs = reference.sophia(theta, grads, estimates, k=k, wd=fields_of(wd), **options)
    assert_same_path(ours, theirs, 1e-11)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled) -> None:
    theta, grads = random_walk()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    torchs = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = run(lambda p: torchs(p, weight_decay=0.1, **options), theta, grads)
    wd = WeightDecay(0.1, weight_decouple=decoupled)
    ours = run(lambda p: Adam(p, weight_decay=wd, optimized_update=False, **options), theta, grads)
    assert_same_path(ours, theirs, 1e-7)


def test_adams_optimized_update_is_torchs_with_rescaled_eps() -> None:
    theta, grads = random_walk()
    eps, beta2 = 1e-6, 0.99
    ours = run(lambda p: Adam(p, lr=0.01, betas=(0.9, beta2), eps=eps), theta, grads)

    def rescale(optimizer: torch.optim.Adam, _: torch.Tensor, t: int) -> None:
        optimizer.param_groups[0]["eps"] = eps / (1 - beta2 ** (t + 1)) ** 0.5

    theirs = run(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, beta2)), theta, grads, rescale)
    assert_same_path(ours, theirs, 1e-7)


@pytest.mark.parametrize("decoupled", [True, False])
def test_radam_is_torchs(decoupled) -> None:
    theta, grads = random_walk()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    theirs = run(
        lambda p: torch.optim.RAdam(
            p, weight_decay=0.1, decoupled_weight_decay=decoupled, **options
        ),
        theta,
        grads,
    )
    wd = WeightDecay(0.1, weight_decouple=decoupled)
    ours = run(lambda p: RAdam(p, weight_decay=wd, **options), theta, grads)
    assert_same_path(ours, theirs, 1e-7)


def test_amsgrad_differs_once_gradients_shrink() -> None:
    theta, grads = random_walk()
    grads = [g * (100.0 if t < 30 else 1.0) for t, g in enumerate(grads)]
    moved = []
    for amsgrad in (False, True):
        path = run(lambda p, a=amsgrad: RAdam(p, betas=(0.9, 0.9), amsgrad=a), theta, grads)
        moved.append(np.abs(path[-1] - path[50]).sum())
    assert moved[0] > 3 * moved[1]
