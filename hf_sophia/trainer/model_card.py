"""The model card of a run: what really trained the model, on what, and what came of it."""

import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import ParallelMode

from hf_sophia.optim import Sophia
from hf_sophia.trainer.card_facts import (
    RunFacts,
    TrainingCorpus,
    describe_optimizer,
    distinct,
    evaluation_of,
    metrics_in,
    unwrapped,
)

#: Tags of every model that this package's optimizers or Trainers have trained.
TAGS = ("hf_sophia", "generated_from_trainer")

#: The picture that a card shows where the run's folder has it.
PICTURE = "loss.png"

_PAPER = """\
@article{liu2023sophia,
  title   = {Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training},
  author  = {Liu, Hong and Li, Zhiyuan and Hall, David and Liang, Percy and Ma, Tengyu},
  journal = {arXiv preprint arXiv:2305.14342},
  year    = {2023}
}"""

_PACKAGE = """\
@software{{hf_sophia,
  title   = {{hf_sophia: the Sophia optimizer for Hugging Face Transformers}},
  version = {{{version}}}
}}"""


def compose(trainer: transformers.Trainer, summary: TrainingSummary, facts: RunFacts) -> ModelCard:
    """Write the card.

    Args:
        trainer: The Trainer, during or after the training.
        summary: What transformers gathered: names, tasks, data sets, licence, hyperparameters.
        facts: What the Trainer itself does not keep.

    Returns:
        The card, not saved.
    """
    step, metrics = evaluation_of(trainer, facts.loaded_best)
    data = _metadata(trainer, summary, facts, metrics)
    parts = [
        f"# {summary.model_name}",
        _origin(trainer, facts),
        _results(step, metrics),
        f"![What was logged, over optimizer steps]({PICTURE})"
        if (Path(trainer.args.output_dir) / PICTURE).is_file()
        else "",
        "## Data",
        _data(facts.corpus, summary),
        optimizer_section(trainer, facts.hessian),
        "## Training",
        _table(("setting", "value"), _settings(trainer, summary, facts.schedule).items()),
        _history(trainer),
        "## Software",
        _table(("package", "version"), _versions().items()),
        "## Citation",
        citation(),
    ]
    text = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def optimizer_section(trainer: transformers.Trainer, hessian: Mapping[str, Any]) -> str:
    """Write the card's section on the optimizer.

    Args:
        trainer: The Trainer.
        hessian: What to say of Sophia's Hessian, by name.
    """
    name, options = describe_optimizer(trainer.optimizer, trainer.state.global_step > 0)
    table = _table(("option", "value"), (options | dict(hessian)).items()) if options else ""
    return "\n\n".join(part for part in ("## Optimizer", f"{name}.", table) if part)


def citation() -> str:
    """Write the card's citations: of the paper and of this package."""
    package = _PACKAGE.format(version=version("hf_sophia"))
    return f"```bibtex\n{_PAPER}\n\n{package}\n```"


def _metadata(
    trainer: transformers.Trainer,
    summary: TrainingSummary,
    facts: RunFacts,
    metrics: Mapping[str, float],
) -> ModelCardData:
    corpus = facts.corpus
    tasks = _listed(summary.tasks)
    hub_ids = [name for name in (corpus and corpus.hub_id, *_listed(summary.dataset_tags)) if name]
    name = corpus.name if corpus else next(iter(_listed(summary.dataset)), "unspecified")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unspecified"
    results = [
        EvalResult(
            task_type=tasks[0],
            dataset_type=hub_ids[0] if hub_ids else slug,
            dataset_name=name,
            metric_type=metric.removeprefix("eval_"),
            metric_name=metric.removeprefix("eval_").replace("_", " "),
            metric_value=value,
        )
        for metric, value in metrics.items()
        # What JSON has no number for would make the card invalid.
        if tasks and math.isfinite(value)
    ]
    options: dict[str, Any] = {
        "library_name": "transformers",
        "language": summary.language,
        "license": summary.license,
        "base_model": facts.base,
        "tags": distinct([*_listed(summary.tags), *tags(trainer)]),
        "pipeline_tag": tasks[0] if len(tasks) == 1 else None,
        "datasets": distinct(hub_ids) or None,
        "metrics": sorted({result.metric_type for result in results}) or None,
    }
    if results:
        options |= {"model_name": summary.model_name, "eval_results": results}
    return ModelCardData(**{name: value for name, value in options.items() if value is not None})


