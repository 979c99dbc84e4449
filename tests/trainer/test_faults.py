"""What goes wrong is said, and leaves nothing half done."""

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import (
    Trainer,
    TrainingArguments,
)

from hf_sophia import Sophia, SophiaTrainer
from hf_sophia.trainer import support
from hf_sophia.trainer.heads import HeadOutput
from hf_sophia.trainer.support import check_wrapped

from .runs import Recorder, arguments, dataset, run


def test_the_stock_trainer_is_refused_at_its_first_moving_step(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="hf_sophia.SophiaTrainer instead of"):
        run(model, tmp_path, trainer_class=Trainer, max_steps=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])
    with pytest.raises(RuntimeError, match="would take step 1 without .* due at step 1"):
        run(
            tiny_gpt2(),
            tmp_path,
            trainer_class=Trainer,
            lr_scheduler_type="linear",
            warmup_steps=2,
            max_steps=3,
        )


def test_a_batch_without_labels_that_count_skips_that_refresh(tiny_gpt2, tmp_path, caplog) -> None:
    data = dataset(40)
    for row in data[:8]:
        row["labels"] = torch.full_like(row["labels"], -100)
    recorder = Recorder()
    model = tiny_gpt2()
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        trainer = run(
            model,
            tmp_path,
            data=data,
            callback=recorder,
            optim_args="k=2,rho=0.2",
            max_steps=8,
            train_sampling_strategy="sequential",
        )
    assert caplog.text.count("no label of the batch of step 1 counts") == 1
    assert recorder.refreshed == [3, 5, 7]
    assert all(p.isfinite().all() for p in model.parameters())
    assert trainer.state.log_history[-2]["sophia/hessian_tokens"] == 4 * 11


def test_an_estimate_that_is_not_finite_is_discarded(tiny_gpt2, tmp_path, caplog) -> None:
    class Poisoned(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            head = super().sophia_head(model, inputs, outputs)
            if self.state.global_step == 0:
                return head
            return HeadOutput(head.logits * float("inf"), head.targets)

    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        run(
            tiny_gpt2(),
            tmp_path,
            trainer_class=Poisoned,
            callback=recorder,
            max_steps=7,
            optim_args="k=2",
        )
    assert recorder.refreshed == [1]
    assert caplog.text.count("is discarded; the Hessian stays as it was") == 1


def test_a_step_that_failed_starts_its_refresh_anew(tiny_gpt2, tmp_path) -> None:
    class Failing(SophiaTrainer):
        failed = False

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if not self.failed and self._refresh is not None:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return loss

    class FailingInside(SophiaTrainer):
        failed = False

        def sophia_head(self, *args):
            head = super().sophia_head(*args)
            if self._refresh.seen_graphs == 1 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return head

    for trainer_class in (Failing, FailingInside):
        trainer = run(
            tiny_gpt2(),
            tmp_path,
            trainer_class=trainer_class,
            max_steps=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            auto_find_batch_size=True,
        )
        assert trainer.failed
        smaller = trainer._train_batch_size
        assert smaller < 8
        counted = trainer.state.log_history[0]["sophia/hessian_tokens"]
        assert counted == 2 * smaller * 11


def test_a_compute_loss_that_bypasses_the_mixin_is_an_error(tiny_gpt2, tmp_path) -> None:
    class Bypassing(SophiaTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    with pytest.raises(RuntimeError, match="Bypassing.compute_loss did not reach"):
        run(tiny_gpt2(), tmp_path, trainer_class=Bypassing)


def test_unsupported_set_ups_are_refused_before_the_first_step(
    tiny_gpt2, tmp_path, monkeypatch
) -> None:
    trainer = SophiaTrainer(tiny_gpt2(), arguments(tmp_path), train_dataset=dataset())
    sharded = property(lambda self: DistributedType.FSDP)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "distributed_type", sharded)
        with pytest.raises(ValueError, match="does not support FSDP version 1"):
            trainer.create_optimizer()
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="DataParallel, got 2 devices in one process"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("plugin", "config", "message"),
    [
        ({"fsdp_version": 1}, None, "does not support FSDP version 1"),
        ({"fsdp_version": 2, "cpu_offload": True}, None, "leave offload_params off"),
        (None, {"tp_size": 2}, "does not support tensor parallelism, got tp_size=2"),
        (None, {"cp_size": 2}, "does not support context parallelism, got cp_size=2"),
        (None, {"sp_size": 2}, "does not support sequence parallelism, got sp_size=2"),
        (
            {"fsdp_version": 2},
            {"dp_replicate_size": 2, "dp_shard_size": 2},
            "does not support hybrid sharding",
        ),
    ],
)
def test_what_fsdp_and_parallelism_can_not_do_is_refused(
    plugin, config, message, tiny_gpt2, tmp_path, monkeypatch
) -> None:
    trainer = SophiaTrainer(tiny_gpt2(), arguments(tmp_path), train_dataset=dataset())
    accelerator = trainer.accelerator
    kind = DistributedType.FSDP if plugin else DistributedType.NO
    monkeypatch.setattr(type(accelerator), "distributed_type", property(lambda self: kind))
    if plugin:
        held = FullyShardedDataParallelPlugin(**plugin)
        monkeypatch.setitem(accelerator.state._shared_state, "fsdp_plugin", held)
        monkeypatch.setitem(accelerator.state._shared_state, "distributed_type", kind)
    if config:
        asked = ParallelismConfig(**config)
        monkeypatch.setattr(type(accelerator), "parallelism_config", asked, raising=False)
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()


