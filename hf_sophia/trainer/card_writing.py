"""Gives a Trainer the model card of this package, and the picture on it."""

import functools
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.distributed.fsdp import FSDPModule
from transformers.modelcard import TrainingSummary
from transformers.trainer import Trainer

from hf_sophia.trainer.card_facts import (
    RunFacts,
    TrainingCorpus,
    describe_optimizer,
    distinct,
    is_pretrained,
    scheduler_under,
    task_of,
)
from hf_sophia.trainer.hub import HUB_ERRORS, bounded, licence_of, reason
from hf_sophia.trainer.model_card import PICTURE, citation, compose, optimizer_section, tags
from hf_sophia.trainer.picture import draw, has_points

logger = logging.getLogger(__name__)


class CardWritingMixin:
    """Makes `create_model_card` state what really happened; and watches what it needs for that."""

    #: What the model is trained on, for its card; a script sets it.
    corpus: TrainingCorpus | None = None
    #: Seconds without a byte from the Hub after which its client tries again, and then gives up.
    hub_timeout: float = 120.0
    #: What the loss is measured in, for its picture.
    loss_unit: str = "mean over the batch"

    # The state of a run, on the class: there is no constructor.
    _pretrained: bool | None = None
    _earlier_steps: int = 0
    _loaded_best: int | None = None
    _schedule_of_args: Any = None
    _base_licence: tuple[str, str | None] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train, and note where the weights came from.

        Args:
            resume_from_checkpoint: As for the Trainer.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the Trainer returns.
        """
        if self._pretrained is None:
            # FSDP2 puts other parameters in the place of those that were loaded.
            self._pretrained = is_pretrained(self.model)
        self._earlier_steps = 0 if resume_from_checkpoint else self._steps_so_far()
        self._loaded_best = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _steps_so_far(self) -> int:
        return self._earlier_steps + self.state.global_step

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Make the schedule that the arguments ask for, and remember that it is theirs.

        Args:
            *args: As for `Trainer.create_scheduler`.
            **kwargs: The same.

        Returns:
            The scheduler.
        """
        given = self.lr_scheduler
        made = super().create_scheduler(*args, **kwargs)
        if given is None:
            self._schedule_of_args = made
        return made

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        # Where it is gone the Trainer leaves the weights as they are, with a warning.
        if best is not None and Path(best).is_dir():
            self._loaded_best = self.state.best_global_step
        super()._load_best_model()

    def _bare_model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _class_name(self) -> str:
        model = self._bare_model()
        name = type(model).__name__
        return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name

    def draw_run(self) -> Path | None:
        """Draw what was logged so far into the run's folder, as `loss.png`.

        Returns:
            The picture, or None where nothing was logged or matplotlib is not installed.
        """
        if not has_points(self.state.log_history):
            return None
        size = sum(param.numel() for param in self._bare_model().parameters())
        count = f"{size / 1e6:.1f}M" if size >= 100_000 else f"{size:,}"
        title = [f"{self._class_name()}, {count} parameters", describe_optimizer(self.optimizer)[0]]
        title += [self.corpus.name] if self.corpus else []
        path = Path(self.args.output_dir) / PICTURE
        try:
            figure = draw({", ".join(title): self.state.log_history}, unit=self.loss_unit)
        except ModuleNotFoundError:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return path

    @property
    def _writes_stock_cards(self) -> bool:
        return super().create_model_card.__func__ is Trainer.create_model_card

    @functools.wraps(Trainer.create_model_card, assigned=())
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card into the run's folder: what really trained the model, on what.

        The card of a Trainer that writes its own, as TRL's do, is kept and added to.

        Args:
            *args: As for `Trainer.create_model_card`.
            **kwargs: The same.
        """
        stock = self._writes_stock_cards
        if not stock:
            super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = card_at(path)
        if stock:
            self._write_card(path, before, *args, **kwargs)
        elif before is not None:
            self._add_to_card(path, before)

    def _card_name(self) -> str:
        name = self.hub_model_id or self.args.hub_model_id
        return (name or Path(self.args.output_dir).absolute().name).split("/")[-1]

    def _write_card(self, path: Path, before: ModelCard | None, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(Trainer.create_model_card)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        pretrained, base = self._origin(given.pop("finetuned_from", None))
        if base is not None and given.get("license") is None:
            given["license"] = self._licence_of(base)
        given["model_name"] = given.get("model_name") or self._card_name()
        model = self._bare_model()
        given.setdefault("tasks", task_of(model.get_base_model() if _is_adapter(model) else model))
        for guessed in ("dataset_tags", "dataset_args"):
            # Else a builder's name, such as "generator", would be taken for a data set of the Hub.
            given[guessed] = given.get(guessed) or []
        # Without a name here it takes the configuration's for the model's, and asks the Hub.
        summary = TrainingSummary.from_trainer(self, finetuned_from="", **given)
        self.draw_run()
        facts = RunFacts(
            class_name=self._class_name(),
            corpus=self.corpus,
            pretrained=pretrained,
            base=base,
            loaded_best=self._loaded_best,
            schedule=self._schedule(),
            earlier_steps=self._earlier_steps,
            hessian=self._hessian_facts(),
        )
        card = compose(self, summary, facts)
        if before is not None:
            card.data.tags = distinct([*(before.data.tags or ()), *card.data.tags])
        card.save(path)
        if _is_adapter(self._bare_model()):
            self._bare_model().create_or_update_model_card(path.parent)
            adapter = ModelCard.load(path)
            names = distinct([*card.data.tags, *(adapter.data.tags or ())])
            if base is None:
                # Theirs names the folder of this machine that the base model was loaded from.
                names = [tag for tag in names if not tag.startswith("base_model:")]
            adapter.data.tags, adapter.data.base_model = names, base
            adapter.save(path)

    def _origin(self, given: str | None) -> tuple[bool, str | None]:
        """Return whether weights were loaded, and which model of the Hub they are of."""
        pretrained = is_pretrained(self.model) if self._pretrained is None else self._pretrained
        if given is not None:
            return True, given
        name = getattr(getattr(self._bare_model(), "config", None), "_name_or_path", "")
        if not pretrained or not name or Path(name).exists():
            return pretrained, None
        try:
            validate_repo_id(name)
        except HFValidationError:
            return pretrained, None  # a folder that is gone
        return pretrained, name

    def _schedule(self) -> str | None:
        """Return the name of the schedule that ran."""
        ran = scheduler_under(self.lr_scheduler)
        if ran is None:
            return None
        if ran is scheduler_under(self._schedule_of_args):
            return self.args.lr_scheduler_type.value
        return f"{type(ran).__name__}, the script's own"

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


def card_at(path: Path) -> ModelCard | None:
    """Read the card that is there, or None; one that can't be read is put aside.

    Args:
        path: Of its file.
    """
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        aside = path.with_name(f"{path.name}.unreadable")
        path.replace(aside)
        logger.warning("%s can't be read (%s) and is now %s", path, reason(error), aside.name)
        return None


def _is_adapter(model: torch.nn.Module) -> bool:
    peft = sys.modules.get("peft")  # what is not imported has made no model
    return peft is not None and isinstance(model, peft.PeftModel)
