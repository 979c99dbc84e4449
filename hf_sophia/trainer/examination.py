"""Look at a training run before it starts: what Sophia would do there, and what would go wrong.

The Trainer's own steps are taken with a learning rate of 0: the same batches, wrapper, precision,
accumulation and gradient clipping, but no parameter moves. m and h are then those of a training
run's first steps, from which the clipping for any rho follows.
"""

import copy
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from transformers.trainer import Trainer
from transformers.trainer_callback import DefaultFlowCallback, TrainerCallback
from transformers.trainer_utils import has_length

from hf_sophia.optim import Sophia
from hf_sophia.optim.threshold import CoordinateSample
from hf_sophia.trainer.asked import not_shared, optimizer_of, options_of
from hf_sophia.trainer.diagnosis import Curvature, Diagnosis, Finding, Sample
from hf_sophia.trainer.findings import judge
from hf_sophia.trainer.heads import HeadOutput
from hf_sophia.trainer.held import generators_held, held
from hf_sophia.trainer.options import AUTO, AUTO_DEFAULTS
from hf_sophia.trainer.own_pass import undisturbed
from hf_sophia.trainer.sophia_trainer import SophiaTrainerMixin
from hf_sophia.trainer.trainer_sophia import TrainerSophia

#: Steps between refreshes while looking: half of the steps have one, half show what is extra.
_K = 2

#: Of these, the first two allocate.
_FEWEST = 4

#: The betas that Sophia has unless the arguments say otherwise.
_BETAS = (0.9, 0.95)

#: The shares to clip that recommendations aim at, unless others are asked for.
_SHARES = {
    "target_clip_fraction": AUTO_DEFAULTS["target_clip_fraction"],
    "embedding_clip_fraction": AUTO_DEFAULTS["embedding_clip_fraction"],
    "rho_scope": "tensor",
}


def diagnose(
    trainer: SophiaTrainerMixin, steps: int | None = None, adamw_lr: float | None = None
) -> Diagnosis:
    """Take steps with a learning rate of 0 and say what Sophia would do in this run.

    The Trainer can train afterwards as if nothing had been: parameters, buffers, random numbers,
    arguments, callbacks, optimizer and scheduler are as before. Rows that were read from an
    iterator, which can be read once only, are gone.

    Args:
        trainer: A `SophiaTrainer` or another with the mixin, on one process, that has not trained.
        steps: Optimizer steps to take, at least 4; None: 20, or `2 / (1 - beta1)` where that is
            more, after which the noise of m is what it will be in training; of a stream no more
            than the run's `max_steps`.
        adamw_lr: A learning rate that is known to be good for AdamW; None: the one of the
            arguments, where they name an AdamW.

    Returns:
        What was found. That the run would fail is a finding too.

    Raises:
        ValueError: The Trainer has no mixin, is one of several processes, or has no data; or there
            are too few steps; adamw_lr is no learning rate.
    """
    if not isinstance(trainer, SophiaTrainerMixin):
        raise ValueError(
            f"diagnose needs a SophiaTrainer or another Trainer with SophiaTrainerMixin, got"
            f" {type(trainer).__name__}"
        )
    if trainer.args.world_size > 1:
        raise ValueError(
            f"the doctor looks at one process, this is one of {trainer.args.world_size}: start it"
            " without torchrun or accelerate launch"
        )
    if trainer.train_dataset is None:
        raise ValueError("the Trainer has no train_dataset to take batches from")
    if adamw_lr is not None and not 0.0 < adamw_lr < math.inf:
        raise ValueError(f"adamw_lr must be > 0 and finite, got {adamw_lr}")
    if steps is not None and steps < _FEWEST:
        raise ValueError(f"steps must be at least {_FEWEST}, got {steps}")
    name = getattr(trainer.args.optim, "value", trainer.args.optim)
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {param: param.requires_grad for param in model.parameters()}
    diagnosis = Diagnosis(type(model).__name__)
    diagnosis.adamw_lr = adamw_lr
    if adamw_lr is None and name.startswith("adamw"):
        diagnosis.adamw_lr = trainer.args.learning_rate
    # What is recommended, where something else is asked for.
    asked: dict[str, Any] = {"betas": _BETAS, **AUTO_DEFAULTS}
    watch = _Watch(trainer, model)
    targets: dict[torch.Tensor, float] = {}
    try:
        with undisturbed(model, trainer.args.seed):
            optimizer = optimizer_of(trainer, name)
        size = sum(param.numel() for param in model.parameters() if param.requires_grad)
        diagnosis.model += f", {size:,} trained parameters"
        if size == 0:
            raise ValueError(
                "the model has no parameter to train: requires_grad is False for all of them."
                " Unfreeze what shall train"
            )
        if optimizer is not None:
            for message in not_shared(optimizer, model):
                diagnosis.findings.append(Finding("warning", message))
        if isinstance(optimizer, Sophia):
            asked = options_of(optimizer)
            diagnosis.rho, diagnosis.k = asked["rho"], asked["k"]
            if diagnosis.rho == AUTO and not isinstance(optimizer, TrainerSophia):
                targets = {
                    param: optimizer.clip_fraction_asked(param, group)
                    for group in optimizer.param_groups
                    for param in group["params"]
                }
        if diagnosis.rho == AUTO:
            diagnosis.rho_scope = asked.get("rho_scope", diagnosis.rho_scope)
            if diagnosis.rho_scope == "group":
                diagnosis.target = asked["target_clip_fraction"]
        diagnosis.nesterov = asked.get("nesterov", False)
        diagnosis.estimator = asked.get("hessian_computation_type", diagnosis.estimator)
        steps = steps or _enough_steps(asked["betas"][0], trainer)
        # With a number for rho, what is said of rho=auto is of its defaults.
        shares = {} if diagnosis.rho == AUTO else _SHARES
        options = asked | shares | {"lr": 0.0, "k": _K, "rho": 1.0, "bias_correction": True}
        with _looking(trainer, options, steps, watch, diagnosis.findings):
            trainer.train()
            _collect(diagnosis, trainer._sophia, watch, targets)
    except Exception as error:
        # Whatever it is would have ended the run.
        kind = "" if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: "
        diagnosis.findings.append(Finding("error", f"{kind}{error}"))
    finally:
        for param, trains in trained.items():
            param.requires_grad_(trains)
    diagnosis.head, diagnosis.way, diagnosis.tokens = watch.head, watch.way, watch.tokens
    if not diagnosis.failed:
        judge(diagnosis, trainer, optimizer, asked)
    return diagnosis


