"""Two processes: the estimate of both together, on both."""

import pytest
import torch
from torch.utils.data import default_collate

from .by_hand import exact_step_estimate
from .processes import all_ranks_finished, execute, torchrun
from .scripts.two_processes import rows, tiny_model
from .test_run import SCRIPTS

pytestmark = pytest.mark.distributed


def train(tmp_path, optim_args: str, static_graph: bool = False) -> list[dict]:
    script = [SCRIPTS / "two_processes.py", tmp_path, optim_args, str(static_graph).lower()]
    result = execute([*torchrun(2), *script])
    assert all_ranks_finished(result), result.stderr
    saved = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for rank in saved:
        assert rank["wrapper"] == "DistributedDataParallel"
    for name in ("hessians", "params"):
        for one, other in zip(saved[0][name], saved[1][name], strict=True):
            assert torch.equal(one, other), name
    return saved


def batches(accumulation: int) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    data = rows()
    return {
        # The processes take turns with the batches.
        (turn % 2, turn // 2): default_collate(data[4 * turn : 4 * turn + 4])
        for turn in range(2 * accumulation)
    }


@pytest.mark.parametrize(
    ("fraction", "static_graph"),
    [(None, False), (1.0, False), (1.0, True)],
    ids=["kept graph", "own pass", "static graph"],
)
def test_the_estimate_is_that_of_both(fraction, static_graph, tmp_path) -> None:
    asked = "" if fraction is None else f",hessian_batch_fraction={fraction}"
    saved = train(tmp_path, f"rho=0.2{asked}", static_graph)
    assert saved[0]["fraction"] == fraction
    accumulation = 1 if static_graph else 2
    expected = exact_step_estimate(tiny_model(), batches(accumulation), seed=5)
    for estimate, hessian in zip(expected, saved[0]["hessians"], strict=True):
        torch.testing.assert_close(hessian, 0.05 * estimate, rtol=2e-4, atol=1e-9)
    assert saved[0]["log"]["sophia/hessian_tokens"] == accumulation * 4 * (11 + 5)


def test_a_static_graph_gets_a_pass_of_its_own(tmp_path) -> None:
    saved = train(tmp_path, "rho=0.2", static_graph=True)
    assert saved[0]["fraction"] == 0.25
    assert saved[0]["log"]["sophia/hessian_tokens"] == 11 + 5


def test_hutchinsons_estimate_is_that_of_both(tmp_path) -> None:
    saved = train(tmp_path, "hessian_computation_type=hutchinson,hessian_batch_fraction=1.0")
    assert saved[0]["log"]["sophia/hessian_tokens"] == 2 * 4 * (11 + 5)
    assert all(h.abs().max() > 0 and h.isfinite().all() for h in saved[0]["hessians"])


def test_every_kind_of_head_agrees_with_the_scaled_loss(tmp_path) -> None:
    """The Trainer multiplies the losses of several processes in place; the guard knows."""
    result = execute([*torchrun(2), SCRIPTS / "two_processes_heads.py", tmp_path])
    assert all_ranks_finished(result), result.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    # Three problem types of BERT among them.
    assert len(ranks[0]) == 9
    for name, one in ranks[0].items():
        other = ranks[1][name]
        assert one["fraction"] is None
        assert one["count"] == other["count"] > 0
        pairs = zip(one["hessians"], other["hessians"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
        assert max(h.max() for h in one["hessians"]) > 0
