"""Of a share of the batch, whole micro-batches keep their graphs where that is cheaper."""

import logging

import pytest
import torch

from hf_sophia import SophiaTrainer
from hf_sophia.trainer.plan import make_plan

from .by_hand import exact_step_estimate
from .runs import Recorder, arguments, dataset, run, sophia_of


@pytest.mark.parametrize(
    ("fraction", "micro_batches", "kept"),
    [
        (0.25, 4, 1),
        (0.25, 8, 2),
        (0.1, 30, 3),  # not 4: 0.1 * 30 is a little more than 3
        (0.5, 2, 1),
        (0.25, 2, None),  # half the batch on kept graphs costs more than a quarter in a pass
        (0.4, 3, None),  # two of three: 0.67 against 0.6
        (0.45, 3, 2),
        (0.25, 1, None),
        (1.0, 4, None),  # all of it in a pass of its own is what can be asked for in no other way
    ],
)
def test_the_cheaper_way_is_taken(fraction, micro_batches, kept) -> None:
    model = torch.nn.Linear(2, 2)
    plan = make_plan(model, model, "gnb", fraction, micro_batches)
    assert plan.kept == kept
    assert plan.fraction == (fraction if kept is None else None)


def test_nothing_asked_for_keeps_all_graphs() -> None:
    model = torch.nn.Linear(2, 2)
    plan = make_plan(model, model, "gnb", None, 8)
    assert (plan.kept, plan.fraction) == (None, None)
    assert make_plan(model, model, "hutchinson", 0.25, 8).fraction == 0.25


def test_a_graph_that_is_gone_after_one_pass_is_not_kept() -> None:
    model = torch.nn.Linear(2, 2)
    for fraction, expected in ((None, 0.25), (0.5, 0.5)):
        plan = make_plan(model, model, "gnb", fraction, 8, offloaded=True)
        assert (plan.kept, plan.fraction) == (None, expected)
    assert "offloading" in plan.reason


def test_trls_activation_offloading_is_asked_for(tiny_gpt2, tmp_path) -> None:
    args = arguments(tmp_path, max_steps=1)
    args.activation_offloading = True
    trainer = SophiaTrainer(tiny_gpt2(), args, train_dataset=dataset())
    trainer.train()
    assert trainer._plan.fraction == 0.25


def test_the_estimate_is_of_the_first_micro_batches(tiny_gpt2, tmp_path, caplog) -> None:
    data = dataset(12, ignored=0.2)
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer = run(
            tiny_gpt2(),
            tmp_path,
            data=data,
            seed=3,
            max_steps=1,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=4,
            optim_args="rho=0.2,hessian_batch_fraction=0.5",
            train_sampling_strategy="sequential",
        )
    assert "gnb on the kept graphs of 2 micro-batches of each step" in caplog.text
    batches = {
        (0, i): {k: torch.stack([row[k] for row in data[3 * i : 3 * i + 3]]) for k in data[0]}
        for i in range(2)
    }
    expected = exact_step_estimate(tiny_gpt2(), batches, seed=3)
    state = sophia_of(trainer).state
    for param, exact in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(state[param]["hessian"], 0.05 * exact, rtol=1e-4, atol=1e-9)
    counted = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches.values())
    assert trainer._hessian_tokens == counted


def test_an_epochs_last_step_may_have_fewer(tiny_gpt2, tmp_path) -> None:
    recorder = Recorder()
    run(
        tiny_gpt2(),
        tmp_path,
        data=dataset(20),  # five batches: a step of four, and one of one
        callback=recorder,
        max_steps=4,
        gradient_accumulation_steps=4,
        optim_args="k=1,hessian_batch_fraction=0.5",
    )
    assert recorder.refreshed == [1, 2, 3, 4]


class LossOfItsOwn(SophiaTrainer):
    """Does not reach the mixin's compute_loss, which keeps the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_where_no_graph_comes_the_share_gets_a_pass_of_its_own(tiny_gpt2, tmp_path, caplog) -> None:
    options = {"gradient_accumulation_steps": 4, "optim_args": "hessian_batch_fraction=0.25,k=2"}
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer = run(
            tiny_gpt2(),
            tmp_path,
            callback=recorder,
            trainer_class=LossOfItsOwn,
            max_steps=3,
            **options,
        )
    assert recorder.refreshed == [1, 3]
    assert (trainer._plan.kept, trainer._plan.fraction) == (None, 0.25)
    assert "LossOfItsOwn.compute_loss did not reach SophiaTrainerMixin's" in caplog.text
    # As if it had been asked for a pass from the start: a quarter of sixteen rows.
    assert trainer._hessian_tokens == 4 * 11
