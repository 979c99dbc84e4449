"""What a comparison of optimizers consists of: read from YAML, checked, turned into trials."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.arguments import read_yaml

#: Options of a recipe that belong to an optimizer. All others are the same for all: the data, their
#: order, the initialisation, the schedule and the budget.
OWN_ARGUMENTS = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")

_FOLDER = Path(__file__).parents[1]

#: The recipes that can be compared on: modules beside this package.
RECIPES = sorted({path.stem for path in _FOLDER.glob("*.py")} - {"compare_optimizers"})

#: How a step's rows are cut into micro-batches, which an ablation may change, but not their number.
_CUT = ("per_device_train_batch_size", "gradient_accumulation_steps")

#: Learning rates that each optimizer is tried with, at least.
MIN_LEARNING_RATES = 4


@dataclass(frozen=True)
class Trial:
    """One training run: everything that its result depends on.

    Args:
        recipe: The recipe's module, such as `pretrain_gpt2`.
        arguments: Its command line's options, learning rate and seed among them.
        optim: A name that `--optim` takes, or one of `rivals.RIVALS`.
        optim_args: The optimizer's own options.
        validation_rows: About how many rows to evaluate on, every n-th of the validation split and
            not fewer than these; None: all.
    """

    recipe: str
    arguments: Mapping[str, Any]
    optim: str
    optim_args: Mapping[str, Any]
    validation_rows: int | None = None

    @property
    def key(self) -> str:
        """What tells it from other trials, the same in every run."""
        return json.dumps(vars(self), sort_keys=True)

    def changed(
        self,
        arguments: Mapping[str, Any] | None = None,
        optim_args: Mapping[str, Any] | None = None,
    ) -> "Trial":
        """Return a trial with some options replaced or added; None takes an option away."""
        return Trial(
            self.recipe,
            _merged(self.arguments, arguments or {}),
            self.optim,
            _merged(self.optim_args, optim_args or {}),
            self.validation_rows,
        )


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**old, **new}.items() if value is not None}


@dataclass(frozen=True)
class Candidate:
    """An optimizer with what may be tuned.

    Args:
        base: The trial that all others change, without learning rate and seed.
        learning_rates: To try, ascending.
        variants: Changes to try at the best learning rate, each as `Trial.changed` takes them.
    """

    base: Trial
    learning_rates: tuple[float, ...]
    variants: tuple[Mapping[str, Any], ...]

    def at(self, learning_rate: float, seed: int) -> Trial:
        """Return the trial of the base with a learning rate and a seed."""
        return self.base.changed({"learning_rate": learning_rate, "seed": seed})


@dataclass(frozen=True)
class Study:
    """A setting, the optimizers to compare in it, and what to change of the one of interest.

    Args:
        candidates: By name.
        reference: The candidate that the others are measured by.
        seeds: The first is tuned on; the best of each candidate runs with all of them.
        subject: The candidate that ablations change.
        ablations: Changes of the tuned subject, by name.
    """

    candidates: Mapping[str, Candidate]
    reference: str
    seeds: tuple[int, ...]
    subject: str | None = None
    ablations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def measured_by(self, name: str | None) -> "Study":
        """Return the study with another reference; None: with its own.

        Raises:
            ValueError: The name is not a candidate's.
        """
        if name is not None and name not in self.candidates:
            raise ValueError(f"reference {name!r} not among {', '.join(self.candidates)}")
        return replace(self, reference=name or self.reference)

    def only(self, names: Collection[str] | None) -> "Study":
        """Return the study of some candidates and the reference alone; None: of all.

        Raises:
            ValueError: A name is not a candidate's.
        """
        if names is None:
            return self
        if unknown := sorted(set(names) - self.candidates.keys()):
            raise ValueError(f"{', '.join(unknown)} not among {', '.join(self.candidates)}")
        kept = {n: c for n, c in self.candidates.items() if n in names or n == self.reference}
        ablations = self.ablations if self.subject in kept else {}
        return replace(self, candidates=kept, ablations=ablations)


def read_study(path: Path) -> Study:
    """Read a study.

    Args:
        path: A YAML file; those in `benchmarks/studies` are examples. `extends: FILE` takes over
            what is in another one beside it; null takes a name of it away.

    Returns:
        The study.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Something in it is missing, unknown or not comparable; the message says what.
    """
    values = _read_extended(path)
    _check_names(
        path,
        values,
        {"recipe", "arguments", "seeds", "reference", "optimizers"},
        {"subject", "ablations", "validation_rows"},
    )
    for name in ("arguments", "optimizers"):
        _check_mapping(f"{path}: {name}", values[name])
    values["arguments"] = _merged({}, values["arguments"])
    if values["recipe"] not in RECIPES:
        raise ValueError(
            f"{path}: recipe must be one of {', '.join(RECIPES)}, got {values['recipe']!r}"
        )
    if not isinstance(values["seeds"], list) or not all(
        type(seed) is int and seed >= 0 for seed in values["seeds"]
    ):
        raise ValueError(f"{path}: seeds must be a list of whole numbers, got {values['seeds']!r}")
    rows = values.get("validation_rows", 1)
    if type(rows) is not int or rows < 1:
        raise ValueError(f"{path}: validation_rows must be a whole number > 0, got {rows!r}")
    _check_rows(f"{path}: arguments", values["arguments"], values)
    candidates = {}
    for name, options in values["optimizers"].items():
        candidates[name] = _read_candidate(f"{path}: optimizers.{name}", options, values)
    budgets = {name: len(c.learning_rates) + len(c.variants) for name, c in candidates.items()}
    if len(set(budgets.values())) > 1:
        raise ValueError(
            f"{path}: every optimizer needs the same tuning budget, learning rates and variants"
            f" together, got {budgets}"
        )
    for name in ("reference", "subject"):
        if name in values and values[name] not in list(candidates):
            raise ValueError(f"{path}: {name} {values[name]!r} is not among {sorted(candidates)}")
    ablations = values.get("ablations", {})
    _check_mapping(f"{path}: ablations", ablations)
    if ablations and not values.get("subject"):
        raise ValueError(f"{path}: ablations need a subject, the optimizer that they change")
    for name, change in ablations.items():
        where = f"{path}: ablations.{name}"
        _check_change(where, change, _CUT)
        _check_rows(where, {**values["arguments"], **change.get("arguments", {})}, values)
    if not values["seeds"] or len(set(values["seeds"])) < len(values["seeds"]):
        raise ValueError(f"{path}: seeds must be different numbers, got {values['seeds']}")
    return Study(
        candidates, values["reference"], tuple(values["seeds"]), values.get("subject"), ablations
    )


def _read_candidate(where: str, options: Any, values: dict[str, Any]) -> Candidate:
    _check_names(
        where, options, {"optim", "learning_rate"}, {"optim_args", "arguments", "variants"}
    )
    if not isinstance(options["optim"], str):
        raise ValueError(f"{where}: optim must be a name, got {options['optim']!r}")
    rates = options["learning_rate"]
    if (
        not isinstance(rates, list)
        or not all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates)
        or sorted(set(rates)) != rates
        or len(rates) < MIN_LEARNING_RATES
    ):
        raise ValueError(
            f"{where}: learning_rate must hold at least {MIN_LEARNING_RATES} values > 0 in"
            f" ascending order, got {rates!r}"
        )
    variants = options.get("variants", [])
    if not isinstance(variants, list):
        raise ValueError(f"{where}: variants must be a list, got {variants!r}")
    for variant in variants:
        _check_change(f"{where}: variants", variant)
    _check_change(where, {name: options.get(name, {}) for name in ("arguments", "optim_args")})
    base = Trial(
        values["recipe"],
        {**values["arguments"], **options.get("arguments", {})},
        options["optim"],
        options.get("optim_args", {}),
        values.get("validation_rows"),
    )
    if len({base.key, *(base.changed(**variant).key for variant in variants)}) <= len(variants):
        raise ValueError(f"{where}: a variant is the same as the base or another variant")
    return Candidate(base, tuple(rates), tuple(variants))


def _check_change(where: str, change: Any, more: Collection[str] = ()) -> None:
    _check_names(where, change, set(), {"optim_args", "arguments"})
    for name, options in change.items():
        _check_mapping(f"{where}.{name}", options)
    if shared := sorted(change.get("arguments", {}).keys() - {*OWN_ARGUMENTS, *more}):
        raise ValueError(
            f"{where}: {', '.join(shared)} must be the same for all optimizers: put it into the"
            f" study's own arguments (an optimizer's are {', '.join(OWN_ARGUMENTS)})"
        )
    if "lr" in change.get("optim_args", {}):
        raise ValueError(f"{where}: optim_args must not hold lr, which learning_rate is a grid of")


def _check_rows(where: str, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    size, accumulation = _CUT

    def rows(given: Mapping[str, Any]) -> int:
        cut = {size: 8, accumulation: 1, **given}  # the Trainer's defaults
        for name in _CUT:
            if type(cut[name]) is not int or cut[name] < 1:
                raise ValueError(f"{where}: {name} must be a whole number > 0, got {cut[name]!r}")
        return cut[size] * cut[accumulation]

    if rows(arguments) != rows(values["arguments"]):
        raise ValueError(
            f"{where}: {' times '.join(_CUT)} must stay {rows(values['arguments'])},"
            f" got {rows(arguments)}"
        )


def _check_mapping(where: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: wanted 'name: value' lines, got {values!r}")
    if odd := [name for name in values if not isinstance(name, str)]:
        raise ValueError(f"{where}: a name was read as {odd[0]!r}: put quotes around it")


def _read_extended(path: Path, *readers: Path) -> dict[str, Any]:
    values = read_yaml(path)
    _check_mapping(str(path), values)
    if (base := values.pop("extends", None)) is None:
        return values
    readers = (*readers, path.resolve())
    if not isinstance(base, str) or (path.parent / base).resolve() in readers:
        raise ValueError(
            f"{path}: extends must name a file that does not extend this one, got {base!r}"
        )
    return _overlaid(_read_extended(path.parent / base, *readers), values)


def _overlaid(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with those of `new` in their place; lists are replaced as a whole."""
    both = {
        name: _overlaid(old[name], value)
        if isinstance(value, dict) and isinstance(old.get(name), dict)
        else value
        for name, value in new.items()
    }
    return _merged(old, both)


def _check_names(where: object, values: Any, needed: set[str], optional: set[str]) -> None:
    _check_mapping(str(where), values)
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(values.keys() - needed - optional):
        raise ValueError(
            f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(needed | optional))}"
        )
