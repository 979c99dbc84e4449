"""Sophia's limits, its three ways to a Hessian, and what it says when there is none."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from hf_sophia import Sophia, gauss_newton_bartlett, hutchinson
from hf_sophia.optim import sophia_update


def quadratic(curvature: list[float], start: list[float]) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    param.curvature = torch.tensor(curvature, dtype=torch.float64)
    return param


def loss_of(param: torch.nn.Parameter) -> torch.Tensor:
    return 0.5 * (param.curvature * param**2).sum()


def test_without_clipping_it_is_newtons_method_on_a_quadratic() -> None:
    param = quadratic([1e-3, 1.0, 1e3], [5.0, -2.0, 0.3])
    rho = 1e9
    optimizer = Sophia([param], lr=rho, betas=(0.0, 0.0), rho=rho, k=1)
    loss_of(param).backward()
    optimizer.update_hessian({param: param.curvature})
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.zeros(3).double(), atol=1e-12, rtol=0)


def test_with_h_zero_it_is_sign_momentum() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = Sophia([param], lr=0.1, betas=(0.9, 0.95), k=1)
    momentum, expected = torch.zeros(100).double(), torch.zeros(100).double()
    for _ in range(20):
        param.grad = torch.randn(100).double()
        momentum = 0.9 * momentum + 0.1 * param.grad
        expected -= 0.1 * momentum.sign()
        optimizer.update_hessian({})
        optimizer.step()
    torch.testing.assert_close(param.detach(), expected)
    assert optimizer.clip_fraction() == 1.0


def test_with_a_fixed_hessian_and_k_1_it_is_preconditioned_clipped_momentum() -> None:
    torch.manual_seed(0)
    h = torch.rand(50).double() + 0.1
    param = torch.nn.Parameter(torch.zeros(50).double())
    # beta2 = 0 makes h the estimate itself.
    optimizer = Sophia([param], lr=0.2, betas=(0.8, 0.0), rho=0.5, k=1)
    momentum, expected = torch.zeros(50).double(), torch.zeros(50).double()
    for _ in range(10):
        param.grad = torch.randn(50).double()
        momentum = 0.8 * momentum + 0.2 * param.grad
        expected -= 0.2 * (momentum / (0.5 * h)).clamp(-1, 1)
        optimizer.update_hessian({param: h})
        optimizer.step()
        clipped = (momentum.abs() >= 0.5 * h).double().mean()
        assert optimizer.clip_fraction().item() == pytest.approx(clipped.item())
    torch.testing.assert_close(param.detach(), expected)
    assert optimizer.hessian_norm().item() == pytest.approx(h.norm().item())


def test_no_coordinate_moves_further_than_lr() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(1000).double())
    optimizer = Sophia([param], lr=0.01, rho=0.03)
    for _ in range(25):
        before = param.detach().clone()
        param.grad = torch.randn(1000).double() * 10 ** torch.randn(1000)
        if optimizer.hessian_due:
            optimizer.update_hessian({param: torch.randn(1000)})
        optimizer.step()
        assert (param - before).abs().max() <= 0.01 * (1 + 1e-12)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_refreshes_are_due_at_step_1_and_every_k(k) -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([param], k=k)
    due = []
    for step in range(1, 25):
        param.grad = torch.ones(1)
        if optimizer.hessian_due:
            due.append(step)
            optimizer.update_hessian({param: torch.ones(1)})
        optimizer.step()
    assert due == [step for step in range(1, 25) if step % k == 1 % k]


def test_the_phase_survives_a_frozen_parameter_and_a_new_group() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = Sophia([first], k=4)
    due = []
    for step in range(1, 20):
        if step == 7:
            optimizer.add_param_group({"params": [second]})
        first.grad = torch.ones(1) if step < 7 else None
        second.grad = torch.ones(1) if step >= 7 else None
        if optimizer.hessian_due:
            due.append(step)
            optimizer.update_hessian({})
        optimizer.step()
    assert due == [1, 5, 9, 13, 17]


def test_state_is_whole_whichever_call_comes_first() -> None:
    for refresh_first in (True, False):
        param = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        param.grad = torch.ones(2, dtype=torch.bfloat16)
        optimizer = Sophia([param], lr=0.0)
        calls = [lambda o=optimizer, p=param: o.update_hessian({p: torch.ones(2)}), optimizer.step]
        for call in calls if refresh_first else reversed(calls):
            call()
            assert set(optimizer.state[param]) == {"step", "exp_avg", "hessian", "refreshed"}
        assert optimizer.state[param]["hessian"].dtype == torch.float32
        assert optimizer.hessian_norm() > 0


@pytest.mark.parametrize("rho", [0.1, "auto"])
def test_whoever_looks_up_a_state_that_is_not_there_changes_nothing(rho) -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = Sophia(params, rho=rho, k=1)
    for _ in range(3):
        for param in params:
            assert not optimizer.state[param] or optimizer.state[param]["step"]
        params[0].grad = torch.ones(2)  # the other is frozen
        assert optimizer.hessian_due
        optimizer.update_hessian({params[0]: torch.ones(2)})
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.hessian_due
    assert [len(optimizer.state[param]) for param in params] == [4 + (rho == "auto"), 0]


def test_the_hessian_average_does_not_stick_in_bf16() -> None:
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Sophia([param], lr=0.0, betas=(0.9, 0.999), k=1)
    for _ in range(8000):
        param.grad = torch.zeros(1, dtype=torch.bfloat16)
        optimizer.update_hessian({param: torch.full((1,), 1.0, dtype=torch.bfloat16)})
        optimizer.step()
    expected = 1.0 - 0.999**8000
    assert optimizer.state[param]["hessian"].item() == pytest.approx(expected, rel=1e-3)


def test_update_hessian_refuses_what_does_not_fit_and_changes_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Sophia([("weight", param)])
    optimizer.update_hessian({param: torch.ones(3)})
    kept = optimizer.state[param]["hessian"].clone()
    stranger = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="does not hold"):
        optimizer.update_hessian({param: torch.ones(3), stranger: torch.ones(3)})
    with pytest.raises(ValueError, match=r"estimate of shape \(2,\) for parameter 'weight'"):
        optimizer.update_hessian({param: torch.ones(2)})
    with pytest.raises(ValueError, match="parameter 'weight'.*NaN or infinity"):
        optimizer.update_hessian({param: torch.tensor([1.0, float("nan"), 1.0])})
    with pytest.raises(ValueError, match="got 'weight', which is no parameter; pass the param"):
        optimizer.update_hessian({"weight": torch.ones(3)})
    with pytest.raises(TypeError, match="got a float for parameter 'weight'"):
        optimizer.update_hessian({param: 1.0})
    with pytest.raises(TypeError, match=r"wants \{parameter: estimate\}, got a list"):
        optimizer.update_hessian([torch.ones(3)])
    assert torch.equal(optimizer.state[param]["hessian"], kept)


def test_a_refresh_made_but_not_stepped_is_not_made_again_after_loading() -> None:
    # As when a gradient scaler skips the step and a checkpoint is written then.
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([param], k=2)
    fresh = copy.deepcopy(optimizer.state_dict())
    optimizer.update_hessian({param: torch.ones(1)})
    other = Sophia([torch.nn.Parameter(torch.zeros(1))], k=2)
    assert other.hessian_due
    other.load_state_dict(optimizer.state_dict())
    assert not other.hessian_due
    other.load_state_dict(fresh)
    assert other.hessian_due


def test_groups_of_another_optimizer_do_not_bring_its_refresh() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    first = Sophia([param], k=100)
    first.update_hessian({param: torch.ones(1)})
    second = Sophia(first.param_groups, k=100)
    assert second.hessian_due
    assert not first.hessian_due
    with pytest.warns(UserWarning, match="due at step 1"):
        second.step()


def test_loading_forgets_a_refresh_that_was_missed_before() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([param], lr=0.0, k=5)
    optimizer.update_hessian({param: torch.ones(1)})
    param.grad = torch.ones(1)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    for _ in range(5):
        optimizer.step()  # the refresh of step 6 is missed, at lr 0
    optimizer.load_state_dict(good)
    optimizer.param_groups[0]["lr"] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_metrics_go_over_all_parameters() -> None:
    small, large = (torch.nn.Parameter(torch.zeros(n)) for n in (1, 3))
    empty = torch.nn.Parameter(torch.zeros(0))
    optimizer = Sophia([small, large, empty], betas=(0.0, 0.0), rho=0.5, k=1)
    assert optimizer.clip_fraction() == 0.0
    assert optimizer.hessian_norm() == 0.0
    small.grad, large.grad = torch.ones(1), torch.ones(3)
    optimizer.update_hessian({small: torch.full((1,), 3.0), large: torch.full((3,), 4.0 / 3**0.5)})
    optimizer.step()
    assert optimizer.hessian_norm().item() == pytest.approx(5.0)
    # 1 < 0.5 * 3 is not clipped; 1 < 0.5 * 2.31 is not either.
    assert optimizer.clip_fraction() == 0.0
    large.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert optimizer.clip_fraction().item() == pytest.approx(0.75)


def test_k_and_estimator_are_the_same_in_all_groups() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "k": k} for k in (5, 10)]
    with pytest.raises(ValueError, match="k must be the same in every parameter group, got 10"):
        Sophia(groups)


# The call styles of a plain loop


def classifier() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    return model, torch.randn(32, 6), torch.randint(4, (32,))


def test_step_with_logits_is_update_hessian_with_gnb() -> None:
    model, x, y = classifier()
    twin = copy.deepcopy(model)
    one = Sophia(model.parameters(), lr=0.01, rho=1.0, k=3)
    other = Sophia(twin.parameters(), lr=0.01, rho=1.0, k=3)
    for step in range(7):
        one.zero_grad()
        logits = model(x)
        functional.cross_entropy(logits, y).backward(retain_graph=True)
        torch.manual_seed(step)
        one.step(logits=logits)

        other.zero_grad()
        logits = twin(x)
        torch.manual_seed(step)
        if other.hessian_due:
            estimate = gauss_newton_bartlett(logits, twin.parameters(), retain_graph=True)
            other.update_hessian(estimate)
        functional.cross_entropy(logits, y).backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p]["hessian"], other.state[q]["hessian"])
        assert one.state[p]["hessian"].max() > 0


def test_step_with_a_closure_that_returns_the_loss_is_hutchinson() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    one = Sophia(model.parameters(), rho=0.5, k=3, hessian_computation_type="hutchinson")
    other = Sophia(twin.parameters(), rho=0.5, k=3, hessian_computation_type="hutchinson")
    first = functional.mse_loss(model(x), y).item()
    for step in range(7):
        one.zero_grad()
        torch.manual_seed(step)
        loss = one.step(closure=lambda: functional.mse_loss(model(x), y))

        other.zero_grad()
        twin_loss = functional.mse_loss(twin(x), y)
        torch.manual_seed(step)
        if other.hessian_due:
            other.update_hessian(hutchinson(twin_loss, twin.parameters()))
        twin_loss.backward()
        other.step()
        assert loss.item() == twin_loss.item()
    assert loss.item() < first
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
        assert one.state[p]["hessian"].abs().max() > 0


def test_hutchinson_takes_a_closure_with_backward_where_no_hessian_is_due() -> None:
    param = quadratic([1.0, 2.0], [1.0, 1.0])
    optimizer = Sophia([param], lr=0.1, k=2, hessian_computation_type="hutchinson")

    def closure() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(param)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="closure called backward"):
        optimizer.step(closure)
    optimizer.step(lambda: loss_of(param))
    moved = param.detach().clone()
    optimizer.step(closure)
    assert (param < moved).all()


def test_wrong_call_styles_say_what_to_do() -> None:
    model, x, y = classifier()
    optimizer = Sophia(model.parameters())
    logits = model(x)
    functional.cross_entropy(logits, y).backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        optimizer.step(logits=logits)
    with pytest.raises(ValueError, match="no graph"):
        optimizer.step(logits=logits.detach())
    by_hutchinson = Sophia(model.parameters(), hessian_computation_type="hutchinson")
    with pytest.raises(ValueError, match="has 'hutchinson'"):
        by_hutchinson.step(logits=logits)
    with pytest.raises(ValueError, match="must return the loss"):
        by_hutchinson.step(lambda: 3.0)


# Without a Hessian


def test_a_bare_loop_without_hessian_is_warned_once_where_it_steps() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([param], k=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            param.grad = torch.ones(1)
            optimizer.step()
    assert len(caught) == 1
    assert "due at step 1" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_refresh_that_stops_coming_is_warned_of() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([param], k=5)
    optimizer.update_hessian({param: torch.ones(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            param.grad = torch.ones(1)
            optimizer.step()
        with pytest.raises(UserWarning, match="due at step 6"):
            optimizer.step()


@pytest.mark.parametrize("quiet", ["lr 0", "no gradient", "left out on purpose"])
def test_no_warning_where_nothing_is_wrong(quiet) -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([param], lr=0.0 if quiet == "lr 0" else 0.1)
    if quiet != "no gradient":
        param.grad = torch.ones(1)
    if quiet == "left out on purpose":
        optimizer.update_hessian({})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_first_step_at_lr_0_does_not_hide_the_missing_hessian() -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([param], lr=0.0)
    param.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match="due at step 1"):
        optimizer.step()


def test_a_look_at_the_state_before_the_first_step_does_not_skip_its_refresh() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, x, y = classifier()
    optimizer = Sophia(model.parameters(), lr=0.01, rho=1.0, k=3)
    get_optimizer_state_dict(model, optimizer)  # takes a step at lr 0 to have a state to look at
    due = []
    for _ in range(5):
        due.append(optimizer.hessian_due)
        optimizer.zero_grad()
        logits = model(x)
        functional.cross_entropy(logits, y).backward(retain_graph=True)
        optimizer.step(logits=logits)
    assert due == [True, False, False, True, False]
    assert all(state["step"] == 5 for state in optimizer.state.values())


@pytest.mark.parametrize("steps", [1, 2])
def test_an_optimizer_whose_state_was_cleared_begins_again(steps) -> None:
    results = []
    for before in (0, steps):
        param = torch.nn.Parameter(torch.zeros(3))
        optimizer = Sophia([param], lr=0.01, rho=0.5, bias_correction=True, k=10)
        for step in range(1, before + 4):
            if step == before + 1:
                optimizer.state.clear()
                param.data.zero_()
                assert optimizer.hessian_due
            if optimizer.hessian_due:
                optimizer.update_hessian({param: torch.tensor([1.0, 2.0, 4.0])})
            param.grad = torch.tensor([0.3, -0.3, 0.3])
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_distributed_checkpoints_round_trip(tmp_path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, x, y = classifier()
    optimizer = Sophia(model.parameters(), lr=0.01, rho=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(x)
        functional.cross_entropy(logits, y).backward(retain_graph=True)
        optimizer.step(logits=logits)
    checkpoint.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path)

    other_model, _, _ = classifier()
    other = Sophia(other_model.parameters(), lr=0.01, rho=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Sophia")
        state = get_optimizer_state_dict(other_model, other)
        checkpoint.load(state, checkpoint_id=tmp_path)
        set_optimizer_state_dict(other_model, other, state)
    assert not other.hessian_due
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert other.state[q]["step"] == 3
        for name in ("exp_avg", "hessian"):
            assert torch.equal(optimizer.state[p][name], other.state[q][name])


def golden_run(steps: int = 50) -> list[float]:
    """A run whose numbers depend on every part of the update but not on a random generator."""
    param = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 7, dtype=torch.float64))
    optimizer = Sophia([param], lr=0.02, betas=(0.9, 0.9), rho=0.4, weight_decay=0.1, k=5)
    target = torch.cos(torch.arange(7.0, dtype=torch.float64))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((param.exp() - target) ** 2).sum()
        loss.backward()
        if optimizer.hessian_due:
            optimizer.update_hessian({param: 2 * (2 * param.exp() - target) * param.exp()})
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_golden_trajectory() -> None:
    golden = json.loads((Path(__file__).parent / "golden_sophia.json").read_text())
    assert golden_run() == pytest.approx(golden, rel=1e-10)


def eager_steps(sizes, steps: int = 3) -> tuple[Sophia, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    params.append(torch.nn.Parameter(torch.randn(5, 3, generator=generator).t()))
    optimizer = Sophia(params, lr=0.01, rho=0.5, k=1, fused=False)
    for _ in range(steps):
        optimizer.update_hessian({p: torch.rand(p.shape, generator=generator) for p in params})
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer, params


def test_the_eager_step_works_in_the_same_memory_again_and_again(monkeypatch) -> None:
    monkeypatch.setattr(sophia_update, "BLOCK", 64)
    made = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size: made.append(size) or new_empty(self, *size)
    )
    eager_steps([8, 1000, 65])
    assert made == [(16,), (128,)]  # never as much as the largest parameter has


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_blocks_change_no_bit_of_the_eager_step(block, monkeypatch) -> None:
    _, whole = eager_steps([8, 1000, 65])
    monkeypatch.setattr(sophia_update, "BLOCK", block)
    optimizer, params = eager_steps([8, 1000, 65])
    assert all(torch.equal(one, other) for one, other in zip(params, whole, strict=True))
    assert 0.0 < optimizer.clip_fraction() < 1.0
