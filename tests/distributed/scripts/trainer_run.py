"""A run of `SophiaTrainer` in each process, under DDP or FSDP2; every rank saves what it holds."""

import hashlib
import json
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trainer.scripts.two_processes import rows, tiny_model
from transformers import TrainerCallback, TrainingArguments

from hf_sophia import SophiaTrainer
from hf_sophia.trainer import refresh as refresh_module
from hf_sophia.trainer.noise import label_noise

#: Wrap every block of the model.
FSDP2 = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}


class Checksums(TrainerCallback):
    """Notes a hash of this process's parameters and states after every step."""

    def __init__(self) -> None:
        self.hashes: list[str] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Hash them, with the names of their kinds."""
        digest = hashlib.sha256()
        for param in model.parameters():
            held = optimizer.optimizer.state[param]
            for tensor in (param, held["exp_avg"], held["hessian"]):
                digest.update(whole(tensor).detach().numpy().tobytes())
            digest.update(str(held["step"]).encode())
        self.hashes.append(digest.hexdigest())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def noise_by_turn(turns: int, processes: int) -> None:
    """Give each micro-batch the labels of its turn in the step, on however many processes it is."""

    def by_turn(seed: int, step: int, rank: int, micro_batch: int) -> torch.Generator:
        return label_noise(seed, step, 0, micro_batch * processes + rank)

    assert turns % processes == 0
    refresh_module.label_noise = by_turn


class Death(TrainerCallback):
    """Kills one process at the end of a step, as the kernel does when memory is short."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Die without a word."""
        if (args.process_index, state.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


class Warnings(logging.Handler):
    """Keeps how each of this package's warnings begins."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.beginnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep six words."""
        self.beginnings.append(" ".join(record.getMessage().split()[:6]))


class PoisonedTrainer(SophiaTrainer):
    """Has logits that are no numbers in one process, at one refresh."""

    poison: tuple[int, int] | None = None

    def sophia_head(self, model, inputs, outputs):
        """Take the logits as they are, elsewhere."""
        head = super().sophia_head(model, inputs, outputs)
        here = (self.args.process_index, self.state.global_step)
        return replace(head, logits=head.logits * float("nan")) if here == self.poison else head


def main(folder: str, settings: str) -> None:
    """Train as the settings say: `TrainingArguments` and what this script adds to them."""
    options = json.loads(settings)
    output = Path(folder)
    fsdp, turns = options.pop("fsdp", False), options.pop("turns", None)
    resume, data = options.pop("resume", None), options.pop("data", "uneven")
    death = options.pop("death", None)
    poison, dropout = options.pop("poison", None), options.pop("dropout", 0.0)
    if fsdp:
        kind = {"state_dict_type": "SHARDED_STATE_DICT"} if fsdp == "sharded files" else {}
        options |= {"fsdp": True, "fsdp_config": {**FSDP2, **kind}}
    args = TrainingArguments(
        output / "run",
        **{
            "optim": "sophia",
            "optim_args": "rho=1.0,k=2,eps=1e-5",
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "seed": 5,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    processes = max(args.world_size, 1)
    if fsdp:
        # On a CPU accelerate would leave FSDP out without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if turns:
        noise_by_turn(turns, processes)
    sums = Checksums()
    examples = rows()
    if data == "silent rank":
        # Rank 1 of 2 takes the odd batches.
        for index in range(16):
            if (index // 4) % 2:
                examples[index]["labels"][:] = -100
    model = tiny_model().double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    warned = Warnings()
    logging.getLogger("hf_sophia").addHandler(warned)
    trainer = PoisonedTrainer(model, args, train_dataset=examples, callbacks=[sums])
    if death:
        trainer.add_callback(Death(*death))
    trainer.poison = tuple(poison) if poison else None
    trainer.train(resume_from_checkpoint=resume)
    params = list(trainer.model.parameters())
    sophia = trainer.optimizer.optimizer
    shares = {
        param: sophia.clip_fraction_asked(param, group)
        for group in sophia.param_groups
        for param in group["params"]
    }
    states = [trainer.optimizer.optimizer.state[p] for p in params]
    result = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "plan": str(trainer._plan),
        "hashes": sums.hashes,
        "warnings": warned.beginnings,
        "shares": {name: shares[param] for name, param in trainer.model.named_parameters()},
        "params": [whole(p.detach()) for p in params],
        "hessians": [whole(s["hessian"]) for s in states],
        "momenta": [whole(s["exp_avg"]) for s in states],
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    torch.save(result, output / f"rank{args.process_index}.pt")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
