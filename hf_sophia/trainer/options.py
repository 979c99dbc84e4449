"""From `TrainingArguments` to an optimizer's constructor options: parsed, typed, checked."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from hf_sophia.optim.sophia_options import AUTO

logger = logging.getLogger(__name__)


def _parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError("true or false")
    return values[text.lower()]


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("an integer") from None


def _parse_rho(text: str) -> float | str:
    if text == AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"a number or {AUTO!r}") from None


Parser = Callable[[str], Any]


@dataclass(frozen=True)
class OptionTable:
    """What `optim_args` may hold for one optimizer.

    Args:
        parsers: The known options, each with the parser of its value.
        eps_from_adam_epsilon: Whether `--adam_epsilon` means this optimizer's eps.
    """

    parsers: dict[str, Parser]
    eps_from_adam_epsilon: bool


_BETAS_AND_EPS: dict[str, Parser] = {
    "beta1": _parse_float,
    "beta2": _parse_float,
    "eps": _parse_float,
}

OPTION_TABLES = {
    "sophia": OptionTable(
        {
            **_BETAS_AND_EPS,
            "rho": _parse_rho,
            "target_clip_fraction": _parse_float,
            "embedding_clip_fraction": _parse_float,
            "rho_scope": str,
            "nesterov": _parse_bool,
            "bias_correction": _parse_bool,
            "k": _parse_int,
            "hessian_computation_type": str,
            "hessian_batch_fraction": _parse_float,
            "fused": _parse_bool,
        },
        eps_from_adam_epsilon=False,
    ),
    "adam": OptionTable(
        {**_BETAS_AND_EPS, "optimized_update": _parse_bool, "fused": _parse_bool},
        eps_from_adam_epsilon=True,
    ),
    "radam": OptionTable(
        {
            **_BETAS_AND_EPS,
            "optimized_update": _parse_bool,
            "amsgrad": _parse_bool,
            "degenerated_to_sgd": _parse_bool,
            "fused": _parse_bool,
        },
        eps_from_adam_epsilon=True,
    ),
}

#: Sophia's under a Trainer while rho is not a number; docs/evidence.md says why. With a number they
#: are the paper's, which are the constructor's.
AUTO_DEFAULTS: dict[str, Any] = {
    "rho": AUTO,
    "target_clip_fraction": 0.01,
    "embedding_clip_fraction": 0.5,
    "nesterov": True,
    "bias_correction": True,
}

#: The share to clip where one threshold is for all tensors, whose |m| / h differ by factors of a
#: hundred: a small one would be that of the tensors with the largest alone.
SHARED_CLIP_FRACTION = 0.5

#: Options of Sophia's that a number for rho leaves without effect.
_FOR_AUTO = ("target_clip_fraction", "embedding_clip_fraction", "rho_scope")

#: Options that TrainingArguments has fields of its own for.
_ARGUMENT_OF = {
    "lr": "--learning_rate",
    "learning_rate": "--learning_rate",
    "weight_decay": "--weight_decay",
    "betas": "beta1=...,beta2=...",
}


def known_options(name: str) -> str:
    """Return the options of an optimizer as a sentence's end: "beta1, beta2, ..."."""
    return ", ".join(OPTION_TABLES[name].parsers)


def parse_optim_args(name: str, text: str | None) -> dict[str, Any]:
    """Parse `optim_args` of one of this package's optimizers strictly.

    Args:
        name: `"sophia"`, `"adam"` or `"radam"`.
        text: `"option=value,option=value"`; None or empty: no options.

    Returns:
        The options with typed values.

    Raises:
        ValueError: An option is unknown, malformed or given twice; the message lists what is known.
    """
    parsers = OPTION_TABLES[name].parsers
    options: dict[str, Any] = {}
    for part in (text or "").split(",") if (text or "").strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        known = f"Options of {name}: {known_options(name)}"
        if not equals or not key or not value or "=" in value:
            raise ValueError(
                f"optim_args {text!r}: {part.strip()!r} is not of the form option=value. {known}"
            )
        if key not in parsers:
            hint = f"; use {_ARGUMENT_OF[key]}" if key in _ARGUMENT_OF else ""
            raise ValueError(f"optim_args {text!r}: unknown option {key!r}{hint}. {known}")
        if key in options:
            raise ValueError(f"optim_args {text!r}: option {key!r} is given twice. {known}")
        try:
            options[key] = parsers[key](value)
        except ValueError as error:
            raise ValueError(
                f"optim_args {text!r}: {key} must be {error}, got {value!r}. {known}"
            ) from None
    return options


def _changed(args: Any, field_name: str) -> bool:
    """Whether a training argument differs from its class's own default."""
    default = next(field.default for field in fields(args) if field.name == field_name)
    return getattr(args, field_name) != default


def constructor_options(name: str, args: Any, default_betas: tuple[float, float]) -> dict[str, Any]:
    """Return the constructor's options as the training arguments ask for them, and log them.

    Betas come from `optim_args`, else from `--adam_beta1/2` where these were changed from their
    default, else from the optimizer itself: AdamW's defaults are not Sophia's. Sophia's other
    options are `AUTO_DEFAULTS` unless rho is a number.

    Args:
        name: `"sophia"`, `"adam"` or `"radam"`.
        args: The `TrainingArguments`.
        default_betas: The optimizer's own betas.

    Returns:
        Keyword arguments for the optimizer, `lr` included. Weight decay is left to the Trainer,
        which sets it for each parameter group.

    Raises:
        ValueError: As `parse_optim_args`.
    """
    options = parse_optim_args(name, args.optim_args)
    if name == "sophia" and (rho := options.get("rho", AUTO)) != AUTO:
        if unused := [option for option in _FOR_AUTO if option in options]:
            raise ValueError(
                f"optim_args {args.optim_args!r}: {', '.join(unused)} would have no effect with"
                f" rho={rho:g}, a threshold that stays as it is: leave rho out, or these"
            )
    elif name == "sophia":
        if options.get("rho_scope") == "group" and "embedding_clip_fraction" in options:
            raise ValueError(
                f"optim_args {args.optim_args!r}: embedding_clip_fraction needs a rho for each"
                " tensor, with rho_scope='group' there is one for all: leave one of the two out"
            )
        defaults = dict(AUTO_DEFAULTS)
        if options.get("rho_scope") == "group":
            del defaults["embedding_clip_fraction"]
            defaults["target_clip_fraction"] = SHARED_CLIP_FRACTION
        options = {**defaults, **options}
    betas, sources = [], []
    for index, own in enumerate(default_betas, start=1):
        beta, source = own, f"{name}'s default"
        if f"beta{index}" in options:
            beta, source = options.pop(f"beta{index}"), "optim_args"
        elif _changed(args, f"adam_beta{index}"):
            beta, source = getattr(args, f"adam_beta{index}"), f"--adam_beta{index}"
        betas.append(beta)
        sources.append(source)
    if _changed(args, "adam_epsilon"):
        if not OPTION_TABLES[name].eps_from_adam_epsilon:
            logger.warning(
                "--adam_epsilon %s is not used by %s, whose eps is a bound on the Hessian; set it"
                " with --optim_args eps=...",
                args.adam_epsilon,
                name,
            )
        else:
            options.setdefault("eps", args.adam_epsilon)
    result = {"lr": args.learning_rate, "betas": tuple(betas), **options}
    logger.info(
        "optimizer %s: %s (beta1 from %s, beta2 from %s; the rest: defaults)",
        name,
        ", ".join(f"{key}={value}" for key, value in result.items()),
        *sources,
    )
    return result