def _enough_steps(beta1: float, trainer: SophiaTrainerMixin) -> int:
    """Return the steps after which m is as noisy as in training, if there are rows for them.

    Args:
        beta1: What m keeps in a step.
        trainer: What takes the steps.
    """
    enough, most = max(20, round(2.0 / (1.0 - beta1))), trainer.args.max_steps
    if has_length(trainer.train_dataset) or most <= 0:
        return enough
    return max(_FEWEST, min(enough, most))  # a stream may have just the rows of the run


class _Watch(TrainerCallback):
    """Times steps, and keeps the last gradients at the sampled coordinates."""

    def __init__(self, trainer: SophiaTrainerMixin, model: torch.nn.Module) -> None:
        self._trainer = trainer
        self._model = model
        self.params: dict[torch.Tensor, str] = {}
        self.samples: dict[torch.Tensor, CoordinateSample] = {}
        self.last: dict[torch.Tensor, torch.Tensor] = {}
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.tokens: list[int] = []
        self.head: str | None = None
        self.way: str | None = None
        self._device = next(model.parameters(), torch.zeros(())).device

    def _clock(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        named = self._model.named_parameters()
        self.params = {param: name for name, param in named if param.requires_grad}
        self.samples = {param: CoordinateSample(param) for param in self.params}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._began = self._clock()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for group in self._trainer._sophia.param_groups:
            group["lr"] = 0.0  # a training_step may have a schedule of its own
        for param, sample in self.samples.items():
            if param.grad is not None:
                self.last[param] = sample.take(param.grad).float()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self._clock() - self._began)
        if len(self.seconds) % _K == 1 and self._trainer._hessian_tokens:
            self.tokens.append(self._trainer._hessian_tokens)
        if self._device.type == "cuda":
            self.bytes.append(torch.cuda.max_memory_allocated(self._device))


