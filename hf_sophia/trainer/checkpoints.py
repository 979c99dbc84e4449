"""Checkpoints that are whole, or known not to be: a run can be killed at any moment and resumed."""

import json
import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

#: What reading and writing files raises: a full disk comes as any of these. CheckpointException is
#: torch.distributed.checkpoint's, and no Exception.
_FILE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
_LOAD_ERRORS = (*_FILE_ERRORS, ValueError, TypeError, LookupError, AttributeError, EOFError)

#: Written by transformers, in each process, while it saves a checkpoint because of SIGTERM.
_SENTINEL = "checkpoint-is-incomplete.txt"

#: What stands in the place of the state of optimizers whose file is missing.
_SHARDED_OPTIMIZER = "optimizer_0"
_OPTIMIZER_FILES = (OPTIMIZER_NAME, "optimizer.bin", _SHARDED_OPTIMIZER)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer's state is the last of its files.

    Args:
        checkpoint: Its folder.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first.

    Args:
        folder: The run's `output_dir`.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {
        path: int(found[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (found := pattern.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(steps, key=steps.__getitem__, reverse=True)


def last_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None.

    Args:
        folder: The run's `output_dir`.
    """
    return next((path for path in checkpoints_of(folder) if is_whole(path)), None)


def _advice(folder: Path) -> str:
    last = last_whole(folder)
    return f"the last whole one is {last}" if last else f"{folder} holds no whole one"


@contextmanager
def _explained(checkpoint: Path, file: str | None = None) -> Iterator[None]:
    """Turn what a damaged or foreign checkpoint raises into an error that names the file."""
    try:
        yield
    except (*_LOAD_ERRORS, pickle.UnpicklingError) as error:
        path = checkpoint / (file or _culprit(checkpoint))
        raise ValueError(
            f"{path} can't be loaded: {error}. Nothing was changed on disk. Resume from another"
            f" checkpoint, or train from this one's weights alone, with"
            f" from_pretrained({str(checkpoint)!r}) and without resume_from_checkpoint"
        ) from error


def _culprit(checkpoint: Path) -> str:
    """Name the file that can't even be read, else the optimizer's, which then is foreign."""
    names = [name for name in _OPTIMIZER_FILES if (checkpoint / name).exists()]
    for name in (*names, SCHEDULER_NAME):
        if (path := checkpoint / name).is_file():
            try:
                torch.load(path, map_location="cpu", weights_only=True)
            except Exception:
                return name
    return names[0] if names else OPTIMIZER_NAME


def whole_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint that was written on one process, in one file or several.

    Args:
        checkpoint: Its folder.

    Raises:
        ValueError: It holds none.
    """
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if not all((checkpoint / name).is_file() for name in names):
        raise ValueError(
            f"{checkpoint} holds no {SAFE_WEIGHTS_NAME} that FSDP could take over; resume it as it"
            " was written, or train on with from_pretrained and without resume_from_checkpoint"
        )
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        weights |= load_file(checkpoint / name)
    return weights


class WholeCheckpointsMixin:
    """Makes a Trainer's checkpoints safe against being killed while one is written.

    `trainer_state.json` is the last file of a checkpoint: it stands for all the others, those of
    other processes included. `resume_from_checkpoint=True` takes the newest checkpoint that has it.
    """

    #: The checkpoint that this run has written or read last.
    _newest: Path | None = None
    #: Whether a checkpoint is being written because of SIGTERM.
    _terminating = False

    def _keeps_checkpoints_whole(self) -> bool:
        """Whether to do anything; a subclass says when."""
        return True

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train, where asked from a checkpoint that was written to its end.

        Args:
            resume_from_checkpoint: A folder, or True for the newest whole checkpoint of the run.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the Trainer returns.

        Raises:
            ValueError: The checkpoint is not whole, or none is; the message names one that is.
        """
        if self._keeps_checkpoints_whole():
            if resume_from_checkpoint:
                resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
            if self.args.should_save:
                # Of runs that were killed: in this one the mark is to say that SIGTERM came.
                for folder in checkpoints_of(Path(self.args.output_dir)):
                    (folder / _SENTINEL).unlink(missing_ok=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, asked: str | bool) -> str | bool:
        run = Path(self.args.output_dir)
        if asked is not True:
            folder = Path(asked)
            if folder.is_dir() and not is_whole(folder):
                raise ValueError(
                    f"the checkpoint {folder} was not written to its end (no whole"
                    f" {TRAINER_STATE_NAME}): {_advice(folder.parent)}. Resume from a whole one, or"
                    " with resume_from_checkpoint=True from the newest of them"
                )
            return asked
        found = checkpoints_of(run)
        last = last_whole(run)
        if last is None:
            if not found:
                return asked
            raise ValueError(
                f"no checkpoint in {run} was written to its end ({found[0].name} is the newest):"
                " start without resume_from_checkpoint"
            )
        if last != found[0]:
            logger.warning(
                "%s was not written to its end: resuming from %s instead", found[0], last
            )
        return str(last)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint; while that lasts, and if it fails, it does not count as whole.

        Raises:
            OSError: It could not be written; the message names the last whole one.
        """
        if not self._keeps_checkpoints_whole():
            super()._save_checkpoint(model, trial)
            return
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        state = folder / TRAINER_STATE_NAME
        # Transformers asks for a checkpoint at SIGTERM in each process by itself, and at moments
        # that can differ: to wait for the others there would be to lose it.
        self._terminating = (folder / _SENTINEL).exists()
        if self._terminating and self._newest == folder.resolve() and is_whole(folder):
            # Of this step, before its successor has begun: it is what would be written.
            (folder / _SENTINEL).unlink(missing_ok=True)
            return
        if self.args.should_save:
            # An earlier run may have left a whole one here, which is about to be overwritten.
            state.unlink(missing_ok=True)
        if not self._terminating:
            self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except _FILE_ERRORS as error:
            if is_whole(folder):
                raise  # a later part failed: pushing, or removing older checkpoints
            state.unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {folder} could not be written: {error}. It is incomplete and will"
                f" not be resumed from; {_advice(run)}. Make room (save_total_limit keeps fewer"
                " checkpoints) and train with resume_from_checkpoint=True"
            ) from error
        self._newest = folder.resolve()

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the generators' states, and go on to the Trainer's own when all processes have."""
        super()._save_rng_state(output_dir)
        if self._keeps_checkpoints_whole() and not self._terminating:
            self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the generators' states; without them a resumed run is not exactly the same.

        Raises:
            ValueError: The file is damaged.
        """
        if checkpoint is None or not self._keeps_checkpoints_whole():
            super()._load_rng_state(checkpoint)
            return
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        name = f"rng_state{rank}.pth"
        if not (Path(checkpoint) / name).is_file():
            logger.warning(
                "%s holds no %s: dropout and other random numbers will not be those of the"
                " uninterrupted run",
                checkpoint,
                name,
            )
        with _explained(Path(checkpoint), name):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights; those of a run on one process also into FSDP2's shards.

        Raises:
            ValueError: FSDP2 is to take over weights that are not those of this model.
        """
        folder = Path(resume_from_checkpoint)
        if not self._is_of_one_process(resume_from_checkpoint):
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except SafetensorError as error:
                raise ValueError(
                    f"the weights in {folder} can't be loaded: {error}. Resume from another"
                    " checkpoint"
                ) from error
            return
        weights = whole_weights(folder)
        saved = frozenset(weights)  # loading fills in what is missing
        target = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        result = set_model_state_dict(
            target, weights, options=StateDictOptions(full_state_dict=True, strict=False)
        )
        # Of parameters that are tied one name is saved.
        everything = list(target.named_parameters(remove_duplicate=False))
        loaded = {param for name, param in everything if name in saved}
        missing = [name for name, param in everything if param not in loaded]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"the weights in {folder} are not those of this model: {missing or 'none'} are"
                f" missing, {result.unexpected_keys or 'none'} are unknown to it"
            )

    def _is_of_one_process(self, checkpoint: str) -> bool:
        """Whether FSDP2 is to take over a checkpoint that was not written under it."""
        folder = Path(checkpoint)
        return (
            self._keeps_checkpoints_whole()
            and self.is_fsdp_enabled
            and not any(folder.glob("pytorch_model_fsdp*"))
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and scheduler.

        Raises:
            ValueError: A file is damaged or another optimizer's; the message names it.
        """
        if checkpoint is None or not self._keeps_checkpoints_whole():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        self._newest = folder.resolve()
        if not any((folder / name).exists() for name in _OPTIMIZER_FILES):
            logger.warning(
                "%s holds no state of the optimizer (save_only_model): momentum, Hessian and"
                " schedule start anew",
                folder,
            )
            return
        if not (folder / SCHEDULER_NAME).is_file():
            raise ValueError(
                f"{folder} holds a state of the optimizer but no {SCHEDULER_NAME}, without which"
                " transformers loads neither: resume from another checkpoint"
            )
        self._load_both(folder)
        empty = sum(
            not self.optimizer.state.get(param)
            for group in self.optimizer.param_groups
            for param in group["params"]
        )
        if empty:
            logger.warning(
                "the state of the optimizer in %s has nothing for %d parameters: theirs starts"
                " anew",
                folder,
                empty,
            )

    def _load_both(self, folder: Path) -> None:
        with _explained(folder):
            if self.is_fsdp_enabled and not self._is_of_one_process(str(folder)):
                self._expect_what_was_saved(folder)
                super()._load_optimizer_and_scheduler(str(folder))
                return
            # Older transformers can't read the file on several CPU processes; and through the CPU
            # it does not take a device's memory twice.
            for name, target in (
                (OPTIMIZER_NAME, self.optimizer),
                (SCHEDULER_NAME, self.lr_scheduler),
            ):
                saved = torch.load(folder / name, map_location="cpu", weights_only=True)
                target.load_state_dict(saved)

    def _expect_what_was_saved(self, folder: Path) -> None:
        """Leave out of a sharded optimizer's state what a run with other options did not have.

        torch.distributed.checkpoint loads into the state that a step of length 0 has made, and
        misses what the files do not hold of it.
        """
        shards = folder / _SHARDED_OPTIMIZER
        if not (shards / ".metadata").is_file():
            return
        saved = FileSystemReader(shards).read_metadata().state_dict_metadata
        # optimizer.state.NAME OF PARAMETER.rho; optimizer.param_groups has a rho of its own.
        names = {key.rpartition(".")[2] for key in saved if key.startswith("optimizer.state.")}
        optimizer = self.optimizer.optimizer
        missing = getattr(optimizer, "_optional_state", frozenset()) - names
        if missing:
            get_optimizer_state_dict(self.model, self.optimizer)
            for state in optimizer.state.values():
                for name in missing & state.keys():
                    del state[name]
