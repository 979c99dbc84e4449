"""Pushing to the Hub with failures that are told of, and a Hub that may stall."""

import functools
import inspect
import logging
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers.trainer import Trainer
from transformers.trainer_utils import HubStrategy, rotate_checkpoints, sort_checkpoints

from hf_sophia.trainer.card_writing import CardWritingMixin, card_at
from hf_sophia.trainer.hub import (
    HUB_ERRORS,
    HUB_PREFIX,
    LAST_CHECKPOINT,
    Secret,
    bounded,
    download_checkpoint,
    hold_limit,
    push_command,
    reason,
    remove_others,
)
from hf_sophia.trainer.pushes import PushRecord, Upload

logger = logging.getLogger(__name__)

#: The files of which one has a model's weights, whole or in parts.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model*")


class HubPushError(OSError):
    """The Hub did not take what was to be pushed; all of it is still on the disk."""


class PublishingMixin(CardWritingMixin):
    """Makes a Trainer's pushes to the Hub loud, bounded in time and truthful.

    A push in the background that fails is warned about, once for each cause, and the end of
    training says what was and was not pushed, with the command to push it by hand. A stalled Hub
    is given up on. A checkpoint is not removed while it is being uploaded. The token of
    `hub_token` does not get into `training_args.bin`.
    """

    # The state of a run, on the class: there is no constructor.
    _pushes: PushRecord | None = None
    _pushing: bool = False
    _local_fault: BaseException | None = None
    _cleared: bool = False

    def _hide_token(self) -> None:
        token = self.args.hub_token
        if token is not None and not isinstance(token, Secret):
            self.args.hub_token = Secret(token)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository where it is missing.

        Args:
            *args: As for `Trainer.init_hf_repo`.
            **kwargs: The same.

        Raises:
            HubPushError: The Hub refuses, or can't be reached; nothing has been trained yet.
        """
        self._hide_token()
        try:
            with bounded(self.hub_timeout):
                super().init_hf_repo(*args, **kwargs)
        except HUB_ERRORS as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            # Without the client's own error, in which there may be the key of an upload.
            raise HubPushError(
                f"the repository {name!r} can't be pushed to: {reason(error)}. Check"
                " --hub_model_id and the token (`hf auth whoami`), or leave --push_to_hub out"
            ) from None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train; at the end say what was pushed to the Hub, where that was asked for.

        Args:
            resume_from_checkpoint: As for the Trainer, or `hub:user/name[@revision]` for the
                checkpoint that was pushed there last.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the Trainer returns.

        Raises:
            ValueError: There is no such checkpoint on the Hub.
        """
        self._hide_token()
        with bounded(self.hub_timeout):
            if str(resume_from_checkpoint).startswith(HUB_PREFIX):
                # One process of each machine downloads, the others find it in the cache.
                with self.args.main_process_first(desc="downloading the checkpoint"):
                    found = download_checkpoint(resume_from_checkpoint, self.args.hub_token)
                resume_from_checkpoint = str(found)
            pushes = self.args.push_to_hub and self.is_world_process_zero()
            self._pushes = PushRecord(logger.warning) if pushes else None
            self._cleared = False
            try:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
                self._push_what_was_left_out()
            finally:
                self._give_account()
        return result

    def _push_what_was_left_out(self) -> None:
        """Push the last save where the upload before it was still running when it came."""
        if self._pushes is None or not self._pushes.last_save_was_skipped:
            return
        if self.args.load_best_model_at_end:
            return  # the card of what was loaded would stand beside the weights of the last save
        checkpoints = sort_checkpoints(self.args.output_dir)
        if checkpoints and checkpoints[-1].endswith(f"-{self._pushes.skipped[-1]}"):
            self._push_from_checkpoint(checkpoints[-1])
            self._finish_current_push()

    def _give_account(self) -> None:
        if self._pushes is None:
            return
        if not self._pushes.uploads and not self._pushes.skipped:
            logger.info("nothing was pushed to %s yet: push_to_hub() does", self.hub_model_id)
            return
        account, arrived = self._pushes.account(self.hub_model_id, self.args.hub_revision)
        logger.log(logging.INFO if arrived else logging.WARNING, "%s", account)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; as in the Trainer this pushes it too, where pushing was asked for.

        Args:
            *args: Passed on.
            **kwargs: Passed on.
        """
        self._hide_token()
        try:
            super().save_model(*args, **kwargs)
        except Exception as error:
            self._local_fault = error
            raise

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push model, tokenizer and card.

        Args:
            *args: As for `Trainer.push_to_hub`.
            **kwargs: The same.

        Returns:
            What the Trainer returns.

        Raises:
            HubPushError: The Hub did not take them; the message has the command to push by hand.
            OSError: They could not be written.
        """
        self._hide_token()
        self._local_fault, self._pushing = None, True
        given = inspect.signature(Trainer.push_to_hub).bind(self, *args, **kwargs).arguments
        revision = given.get("revision") or self.args.hub_revision
        try:
            with bounded(self.hub_timeout):
                pushed = super().push_to_hub(*args, **kwargs)
        except HUB_ERRORS as error:
            if isinstance(error, HubPushError) or error is self._local_fault:
                raise
            raise HubPushError(
                f"the model was not pushed to {self._repository()}: {reason(error)}. It is in"
                f" {self.args.output_dir}; push it with\n  {self._command(revision)}"
            ) from None
        finally:
            self._pushing = False
        if isinstance(pushed, Future):
            self._watch(pushed, revision)
        elif self.is_world_process_zero():
            logger.info("pushed to %s: the model of %s", self.hub_model_id, self.args.output_dir)
        return pushed

    def _repository(self) -> str:
        name = self.hub_model_id or self.args.hub_model_id
        return name or Path(self.args.output_dir).absolute().name

    def _command(self, revision: str | None) -> str:
        return push_command(self._repository(), self.args.output_dir, revision=revision)

    def _watch(self, job: Future, revision: str | None) -> None:
        """Say what becomes of a push in the background after the training."""
        let_go = hold_limit(self.hub_timeout)

        def ended(job: Future) -> None:
            let_go()
            if job.cancelled() or job.exception() is not None:
                why = "it was cancelled" if job.cancelled() else reason(job.exception())
                logger.warning(
                    "the model was not pushed to %s: %s. Push it with\n  %s",
                    self._repository(),
                    why,
                    self._command(revision),
                )

        job.add_done_callback(ended)

    @functools.wraps(Trainer.create_model_card, assigned=())
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card; while pushing, no card is worth the push or the training.

        Args:
            *args: As for `Trainer.create_model_card`.
            **kwargs: The same.
        """
        try:
            super().create_model_card(*args, **kwargs)
        except Exception as error:
            if not self._pushing:
                raise
            logger.warning("the model card could not be written: %s", reason(error))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push in the background, and wait where a checkpoint is about to be removed."""
        if self._pushes is None or self.args.hub_strategy == HubStrategy.END:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        running = self.push_in_progress
        known = set() if running is None else set(running.jobs)
        pushes = self.args.hub_always_push or running is None or running.is_done()
        if pushes:
            # What is being uploaded is about to be overwritten, and would get another's name.
            self._wait_for_uploads_of({Path(self.args.output_dir).resolve()})
        self._rotate_now(Path(checkpoint_folder).parent)
        if pushes:
            self._create_card_on_the_way()
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        new = [job for job in jobs if job not in known]
        if new:
            self._record(new, Path(checkpoint_folder))
        else:
            self._pushes.skipped.append(self.state.global_step)

    def _rotate_now(self, run: Path) -> None:
        """Remove old checkpoints when their uploads have ended, and before the next one begins.

        The Trainer does it afterwards, while the client lists what is in the run's folder.
        """
        self._wait_for_uploads_of(self._about_to_go(run, self.args.save_total_limit))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _record(self, jobs: list[Future], checkpoint: Path) -> None:
        """Watch the jobs of a save: the model's, then the checkpoint's where that is pushed too."""
        output = Path(self.args.output_dir)
        what = "model"
        if not any(any(output.glob(pattern)) for pattern in _WEIGHTS):
            what = "card, without weights,"
            self._pushes.warn_once(
                f"{output} holds no weights that could be pushed, as parameters are saved in"
                " shards: ask for fsdp_config={'state_dict_type': 'FULL_STATE_DICT'}"
            )
        last = self.args.hub_strategy == HubStrategy.CHECKPOINT
        place = LAST_CHECKPOINT if last else checkpoint.name
        step = self.state.global_step
        targets = ((what, output, "."), ("checkpoint", checkpoint, place))
        for job, (name, folder, where) in zip(jobs, targets, strict=False):
            # The limit outlives a training that ends in an exception.
            self._pushes.add(
                Upload(name, folder, where, step, job), then=[hold_limit(self.hub_timeout)]
            )
        if last and len(jobs) > 1 and not self._cleared:
            self._cleared = True
            jobs[1].add_done_callback(lambda job: self._clear(job, checkpoint))

    def _clear(self, job: Future, checkpoint: Path) -> None:
        """Remove what another run has left beside the files of the first checkpoint pushed."""
        if job.cancelled() or job.exception() is not None or not checkpoint.is_dir():
            self._cleared = False
            return
        repo, args = self.hub_model_id, self.args
        try:
            # The training, and the limit with it, may be over when this is called.
            with bounded(self.hub_timeout):
                remove_others(repo, checkpoint, LAST_CHECKPOINT, args.hub_token, args.hub_revision)
        except HUB_ERRORS as error:
            self._cleared = False
            self._pushes.warn_once(
                f"{LAST_CHECKPOINT} of {repo} may hold files of another run: {reason(error)}"
            )

    def _create_card_on_the_way(self) -> None:
        self._pushing = True
        try:
            path = Path(self.args.output_dir) / "README.md"
            if self._writes_stock_cards:
                self.create_model_card()
            elif (card := card_at(path)) is not None:
                # Such a Trainer has written its own just now, under a name that it knows.
                self._add_to_card(path, card)
        finally:
            self._pushing = False

    def _about_to_go(self, run: Path, limit: int | None) -> set[Path]:
        """Return the checkpoints that rotation may remove, best or not."""
        folders = sort_checkpoints(str(run), use_mtime=True)
        surplus = len(folders) - limit if limit and limit > 0 else 0
        if surplus > 0 and self.state.best_model_checkpoint is not None:
            surplus += 1  # the best may be among the oldest and stay
        return {Path(folder).resolve() for folder in folders[:-1][: max(surplus, 0)]}

    def _wait_for_uploads_of(self, folders: set[Path]) -> None:
        if jobs := self._pushes.running_from(folders):
            logger.info("waiting for an upload of files that are about to change or go")
            futures.wait(jobs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of one, the last checkpoint goes here where another is the best.
        if self._pushes is not None and self.args.save_total_limit == 1:
            output = self.args.output_dir
            self._wait_for_uploads_of(
                {Path(folder).resolve() for folder in (output, *sort_checkpoints(output))}
            )
        return super()._finalize_training(*args, **kwargs)
