"""A plain loop under FSDP2 equals the loop on whole parameters, and its state moves freely."""

from pathlib import Path

import pytest
import torch
from trainer.processes import all_ranks_finished, execute, torchrun

from hf_sophia import Adam, RAdam, Sophia
from hf_sophia.kernels import no_kernel_because

from .scripts import sharded_loop

pytestmark = pytest.mark.distributed
SCRIPT = Path(sharded_loop.__file__)


def ranks_of(mode: str, processes: int, folder: Path) -> list[dict]:
    command = [*torchrun(processes), SCRIPT, mode, folder]
    result = execute(command)
    assert all_ranks_finished(result), result.stderr
    return [torch.load(folder / f"{mode}-{processes}-{rank}.pt") for rank in range(processes)]


def assert_close(sharded: dict, model: torch.nn.Module, optimizer: Sophia) -> None:
    params = list(model.parameters())
    states = [optimizer.state[p] for p in params]
    expected = {
        "params": params,
        **{name: [s[name] for s in states] for name in ("exp_avg", "hessian")},
    }
    for name, tensors in expected.items():
        for one, other in zip(sharded[name], tensors, strict=True):
            # float64; only the order of sums differs.
            torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-12, msg=name)
    assert sharded["step"] == [s["step"] for s in states] == [4] * len(params)
    torch.testing.assert_close(sharded["clip_fraction"], optimizer.clip_fraction(), rtol=0, atol=0)
    torch.testing.assert_close(sharded["hessian_norm"], optimizer.hessian_norm())


def test_fsdp2_equals_whole_parameters_and_its_checkpoint_loads_on_any_number(tmp_path) -> None:
    model, optimizer = sharded_loop.whole_loop(processes=2)
    assert 0.05 < optimizer.clip_fraction() < 0.95
    trained = ranks_of("train", 2, tmp_path)
    for rank in trained:
        assert_close(rank, model, optimizer)
        assert rank["due"]
    # torch.distributed.checkpoint cuts the shards of two processes anew for one and for four.
    for processes in (1, 4):
        for rank in ranks_of("load", processes, tmp_path):
            for name in ("params", "exp_avg", "hessian"):
                for one, other in zip(rank[name], trained[0][name], strict=True):
                    assert torch.equal(one, other), (processes, name)
            assert rank["step"] == trained[0]["step"]
            assert rank["due"]


def test_a_kernel_takes_the_step_of_shards(tmp_path) -> None:
    for found in ranks_of("kernel", 2, tmp_path):
        for name in ("params", "exp_avg", "hessian"):
            for one, other in zip(found["kernel"][name], found["eager"][name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        fractions = (float(found[form]["clip_fraction"]) for form in ("kernel", "eager"))
        assert next(fractions) == pytest.approx(next(fractions), abs=1e-3)
        assert found["eager calls"] == 0
        if not no_kernel_because(torch.device("cpu"), torch.float32):
            assert found["kernel calls"] == 1
        for form in ("kernel", "eager"):
            # Only the first process has the NaN.
            assert "gradient of parameter 3 of group 0 (shape" in found[f"{form} message"]
            for name in ("params", "exp_avg", "hessian"):
                for one, other in zip(found[form][name], found[f"{form} after"][name], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_parameters_of_two_meshes_are_agreed_on_by_all(tmp_path) -> None:
    for found in ranks_of("two meshes", 4, tmp_path):
        assert found["clip_fraction"] == 1.0  # h is 0: all coordinates take sign steps
        assert "gradient of parameter 1 of group 0 (shape" in found["message"]
        for one, other in zip(found["before"], found["after"], strict=True):
            torch.testing.assert_close(one, other)


def test_what_would_be_wrong_on_shards_is_refused_on_every_process(tmp_path) -> None:
    for found in ranks_of("faults", 2, tmp_path):
        assert "the backward pass left no gradient: between micro-batches" in found["no sync"]
        assert "hutchinson does not support sharded parameters" in found["hutchinson"]
        assert "gradient of parameter 3 of group 0 (shape" in found["gradient"]
        assert found["unchanged"]
        assert "Hessian estimate of parameter 2 of group 0 (shape" in found["estimate"]
        assert "one of shape (3,) is not" in found["mixed"]
        for call in ("logits", "closure"):
            assert "would give each of 2 processes a result of its own" in found[call]
        assert found["one call"]
        assert found["step on shards"]


def test_state_of_a_run_on_one_process_loads_into_shards(tmp_path) -> None:
    expected = {}
    for kind in (Sophia, Adam, RAdam):
        model = sharded_loop.double_model()
        optimizer = kind(model.parameters(), lr=1e-2)
        sharded_loop.loss_of(model, sharded_loop.batches_of(0, 1)[0]).backward()
        if isinstance(optimizer, Sophia):
            optimizer.update_hessian({p: p.grad**2 for p in model.parameters()})
        optimizer.step()
        grads = [p.grad for p in model.parameters()]
        saved = {"optimizer": optimizer.state_dict(), "grads": grads}
        torch.save(saved, tmp_path / f"{kind.__name__}.pt")
        # The script builds the model anew: only the state moves there.
        model.load_state_dict(sharded_loop.double_model().state_dict())
        optimizer.step()
        expected[kind.__name__] = (model, optimizer)
    for rank in ranks_of("one process", 2, tmp_path):
        for kind, (model, optimizer) in expected.items():
            pairs = zip(rank[kind]["params"], model.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), kind
            for param, state in zip(model.parameters(), rank[kind]["states"], strict=True):
                assert state.keys() == optimizer.state[param].keys()
                for name, value in state.items():
                    assert torch.equal(
                        torch.as_tensor(value), torch.as_tensor(optimizer.state[param][name])
                    ), (kind, name)