def test_deepspeed_is_refused_with_the_reason(tiny_gpt2, tmp_path, monkeypatch) -> None:
    trainer = SophiaTrainer(tiny_gpt2(), arguments(tmp_path), train_dataset=dataset())
    kind = property(lambda self: DistributedType.DEEPSPEED)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", kind)
    with pytest.raises(ValueError, match="steps inside of the backward pass.*fsdp_version': 2"):
        trainer.create_optimizer()


def test_an_unknown_wrapper_of_several_processes_is_refused(tiny_gpt2, monkeypatch) -> None:
    class Wrapper(torch.nn.Module):
        pass

    accelerator = Accelerator(cpu=True)
    model = tiny_gpt2()
    check_wrapped(model, model, accelerator)
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="how Wrapper brings the gradients of 2 processes"):
        check_wrapped(Wrapper(), model, accelerator)


def test_shards_on_another_device_are_refused(monkeypatch) -> None:
    class Shard(torch.nn.Parameter):
        def to_local(self) -> torch.Tensor:
            return self.data

    model = torch.nn.Linear(2, 2)
    model.weight = Shard(torch.zeros(2, 2, device="meta"))
    monkeypatch.setattr(support, "FSDPModule", torch.nn.Linear)
    monkeypatch.setattr(support, "DTensor", Shard)
    with pytest.raises(ValueError, match="CPU offload.*fsdp_cpu_offload"):
        check_wrapped(model, model, Accelerator(cpu=True))


def test_a_trainer_that_makes_its_own_batches_is_refused(tiny_gpt2, tmp_path) -> None:
    class Prompting(SophiaTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, [inputs], num_items_in_batch)

    with pytest.raises(ValueError, match="Prompting trains on batches of its own making, a list"):
        run(tiny_gpt2(), tmp_path, trainer_class=Prompting)


@pytest.mark.parametrize("text", ["0", "1.5", "-0.1", "nan"])
def test_a_fraction_outside_its_range_is_refused(text, tiny_gpt2, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"hessian_batch_fraction must lie in \(0, 1\], got"):
        run(tiny_gpt2(), tmp_path, optim_args=f"hessian_batch_fraction={text}")


def test_a_fault_of_the_last_step_ends_the_training(tiny_gpt2, tmp_path, monkeypatch) -> None:
    """A kernel on CUDA tells of it with the next step, and there is none."""
    seen = []
    monkeypatch.setattr(Sophia, "check_finite", lambda self: seen.append(self._next_step))
    run(tiny_gpt2(), tmp_path, max_steps=2, save_strategy="no")
    assert seen[-1] == 3
