"""Memory: a refresh that does not fit is made smaller, and a long run does not grow."""

import gc
import importlib
import logging
import weakref

import pytest
import torch
from transformers import TrainerCallback

from hf_sophia import SophiaTrainer
from hf_sophia.estimators import sampled_cotangent

from .runs import Recorder, dataset, first_hessian, run

# The package's name for it is the function inside.
estimator_module = importlib.import_module("hf_sophia.estimators.gauss_newton_bartlett")


@pytest.fixture
def room_for(monkeypatch):
    """Let the estimator run out of memory, for real, on more than some examples at once."""

    def limit(examples: int, only: int | None = None) -> list:
        seen = []

        def hungry(logits, *args, **kwargs):
            seen.append(weakref.ref(logits))
            if len(logits) > examples and only in (None, len(seen)):
                torch.empty(2**55, dtype=torch.float64)
            return sampled_cotangent(logits, *args, **kwargs)

        monkeypatch.setattr(estimator_module, "sampled_cotangent", hungry)
        return seen

    return limit


@pytest.mark.parametrize("asked", ["", ",hessian_batch_fraction=1.0"], ids=["kept", "own"])
def test_a_refresh_that_does_not_fit_takes_a_smaller_share(
    asked, room_for, tiny_gpt2, tmp_path, caplog
) -> None:
    seen = room_for(2)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        trainer = run(
            tiny_gpt2(),
            tmp_path,
            callback=recorder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=5,
            optim_args=f"rho=0.2,k=2{asked}",
        )
    assert recorder.refreshed == [1, 3, 5]
    warned = [record for record in caplog.records if record.name.startswith("hf_sophia")]
    assert ["ran out of memory" in record.message for record in warned] == [True]
    # A quarter of 16 examples, two of each micro-batch.
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 4 * 11
    gc.collect()
    assert all(logits() is None for logits in seen), "a graph is still there"


def test_what_was_collected_before_it_ran_out_is_dropped(room_for, tiny_gpt2, tmp_path) -> None:
    """The estimate is that of the fallback alone, and training does not notice."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    quarter = {**options, "optim_args": "rho=0.2,k=10,hessian_batch_fraction=0.25"}
    expected = first_hessian(tiny_gpt2, tmp_path, **quarter)
    room_for(3, only=2)
    calls = []

    class Second(SophiaTrainer):
        def sophia_head(self, *args):
            head = super().sophia_head(*args)
            calls.append(head)
            return head

    actual = first_hessian(tiny_gpt2, tmp_path, trainer_class=Second, **options)
    assert len(calls) == 4  # two on the kept graphs, two in passes of their own
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


def test_a_refresh_that_never_fits_is_left_out(room_for, tiny_gpt2, tmp_path, caplog) -> None:
    room_for(0)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        trainer = run(tiny_gpt2(), tmp_path, callback=recorder, max_steps=7, optim_args="k=2")
    assert recorder.refreshed == []
    assert trainer.state.global_step == 7
    causes = ["ran out of memory: it", "its Hessian refresh is left out", "no Hessian refresh has"]
    warned = [record for record in caplog.records if record.name.startswith("hf_sophia")]
    pairs = list(zip(causes, warned, strict=True))
    assert all(cause in record.message for cause, record in pairs)
    assert "from step 1 to step 3 (k=2)" in caplog.text


def test_a_batch_that_can_not_be_cut_is_tried_once(room_for, tiny_gpt2, tmp_path, caplog) -> None:
    class Uncut(SophiaTrainer):
        def get_batch_samples(self, *args):
            batches, count = super().get_batch_samples(*args)
            # As of a vision model whose patches stand in one long row.
            return [{**batch, "patches": torch.zeros(9)} for batch in batches], count

        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs({k: v for k, v in inputs.items() if k != "patches"})

    seen = room_for(0)
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        run(tiny_gpt2(), tmp_path, trainer_class=Uncut, max_steps=1)
    # On the kept graph, and then in a pass of its own on the whole batch.
    assert len(seen) == 2
    assert "ran out of memory" in caplog.text


def test_another_error_at_a_refresh_is_not_taken_for_a_lack_of_memory(
    monkeypatch, tiny_gpt2, tmp_path
) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(estimator_module, "sampled_cotangent", broken)
    for fraction in ("", "hessian_batch_fraction=0.5"):
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            run(tiny_gpt2(), tmp_path, optim_args=fraction or None)


class Growth(TrainerCallback):
    """Counts live tensors and their bytes, and this process's memory, now and then."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.tensors: list[tuple[int, int]] = []
        self.resident: list[int] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            gc.collect()
            live = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
            self.tensors.append((len(live), sum(tensor.nbytes for tensor in live)))
            with open("/proc/self/statm") as statm:
                self.resident.append(int(statm.read().split()[1]) * 4096)


@pytest.mark.parametrize(
    "way",
    ["", "hessian_batch_fraction=0.5", "hessian_computation_type=hutchinson"],
    ids=["kept", "own", "hutchinson"],
)
def test_memory_does_not_grow_over_a_thousand_steps(way, tiny_gpt2, tmp_path) -> None:
    """A hundred refreshes; one that left its graph behind would show in tensors and bytes."""
    growth = Growth(100)
    run(
        tiny_gpt2(),
        tmp_path,
        data=dataset(64),
        callback=growth,
        max_steps=1000,
        optim_args=way or None,
        logging_steps=100,
    )
    assert len(growth.tensors) == 10
    # Some batches have a tensor more than others; what a step leaves behind would add up.
    assert max(growth.tensors[5:]) <= max(growth.tensors[:5]), growth.tensors
    # A graph of this model is about 1 MB, so that eighty of them would be 80 MB; the allocator's
    # own noise is a few.
    assert growth.resident[-1] - growth.resident[1] < 20 * 2**20, growth.resident
