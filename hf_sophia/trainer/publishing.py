"""Pushing to the Hub with a card that is true and failures that are told of."""

import functools
import inspect
import logging
from concurrent import futures
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.modelcard import TrainingSummary
from transformers.trainer import Trainer
from transformers.trainer_utils import HubStrategy, sort_checkpoints

from hf_sophia.trainer.card_facts import TrainingCorpus, distinct, is_pretrained
from hf_sophia.trainer.hub import (
    HUB_ERRORS,
    HUB_PREFIX,
    Secret,
    bounded,
    download_checkpoint,
    licence_of,
    push_command,
    reason,
)
from hf_sophia.trainer.model_card import PICTURE, citation, compose, optimizer_section, tags
from hf_sophia.trainer.picture import draw, has_points
from hf_sophia.trainer.pushes import PushRecord, Upload

logger = logging.getLogger(__name__)


class HubPushError(OSError):
    """The Hub did not take what was to be pushed; all of it is still on the disk."""


class PublishingMixin:
    """Makes a Trainer's pushes to the Hub loud, bounded in time and truthful.

    A push in the background that fails is warned about, once for each cause, and the end of
    training says what was and was not pushed, with the command to push it by hand. A stalled Hub
    is given up on. A checkpoint is not removed while it is being uploaded. The token of
    `hub_token` does not get into `training_args.bin`. The model card is this package's own.
    """

    #: What the model is trained on, for its card; a script sets it.
    corpus: TrainingCorpus | None = None
    #: Seconds without a byte from the Hub after which its client tries again, and then gives up.
    hub_timeout: float = 120.0
    #: What the loss is measured in, for its picture.
    loss_unit: str = "mean over the batch"

    # The state of a run, on the class: there is no constructor.
    _pushes: PushRecord | None = None
    _pretrained: bool | None = None
    _base_licence: tuple[str, str | None] | None = None

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
            raise HubPushError(
                f"the repository {name!r} can't be pushed to: {reason(error)}. Check"
                " --hub_model_id and the token (`hf auth whoami`), or leave --push_to_hub out"
            ) from error

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train; at the end say what was pushed to the Hub, where that was asked for.

        Args:
            resume_from_checkpoint: As for the Trainer, or `hub:user/name[@revision]` for the newest
                checkpoint that a run has pushed there.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the Trainer returns.

        Raises:
            ValueError: There is no such checkpoint on the Hub.
        """
        self._hide_token()
        if self._pretrained is None:
            # FSDP2 puts other parameters in the place of those that were loaded.
            self._pretrained = is_pretrained(self.model)
        with bounded(self.hub_timeout):
            if str(resume_from_checkpoint).startswith(HUB_PREFIX):
                # One process of each machine downloads, the others find it in the cache.
                with self.args.main_process_first(desc="downloading the checkpoint"):
                    found = download_checkpoint(resume_from_checkpoint, self.args.hub_token)
                logger.info("resuming from %s, downloaded to %s", resume_from_checkpoint, found)
                resume_from_checkpoint = str(found)
            self._pushes = PushRecord(logger.warning) if self._pushes_here() else None
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._pushes is not None:
            if self._pushes.uploads:
                account, arrived = self._pushes.account(self.hub_model_id, self.args.hub_revision)
                logger.log(logging.INFO if arrived else logging.WARNING, "%s", account)
            else:
                logger.info("nothing was pushed to %s yet: push_to_hub() does", self.hub_model_id)
        return result

    def _pushes_here(self) -> bool:
        return self.args.push_to_hub and self.is_world_process_zero()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model; as in the Trainer this pushes it too, where pushing was asked for.

        Args:
            *args: Passed on.
            **kwargs: Passed on.
        """
        self._hide_token()
        super().save_model(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push model, tokenizer and card.

        Args:
            *args: As for `Trainer.push_to_hub`.
            **kwargs: The same.

        Returns:
            What the Trainer returns.

        Raises:
            HubPushError: The Hub did not take them; the message has the command to push by hand.
        """
        self._hide_token()
        try:
            with bounded(self.hub_timeout):
                pushed = super().push_to_hub(*args, **kwargs)
        except HUB_ERRORS as error:
            if isinstance(error, HubPushError):
                raise
            folder = self.args.output_dir
            name = self.hub_model_id or self.args.hub_model_id or Path(folder).absolute().name
            command = push_command(name, folder, revision=self.args.hub_revision)
            raise HubPushError(
                f"the model was not pushed to {name}: {reason(error)}. It is in {folder}; push it"
                f" with\n  {command}"
            ) from error
        if self.is_world_process_zero():
            logger.info("pushed to %s: the model of %s", self.hub_model_id, self.args.output_dir)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push in the background, and wait where a checkpoint is about to be removed."""
        if self._pushes is None or self.args.hub_strategy == HubStrategy.END:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        running = self.push_in_progress
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            self._pushes.skipped.append(self.state.global_step)
        else:
            # What is being uploaded is about to be overwritten, and would get another's name.
            self._wait_for_uploads_of({Path(self.args.output_dir).resolve()})
            self._create_card_on_the_way()
        known = set() if running is None else set(running.jobs)
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        new = [job for job in jobs if job not in known]
        step = self.state.global_step
        output = Path(self.args.output_dir)
        checkpoint = Path(checkpoint_folder)
        last = self.args.hub_strategy == HubStrategy.CHECKPOINT
        # The model first, then the checkpoint, where the strategy pushes that too.
        targets = (
            ("model", output, "."),
            ("checkpoint", checkpoint, "last-checkpoint" if last else checkpoint.name),
        )
        for job, (what, folder, place) in zip(new, targets, strict=False):
            self._pushes.add(Upload(what, folder, place, step, job))
        self._wait_for_uploads_of(self._about_to_go(self.args.save_total_limit))

    def _create_card_on_the_way(self) -> None:
        """Create the card of a run that goes on, which no card is worth ending."""
        try:
            self.create_model_card()
        except Exception as error:
            self._pushes.warn_once(f"the model card could not be written: {reason(error)}")

    def _about_to_go(self, limit: int | None) -> set[Path]:
        """Return the checkpoints that rotation may remove, best or not."""
        folders = sort_checkpoints(self.args.output_dir, use_mtime=True)
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
            self._wait_for_uploads_of(
                {Path(f).resolve() for f in sort_checkpoints(self.args.output_dir)}
            )
        return super()._finalize_training(*args, **kwargs)

    def draw_run(self) -> Path | None:
        """Draw what was logged so far into the run's folder, as `loss.png`.

        Returns:
            The picture, or None where nothing was logged or matplotlib is not installed.
        """
        model = self.accelerator.unwrap_model(self.model)
        size = sum(param.numel() for param in model.parameters())
        count = f"{size / 1e6:.1f}M" if size >= 100_000 else f"{size:,}"
        title = [f"{type(model).__name__}, {count} parameters", str(self.args.optim.value)]
        title += [self.corpus.name] if self.corpus else []
        path = Path(self.args.output_dir) / PICTURE
        if not has_points(self.state.log_history):
            return None
        try:
            draw({", ".join(title): self.state.log_history}, unit=self.loss_unit).savefig(path)
        except ModuleNotFoundError:
            return None
        return path

    @functools.wraps(Trainer.create_model_card, assigned=())
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card into the run's folder: what really trained the model, on what.

        The card of a Trainer that writes its own, as TRL's do, is kept and added to.

        Args:
            *args: As for `Trainer.create_model_card`.
            **kwargs: The same.
        """
        inherited = super().create_model_card
        stock = inherited.__func__ is Trainer.create_model_card
        if not stock:
            inherited(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = ModelCard.load(path) if path.is_file() else None
        if stock:
            self._write_card(path, before, *args, **kwargs)
        elif before is not None:
            self._add_to_card(path, before)

    def _write_card(self, path: Path, before: ModelCard | None, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(Trainer.create_model_card)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        base = given.pop("finetuned_from", None)
        pretrained = is_pretrained(self.model) if self._pretrained is None else self._pretrained
        pretrained = pretrained or base is not None
        if pretrained and base is None:
            name = getattr(self.model.config, "_name_or_path", "")
            base = name if name and not Path(name).is_dir() else None
        if base is not None and given.get("license") is None:
            given["license"] = self._licence_of(base)
        # Without a name here it takes the configuration's for the model's, and asks the Hub.
        summary = TrainingSummary.from_trainer(self, finetuned_from="", **given)
        summary.finetuned_from = base
        self.draw_run()
        card = compose(self, summary, self.corpus, pretrained, self._hessian_facts())
        if before is not None:
            card.data.tags = distinct([*(before.data.tags or ()), *card.data.tags])
        card.save(path)
        if before is not None and before.data.library_name == "peft":
            self.accelerator.unwrap_model(self.model).create_or_update_model_card(path.parent)
            adapter = ModelCard.load(path)
            names = distinct([*card.data.tags, *(adapter.data.tags or ())])
            if base is None:
                # Theirs names the folder of this machine that the base model was loaded from.
                names = [tag for tag in names if not tag.startswith("base_model:")]
            adapter.data.tags, adapter.data.base_model = names, base
            adapter.save(path)

    def _licence_of(self, base: str) -> str | None:
        """Ask the Hub for a model's licence, once."""
        if self._base_licence is None or self._base_licence[0] != base:
            try:
                with bounded(self.hub_timeout):
                    self._base_licence = (base, licence_of(base, self.args.hub_token))
            except HUB_ERRORS as error:
                logger.warning("the licence of %s is not known: %s", base, reason(error))
                self._base_licence = (base, None)
        return self._base_licence[1]

    def _add_to_card(self, path: Path, card: ModelCard) -> None:
        """Add the optimizer to another Trainer's card, unless it stands there already."""
        section = optimizer_section(self, self._hessian_facts())
        if section not in card.text:
            card.text += f"\n\n{section}\n\n{citation()}\n"
        card.data.tags = distinct([*(card.data.tags or ()), *tags(self)])
        card.save(path)

    def _hessian_facts(self) -> dict[str, Any]:
        """Return what a card says of the Hessian; a subclass that makes one says it."""
        return {}
