"""A resumed run equals the uninterrupted one, and takes its own options."""

import logging

import pytest
import torch

from hf_sophia import SophiaTrainer

from .runs import Recorder, arguments, dataset, run, sophia_of


@pytest.mark.parametrize(
    "way",
    [
        "rho=0.2",
        "rho=0.2,hessian_batch_fraction=0.5",
        "rho=0.2,hessian_batch_fraction=0.3",
        "rho=0.2,hessian_computation_type=hutchinson",
        "rho=auto,target_clip_fraction=0.2,nesterov=true,bias_correction=true",
    ],
    ids=["kept", "kept of one", "own", "hutchinson", "auto"],
)
@pytest.mark.parametrize(("saved_at", "refreshed"), [(13, [14, 21]), (10, [11, 21]), (20, [21])])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(
    saved_at, refreshed, way, tiny_gpt2, tmp_path
) -> None:
    # Dropout, accumulation, a schedule; a save between two refreshes, or right before one.
    options = {
        "optim_args": f"k=10,{way}",
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "save_strategy": "steps",
        "save_steps": saved_at,
    }
    whole = run(tiny_gpt2(resid_pdrop=0.1), tmp_path / "run", **options)
    checkpoint = tmp_path / "run" / f"checkpoint-{saved_at}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    names = {"step", "exp_avg", "hessian", "refreshed"} | ({"rho"} if "auto" in way else set())
    assert set(saved["state"][0]) == names

    recorder = Recorder()
    resumed = SophiaTrainer(
        tiny_gpt2(seed=1, resid_pdrop=0.1),
        arguments(tmp_path / "again", **options),
        train_dataset=dataset(),
        callbacks=[recorder],
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    # The first entry is the state that was loaded.
    assert recorder.refreshed == refreshed
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)
        states = [sophia_of(t).state[p] for t, p in ((whole, one), (resumed, other))]
        assert states[0]["step"] == states[1]["step"] == 30
        assert all(state["refreshed"] for state in states)
        for name in names - {"step", "refreshed"}:
            assert torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize(("before", "after"), [("0.2", "auto"), ("auto", "0.2")])
def test_another_kind_of_rho_takes_over_on_resume(
    before, after, tiny_gpt2, tmp_path, caplog
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    run(tiny_gpt2(), tmp_path, optim_args=f"k=3,rho={before}", **options)
    for steps in (6, 8):
        changed = {**options, "save_steps": 2, "optim_args": f"k=3,rho={after}", "max_steps": steps}
        trainer = SophiaTrainer(
            tiny_gpt2(), arguments(tmp_path, **changed), train_dataset=dataset()
        )
        with caplog.at_level(logging.WARNING, "hf_sophia"):
            trainer.train(resume_from_checkpoint=True)
    assert caplog.text.count(f"resuming with rho={after} in parameter group 0") == 1
    assert next(iter(sophia_of(trainer).state.values()))["step"] == 8
    logged = trainer.state.log_history[-2]["sophia/rho"]
    assert (logged == pytest.approx(0.2)) == (after == "0.2")


def test_options_asked_for_on_resume_take_effect_and_are_logged(
    tiny_gpt2, tmp_path, caplog
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    run(tiny_gpt2(), tmp_path, **options)
    recorder = Recorder()
    changed = {
        **options,
        "optim_args": "rho=0.7,k=3,beta1=0.8,eps=1e-6",
        "max_steps": 9,
        "weight_decay": 0.3,
    }
    trainer = SophiaTrainer(
        tiny_gpt2(), arguments(tmp_path, **changed), train_dataset=dataset(), callbacks=[recorder]
    )
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for group in trainer.optimizer.param_groups:
        assert (group["rho"], group["k"], group["betas"]) == (0.7, 3, (0.8, 0.95))
        assert group["eps"] == 1e-6
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    assert recorder.refreshed[1:] == [7]
    assert "resuming with k=3 in parameter group 0; the checkpoint had 10" in caplog.text
    assert "betas=(0.8, 0.95)" in caplog.text
    assert "hessian_computation_type" not in caplog.text


@pytest.mark.parametrize(("before", "after"), [("gnb", "hutchinson"), ("hutchinson", "gnb")])
def test_another_estimator_takes_over_on_resume(before, after, tiny_gpt2, tmp_path, caplog) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    run(tiny_gpt2(), tmp_path, optim_args=f"k=4,hessian_computation_type={before}", **options)
    changed = {
        **options,
        "optim_args": f"k=4,hessian_computation_type={after}",
        "max_steps": 6,
    }
    recorder = Recorder()
    trainer = SophiaTrainer(
        tiny_gpt2(), arguments(tmp_path, **changed), train_dataset=dataset(), callbacks=[recorder]
    )
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert f"resuming with hessian_computation_type={after} in parameter group 0" in caplog.text
    assert f"Hessian by {after} " in caplog.text
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    first = recorder.hessians[5]
    for index, hessian in enumerate(first):
        assert not torch.equal(hessian, saved[index]["hessian"])
    # 0.05 of the new estimate beside 0.95 of the old; only Hutchinson's can be negative.
    new = [(h - 0.95 * saved[i]["hessian"]) / 0.05 for i, h in enumerate(first)]
    assert (min(estimate.min() for estimate in new) < -1e-6) == (after == "hutchinson")
