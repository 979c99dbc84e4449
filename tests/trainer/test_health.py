"""What goes wrong slowly is warned of, once for each cause, and nothing else is."""

import logging

import pytest
import torch

from hf_sophia import SophiaTrainer
from hf_sophia.trainer.health import HessianHealth

from .runs import dataset, run


def warnings_of(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.name.startswith("hf_sophia")]


def train(tiny_gpt2, tmp_path, caplog, **options) -> list[str]:
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        run(tiny_gpt2(), tmp_path, **options)
    return warnings_of(caplog)


def test_a_healthy_run_warns_of_nothing(tiny_gpt2, tmp_path, caplog) -> None:
    options = {"max_steps": 60, "optim_args": "rho=0.5,k=2", "learning_rate": 1e-3}
    assert train(tiny_gpt2, tmp_path, caplog, **options) == []


def test_a_share_that_was_asked_for_is_not_judged(tiny_gpt2, tmp_path, caplog) -> None:
    args = "rho=auto,target_clip_fraction=0.01,nesterov=true,k=2"
    found = train(tiny_gpt2, tmp_path, caplog, max_steps=60, optim_args=args)
    assert found == []


@pytest.mark.parametrize(
    ("rho", "remedy"), [("1e-6", "Try a larger rho"), ("1e6", "Try a smaller rho")]
)
def test_clipping_outside_of_its_band_is_said_once(
    rho, remedy, tiny_gpt2, tmp_path, caplog
) -> None:
    # With a large rho coordinates without curvature would still be clipped, but for eps.
    args = f"rho={rho},k=2,eps=1e-4"
    (warning,) = train(tiny_gpt2, tmp_path, caplog, max_steps=60, optim_args=args)
    assert remedy in warning
    assert "in the last 5 logs" in warning


def test_no_refresh_by_step_k_plus_1_is_said_once(tiny_gpt2, tmp_path, caplog) -> None:
    data = dataset(64)
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)
    found = train(tiny_gpt2, tmp_path, caplog, data=data, max_steps=10, optim_args="k=3")
    assert "no label of the batch of step 1 counts" in found[0]
    assert "no Hessian refresh has succeeded from step 1 to step 4 (k=3)" in found[1]
    assert len(found) == 2


def test_a_hessian_of_zeros_is_said_once(tiny_gpt2, tmp_path, caplog) -> None:
    class Certain(SophiaTrainer):
        """Predicts so surely that every sampled label is the prediction."""

        def sophia_head(self, *args):
            head = super().sophia_head(*args)
            sure = torch.zeros_like(head.logits)
            sure[..., 0] = 1e4
            object.__setattr__(head, "logits", head.logits * 0.0 + sure)
            object.__setattr__(head, "check_loss", False)
            return head

    found = train(
        tiny_gpt2, tmp_path, caplog, trainer_class=Certain, max_steps=30, optim_args="k=2"
    )
    assert len(found) == 1
    assert "the Hessian is zero everywhere after" in found[0]


def test_the_watch_starts_anew_with_each_run_and_where_it_resumes(caplog) -> None:
    for _ in range(2):
        caplog.clear()
        health = HessianHealth(k=10, first_step=14)
        health.left_out(21, "empty", "step %d")
        assert len(caplog.records) == 1
        health.left_out(31, "empty", "step %d")
        assert "from step 14 to step 31" in caplog.records[1].message
        health.left_out(41, "empty", "step %d")
        assert len(caplog.records) == 2


def test_refreshes_that_often_bring_nothing_are_said_once(caplog) -> None:
    def watched(pattern: str) -> list[str]:
        caplog.clear()
        health = HessianHealth(k=10, first_step=1)
        for index, kind in enumerate(pattern):
            if kind == "+":
                health.refreshed()
            else:
                health.left_out(10 * index + 1, "not finite", "step %d")
        return [r.message for r in caplog.records]

    assert len(watched("+++-" * 20)) == 1
    assert len(watched("+----" + "+" * 20)) == 1
    never, own = watched("-" * 12), watched("+" * 3 + "-" * 4)
    assert len(never) == 2
    assert "no Hessian refresh has succeeded" in never[1]
    assert len(own) == 1
    own, often = watched("+++++++" + "+-" * 20)
    assert own == "step 81"
    assert often.startswith("5 of the last 10 Hessian refreshes until step 161 brought nothing")
    assert "train in bf16" in often


def test_a_refresh_that_is_tried_again_counts_once(caplog) -> None:
    health = HessianHealth(k=2, first_step=1)
    for _ in range(6):
        health.refreshed()
    for step in range(13, 40):
        health.left_out(step, "not finite", "step %d")
        health.tried_again()
    assert [r.message for r in caplog.records] == ["step 13"]
    for _ in range(4):
        health.left_out(41, "not finite", "step %d")
    assert len(caplog.records) == 1
    health.left_out(43, "not finite", "step %d")
    assert len(caplog.records) == 2


def test_clipping_is_judged_by_logs_in_a_row_and_after_some_refreshes(caplog) -> None:
    health = HessianHealth(k=1, first_step=1)
    for _ in range(20):
        health.logged(1.0, 1.0)
    for _ in range(10):
        health.refreshed()
    for fraction in (1.0, 1.0, 1.0, 1.0, 0.5) * 3:
        health.logged(fraction, 1.0)
    assert not caplog.records
    for _ in range(10):
        health.logged(0.99, 1.0)
    assert len(caplog.records) == 1