@contextmanager
def _looking(
    trainer: SophiaTrainerMixin,
    options: dict[str, Any],
    steps: int,
    watch: _Watch,
    findings: list[Finding],
) -> Iterator[None]:
    """Let a Trainer take steps that leave no trace; what it warns of becomes findings."""
    args = copy.copy(trainer.args)
    for name, value in {
        "max_steps": steps,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "auto_find_batch_size": False,
        "eval_on_start": False,
        "disable_tqdm": True,
    }.items():
        setattr(args, name, value)
    replaced = {
        "args": args,
        "optimizer": None,
        "lr_scheduler": None,
        "model_init": None,
        "optimizer_cls_and_kwargs": (TrainerSophia, options),
        # Transformers' own: one of the user's would make an optimizer that moves the parameters.
        **{
            name: MethodType(getattr(Trainer, name), trainer)
            for name in ("create_optimizer", "create_scheduler")
        },
        "sophia_head": _spied(trainer, watch),
        "log": lambda *args, **kwargs: None,
        "state": copy.deepcopy(trainer.state),
        "control": copy.copy(trainer.control),
    }
    accelerator = trainer.accelerator
    scaler = accelerator.scaler and accelerator.scaler.state_dict()
    grads = {param: param.grad for param in trainer.model.parameters()}
    training = trainer.model.training
    listener = _Listener(findings)
    logger = logging.getLogger("hf_sophia")
    logger.addHandler(listener)
    try:
        with (
            held(trainer, trainer.callback_handler, accelerator, trainer.data_collator),
            generators_held(trainer.train_dataset),
        ):
            vars(trainer).update(replaced)
            trainer.callback_handler.callbacks = [DefaultFlowCallback(), watch]
            try:
                with undisturbed(accelerator.unwrap_model(trainer.model), trainer.args.seed):
                    yield
            finally:
                watch.way = trainer._plan and f"{trainer._plan}: {trainer._plan.reason}"
    finally:
        logger.removeHandler(listener)
        if scaler:
            accelerator.scaler.load_state_dict(scaler)
        trainer.model.train(training)
        for param, grad in grads.items():
            param.grad = grad


def _spied(trainer: SophiaTrainerMixin, watch: _Watch) -> Callable[..., HeadOutput]:
    """Return the Trainer's `sophia_head` that also notes what it found."""

    def sophia_head(*args: Any) -> HeadOutput:
        head = type(trainer).sophia_head(trainer, *args)
        watch.head = f"{head.likelihood}, logits of shape {tuple(head.logits.shape)}"
        return head

    return sophia_head


class _Listener(logging.Handler):
    """Turns what the package warns of into findings."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__(logging.WARNING)
        self._findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        finding = Finding("warning", record.getMessage())
        if finding not in self._findings:
            self._findings.append(finding)


@torch.no_grad()
def _collect(
    diagnosis: Diagnosis,
    optimizer: TrainerSophia,
    watch: _Watch,
    targets: Mapping[torch.Tensor, float],
) -> None:
    """Take the sampled coordinates out of the optimizer's state, and the times.

    Args:
        diagnosis: Where to.
        optimizer: The one that took the steps.
        watch: What saw them.
        targets: The share to clip of parameters that the Trainer's own optimizer has one for.
    """
    if not watch.tokens:
        raise ValueError(
            "no refresh has succeeded, for the reasons in the warnings: Sophia would have no"
            " curvature"
        )
    steps = len(watch.seconds)
    by_kind: dict[str, Curvature] = {}
    for index, group in enumerate(optimizer.param_groups):
        beta1 = group["betas"][0]
        for param in group["params"]:
            kind = re.sub(r"\.\d+(?=\.|$)", ".*", watch.params[param])
            found = by_kind.setdefault(kind, Curvature(kind, 0, []))
            size = found.size + param.numel()
            by_kind[kind] = Curvature(kind, size, found.tensors)
            if param not in watch.last:
                continue
            sample, state = watch.samples[param], optimizer.state[param]
            m = sample.take(state["exp_avg"]).float() / (1.0 - beta1**steps)
            n = m.lerp(watch.last[param], 1.0 - beta1) if diagnosis.nesterov else m
            h = sample.take(state["hessian"]).float().cpu() / (group["hessian_weight"] or 1.0)
            weight = param.numel() / max(sample.size, 1)
            eps = group["eps"]
            target = targets.get(param) or optimizer.clip_fraction_asked(param, group)
            n, m = n.abs().cpu(), m.abs().cpu()
            negative, h = h < 0.0, h.clamp(min=eps)
            found.tensors.append(Sample(n, m, h, negative, weight, eps, index, target))
    diagnosis.curvatures = list(by_kind.values())
    size = sum(curvature.size for curvature in diagnosis.curvatures)
    diagnosis.not_fused = {why: n / size for why, n in optimizer.not_fused().items()}
    # The first two steps allocate, and choose kernels.
    refreshing = [s for i, s in enumerate(watch.seconds) if i >= 2 and i % _K == 0]
    plain = [s for i, s in enumerate(watch.seconds) if i >= 2 and i % _K]
    diagnosis.refresh_seconds = statistics.median(refreshing)
    diagnosis.plain_seconds = statistics.median(plain)
    if watch.bytes:
        diagnosis.refresh_bytes = max(watch.bytes[0::_K])
        diagnosis.plain_bytes = max(watch.bytes[1::_K])