def _listed(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else [name for name in given or () if name]


def tags(trainer: transformers.Trainer) -> list[str]:
    """Return the tags of a model that was trained here; `sophia` where that is what ran.

    Args:
        trainer: The Trainer.
    """
    ran = trainer.state.global_step > 0 and isinstance(unwrapped(trainer.optimizer), Sophia)
    return [*(["sophia"] if ran else []), *TAGS]


def _origin(trainer: transformers.Trainer, facts: RunFacts) -> str:
    if facts.base:
        origin = f"[{facts.base}](https://huggingface.co/{facts.base}), trained further"
    elif facts.pretrained:
        origin = "trained further from local weights"
    else:
        # A script may have copied weights into it, which leaves no trace.
        origin = "trained from scratch: no weights were loaded by `from_pretrained`"
    done, planned = trainer.state.global_step, trainer.state.max_steps
    length = f"It took {done:,} optimizer steps." if done else ""
    if done and trainer.is_in_train and done < planned:
        length = f"It has taken {done:,} of {planned:,} planned optimizer steps."
    if facts.earlier_steps:
        length += f" Before these it had taken {facts.earlier_steps:,} in another training."
    return f"A {facts.class_name}, {origin}. {length}".strip()


def _results(step: int | None, metrics: Mapping[str, float]) -> str:
    if step is None:
        return "It was not evaluated."
    rows = [(name.removeprefix("eval_"), _number(value)) for name, value in metrics.items()]
    return f"On the evaluation data, after {step:,} steps:\n\n" + _table(("metric", "value"), rows)


def _data(corpus: TrainingCorpus | None, summary: TrainingSummary) -> str:
    if corpus is not None:
        where = f"https://huggingface.co/datasets/{corpus.hub_id}" if corpus.hub_id else None
        rows = {
            "name": f"[{corpus.name}]({where})" if where else corpus.name,
            "content": corpus.content,
            "licence": corpus.licence or "not known",
        }
        return _table(("corpus", ""), [(n, v) for n, v in rows.items() if v])
    return (
        ", ".join(_listed(summary.dataset))
        or "The script that trained this model did not say what the data are."
    )


def _settings(
    trainer: transformers.Trainer, summary: TrainingSummary, schedule: str | None
) -> dict[str, Any]:
    args = trainer.args
    rows = dict(summary.hyperparameters or {})
    for name in ("optimizer", "learning_rate"):  # stand above, as they were
        rows.pop(name, None)
    asked = schedule == args.lr_scheduler_type.value
    if not asked:
        rows.pop("lr_scheduler_warmup_steps", None)
    rows["lr_scheduler_type"] = schedule or "none was made"
    rows["max_grad_norm"] = args.max_grad_norm
    if args.lr_scheduler_kwargs and asked:
        rows["lr_scheduler_kwargs"] = args.lr_scheduler_kwargs
    if args.bf16:
        rows["mixed_precision_training"] = "bf16"
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        rows["distributed_type"] = str(trainer.accelerator.distributed_type.value)
    return rows


def _history(trainer: transformers.Trainer) -> str:
    """Write a table of the evaluations during the training."""
    if trainer.args.eval_strategy == IntervalStrategy.NO:
        return ""
    rows: dict[int, dict[str, float]] = {}
    loss = None
    for entry in trainer.state.log_history:
        loss = entry.get("loss", loss)
        if metrics := metrics_in(entry):
            rows.setdefault(entry["step"], {"training loss": loss} if loss else {})
            rows[entry["step"]] |= metrics
    names = distinct(name for row in rows.values() for name in row)
    lines = [
        (f"{step:,}", *(_number(row[name]) if name in row else "" for name in names))
        for step, row in rows.items()
    ]
    titles = [name.replace("eval_", "evaluation ", 1).replace("_", " ") for name in names]
    return _table(("step", *titles), lines)


def _versions() -> dict[str, str]:
    return {
        "hf_sophia": version("hf_sophia"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:,.4g}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [_cells(row) for row in rows]
    if not lines:
        return ""
    return "\n".join(
        f"| {' | '.join(row)} |" for row in (_cells(header), ["---"] * len(header), *lines)
    )


def _cells(row: Iterable[Any]) -> list[str]:
    return [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
