"""Every kind of head, through many model classes: a run, and the loss by hand."""

import pytest
import torch
from torch.utils.data import default_collate

from hf_sophia.estimators import mean_nll
from hf_sophia.trainer.heads import head_output

from .families import CASES
from .runs import Recorder, run, sophia_of

ACCUMULATION, ROWS, STEPS = 2, 3, 4


@pytest.mark.parametrize("own_pass", [False, True], ids=["kept", "own"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_steps_refresh_every_parameter_that_the_batch_reaches(
    case, own_pass, tmp_path
) -> None:
    model = case.make()
    start = {name: value.clone() for name, value in model.named_parameters()}
    recorder = Recorder()
    trainer = run(
        model,
        tmp_path,
        data=case.rows(ACCUMULATION * ROWS),
        callback=recorder,
        optim_args="rho=0.2,k=2" + ",hessian_batch_fraction=1.0" * own_pass,
        weight_decay=0.0,
        learning_rate=1e-3,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
    )
    assert recorder.refreshed == [1, 3]
    reached, moved = 0, 0
    for name, param in model.named_parameters():
        # Whisper's positions are fixed.
        assert (param in sophia_of(trainer).state) == param.requires_grad, name
        if not param.requires_grad:
            continue
        state = sophia_of(trainer).state[param]
        hessian, gradient = state["hessian"], state["exp_avg"]
        assert hessian.isfinite().all(), name
        # A key's bias cancels in the softmax: its gradients are rounding, as everyone's are.
        if gradient.abs().max() > 1e-7:
            reached += 1
            assert hessian.max() > 0.0, name
            moved += not torch.equal(param, start[name])
    assert moved == reached > 0
    counted = trainer.state.log_history[0]["sophia/hessian_tokens"]
    assert counted > 0
    assert all(e["sophia/hessian_norm"] > 0 for e in trainer.state.log_history if "loss" in e)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_adapters_loss_is_the_models(case) -> None:
    # Experts add an auxiliary loss; without it the model's loss is that of the labels.
    routed = case.family in ("mixtral", "qwen3_moe", "switch_transformers")
    model = case.make()
    # All positions of an answer count here: the mean over them is then the mean of two means.
    rows = [row for row in case.rows(5) if row.get("end_positions", torch.tensor(0)) < 10]
    inputs = default_collate(rows)
    outputs = model(**inputs, **({"output_router_logits": False} if routed else {}))
    head = head_output(model, inputs, outputs)
    nll, count = mean_nll(head.logits, head.targets, likelihood=head.likelihood)
    assert nll.item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert count > 0
