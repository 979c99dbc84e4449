"""The Trainer that refreshes Sophia's Hessian: a mixin for any Trainer, and the plain one."""

import copy
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.trainer import Trainer
from transformers.trainer_seq2seq import Seq2SeqTrainer

from hf_sophia.optim import NonFiniteHessianError, Sophia
from hf_sophia.optim.sophia_options import AUTO
from hf_sophia.trainer.alignment import labels_are_aligned
from hf_sophia.trainer.checkpoints import WholeCheckpointsMixin
from hf_sophia.trainer.embeddings import give_embeddings_their_share
from hf_sophia.trainer.heads import (
    HeadOutput,
    NoLogitsError,
    base_model,
    head_output,
    shifts_labels,
)
from hf_sophia.trainer.health import HessianHealth
from hf_sophia.trainer.noise import noise_seed
from hf_sophia.trainer.own_pass import (
    agreed_counts,
    asking_for_logits,
    count_predictions,
    share_counts,
    twice_differentiable_attention,
    undisturbed,
    without_reentrance,
)
from hf_sophia.trainer.plan import DEFAULT_FRACTION, HessianPlan, make_plan
from hf_sophia.trainer.publishing import PublishingMixin
from hf_sophia.trainer.refresh import HessianRefresh
from hf_sophia.trainer.support import (
    check_supported,
    check_twice_differentiable,
    check_wrapped,
)
from hf_sophia.trainer.trainer_sophia import TrainerSophia

logger = logging.getLogger(__name__)


class SophiaTrainerMixin(PublishingMixin, WholeCheckpointsMixin):
    """Gives any `transformers.Trainer` the Hessian that `optim="sophia"` needs.

    Put it first among the bases: `class MyTrainer(SophiaTrainerMixin, SomeTrainer)`. On the steps
    where the optimizer's Hessian is due, the logits of the training forward pass are kept, labels
    are sampled from them and `hhat = sum G^2 / sum B` over the step's micro-batches is folded in,
    before the Trainer clips gradients and steps. The estimator owns its loss, so label smoothing,
    `num_items_in_batch`, gradient clipping and loss scaling do not reach it. With another optimizer
    the mixin leaves training and checkpoints alone; its model card and what it says of pushes to
    the Hub are for any.

    Adds to the logs: `sophia/clip_fraction` (share of coordinates clipped in the last step),
    `sophia/hessian_norm` (L2 norm of h), `sophia/rho` (geometric mean, what `rho=auto` has come to)
    and `sophia/hessian_tokens` (B of the last refresh).

    Where the graph of the training pass can't be used, and on request (`hessian_batch_fraction`), a
    forward pass of its own takes a share of the batch. Runs on one process, with
    DistributedDataParallel or with FSDP version 2; other set-ups are refused before the first step.
    """

    # The state of a run, on the class: there is no constructor, so that a Trainer that was made
    # without the mixin can take it on.
    _plan: HessianPlan | None = None
    _refresh: HessianRefresh | None = None
    _health: HessianHealth | None = None
    _hessian_tokens: int | None = None
    _left_out: bool = False
    _checked_model: torch.nn.Module | None = None

    @property
    def _sophia(self) -> Sophia | None:
        """The Sophia under accelerate's wrapper, or None with another optimizer."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer if isinstance(optimizer, Sophia) else None

    def _has_its_own(self, method: str) -> bool:
        """Whether a class of the user's, or this object, has put something in a method's place."""
        others = [cls for cls in type(self).__mro__ if cls not in (SophiaTrainerMixin, Trainer)]
        return any(method in vars(place) for place in (self, *others))

    def _keeps_checkpoints_whole(self) -> bool:
        if self.args.optim == "sophia" or self._sophia is not None:
            return True
        # Asked before training too, when it is not known yet what will be made.
        given = self.optimizer_cls_and_kwargs is not None
        return self.optimizer is None and (given or self._has_its_own("create_optimizer"))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, and refuse a Sophia run that would go wrong later.

        Raises:
            ValueError: The set-up is not supported; the message says what is.
        """
        # Called when training starts, also when it starts again with a smaller batch because a
        # step ran out of memory: what that step collected is of no use.
        self._refresh = self._plan = None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._sophia is not None:
            check_supported(self.args, self.accelerator)
        return optimizer

    def _make_plan(self, wrapped: torch.nn.Module, optimizer: Sophia) -> HessianPlan:
        """Choose the way to the Hessian for this run, and refuse models that leave none."""
        model = self._unwrapped(wrapped)
        check_supported(self.args, self.accelerator)
        check_wrapped(wrapped, model, self.accelerator)
        estimator = optimizer.param_groups[0]["hessian_computation_type"]
        if estimator == "hutchinson":
            check_twice_differentiable(self.args, wrapped, model)
        accumulated = self.args.gradient_accumulation_steps
        plan = make_plan(
            wrapped,
            model,
            estimator,
            self._asked_fraction(optimizer),
            accumulated,
            # TRL's option: what its hooks hold of a graph is gone after the first pass back.
            offloaded=getattr(self.args, "activation_offloading", False),
        )
        logger.info("Hessian by %s: %s", plan, plan.reason)
        self._health = HessianHealth(optimizer.param_groups[0]["k"], self.state.global_step + 1)
        return plan

    def _asked_fraction(self, optimizer: Sophia) -> float | None:
        # A script may have made a Sophia of its own, without the Trainer's options.
        asked = isinstance(optimizer, TrainerSophia) and optimizer.hessian_batch_fraction
        return asked or None

    def _unwrapped(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def sophia_head(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> HeadOutput:
        """Say what the loss counts: logits, targets aligned with them, and the likelihood.

        Override it for a model whose head is unknown or whose labels mean something else.

        Args:
            model: The unwrapped model.
            inputs: The micro-batch as the model got it, labels included.
            outputs: What the forward pass returned.

        Returns:
            A `hf_sophia.trainer.heads.HeadOutput`; only whether targets are -100 matters.

        Raises:
            ValueError: The head is unknown, or labels or logits are missing.
        """
        return head_output(model, inputs, outputs)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Do the Trainer's own step; where the Hessian is due, estimate it too.

        Args:
            model: The wrapped model.
            inputs: One micro-batch.
            num_items_in_batch: The predictions of all micro-batches of this step.

        Returns:
            The training loss of this micro-batch, detached.

        Raises:
            RuntimeError: A `compute_loss` further up kept the logits from being seen, or the true
                labels' loss is not the model's own.
            ValueError: The set-up, the head or the batch is not supported.
        """
        optimizer = self._sophia
        if optimizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"{type(self).__name__} trains on batches of its own making, a"
                f" {type(inputs).__name__}, whose loss Sophia does not know: use another optimizer"
            )
        if self._plan is None:
            self._plan = self._make_plan(model, optimizer)
        if isinstance(optimizer, TrainerSophia) and not optimizer.embeddings_known:
            # Not where it is made, which a Trainer may do in a way of its own.
            share = optimizer.embedding_clip_fraction
            give_embeddings_their_share(optimizer, self._unwrapped(model), share)
            optimizer.embeddings_known = True
        if not optimizer.hessian_due:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._refresh is None:
            scaler = self.accelerator.scaler
            self._refresh = HessianRefresh(
                (p for group in optimizer.param_groups for p in group["params"]),
                seed=self.args.seed,
                step=self.state.global_step,
                rank=self.args.process_index,
                estimator=self._plan.estimator,
                fraction=self._plan.fraction,
                kept=self._plan.kept,
                micro_batches=self._micro_batches,
                loss_scale=None if scaler is None else scaler.get_scale(),
            )
        refresh = self._refresh
        # A step may take things out of its inputs.
        refresh.batches.append(dict(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if refresh.missed_a_graph:
            self._go_on_without_graphs(refresh)
        if self.accelerator.sync_gradients:
            self._refresh = None
            self._estimate_in_own_passes(model, refresh)
            self._fold_in(optimizer, refresh)
        return loss

    @property
    def _micro_batches(self) -> int:
        # Transformers' loop says how many there are of the step at hand; not all loops are its own.
        nominal = self.args.gradient_accumulation_steps
        return getattr(self, "current_gradient_accumulation_steps", nominal)

    def _go_on_without_graphs(self, refresh: HessianRefresh) -> None:
        """Go over to passes of their own, where a share was asked for."""
        unreached = f"{type(self).__name__}.compute_loss did not reach SophiaTrainerMixin's"
        if self._plan.kept is not None:
            self._turn_to_own_pass(refresh, unreached)
            return
        raise RuntimeError(
            f"{unreached}, so the Hessian can't be refreshed: call super().compute_loss in the"
            " override and put SophiaTrainerMixin first among the bases, pass the loss as"
            " compute_loss_func, or ask for a Hessian pass of its own: --optim_args"
            f" hessian_batch_fraction={DEFAULT_FRACTION}"
        )

    def _estimate_in_own_passes(self, wrapped: torch.nn.Module, refresh: HessianRefresh) -> None:
        """Estimate on a share of the step's micro-batches, after their last backward pass.

        That is also when FSDP2 reduces gradients. Where memory is short the share is halved until
        it fits. Processes that make each pass together can't do that, as they may not all notice.
        """
        while refresh.fraction is not None:
            counts = share_counts(refresh.batches, refresh.fraction)
            if self._plan.sharded:
                counts = agreed_counts(counts, self.accelerator.device)
            try:
                for index, count in enumerate(counts):
                    if count:
                        self._estimate_in_own_pass(wrapped, refresh, index, count)
                return
            except RuntimeError as error:
                if self._plan.sharded or not should_reduce_batch_size(error):
                    raise
            # Out of the except clause: the exception would hold on to the graph.
            half = refresh.fraction / 2
            shrinks = sum(share_counts(refresh.batches, half)) < sum(counts)
            self._make_smaller(refresh, half if shrinks else None)

    def _make_smaller(self, refresh: HessianRefresh, fraction: float | None) -> None:
        """Drop what a refresh has collected when it ran out of memory, and choose a share."""
        refresh.start_over(fraction)
        clear_device_cache(garbage_collection=True)
        then = (
            "it is made again on a smaller share of the batch after the training pass, and so is"
            " every later one that does. Ask for less with --optim_args hessian_batch_fraction=..."
            if fraction is not None
            else "the batch can't be cut any smaller"
        )
        step = self.state.global_step + 1
        self._health.warn_once(
            "memory", "the Hessian refresh of step %d ran out of memory: %s", step, then
        )

    def _estimate_in_own_pass(
        self, wrapped: torch.nn.Module, refresh: HessianRefresh, index: int, examples: int
    ) -> None:
        """Estimate on part of a micro-batch, with a forward pass that training can't notice."""
        wrapped.train()
        model = self._unwrapped(wrapped)
        share = self._prepare_inputs(refresh.part(index, examples))
        dropout = noise_seed(refresh.place(index), "dropout")
        with undisturbed(model, dropout), self.compute_loss_context_manager():
            if self._plan.estimator == "hutchinson":
                with twice_differentiable_attention():
                    count = count_predictions(model, share)
                    refresh.add_loss(self._mean_loss(model, share), count, index)
                return
            given = dict(share)
            if self.label_smoother is not None or self.compute_loss_func is not None:
                # As in the training pass: the labels are for a loss outside of the model.
                given.pop("labels", None)
            # FSDP2 gathers parameters in hooks, the outermost of which may be the wrapper's.
            forward = wrapped if self._plan.sharded else model
            with without_reentrance(model):
                try:
                    outputs = forward(**given, **asking_for_logits(model))
                except (TypeError, ValueError, LookupError, AttributeError) as error:
                    if self._has_its_own("compute_loss"):
                        raise self._unlike_training(model, given, error) from error
                    raise
                head = self._checked_head(model, share, outputs, None)
                refresh.add_part(head, index, examples)

    def _unlike_training(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], error: Exception
    ) -> RuntimeError:
        """Say why a model may fail on a batch that it was not given like this in training."""
        return RuntimeError(
            f"the Hessian's own forward pass gives {type(model).__name__} the batch as the Trainer"
            f" has it, {sorted(inputs)}, which failed ({error}). If {type(self).__name__}'s"
            " compute_loss changes it first, do that in the data collator, or call"
            " super().compute_loss there and leave hessian_batch_fraction out"
        )

    def _mean_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the Trainer's loss as the mean over these inputs alone."""
        if self.compute_loss_func is None and not self._has_its_own("compute_loss"):
            return self.compute_loss(model, dict(inputs))
        # Code of the user's may rely on the number that training passes, or on its being None.
        alone = copy.copy(self)
        alone.args = copy.copy(self.args)
        alone.args.average_tokens_across_devices = False  # the count is of this process alone
        # The Trainer does not know it of all models, and counts their first labels.
        alone._loss_shifts_labels = shifts_labels(base_model(self._unwrapped(model)))
        items = alone._get_num_items_in_batch([inputs], self.args.device)
        # Where it is to be that of all processes, how many they are is made up for in the loss, by
        # the Trainer or by that code.
        if items is not None and self.args.average_tokens_across_devices:
            items = items * self.accelerator.num_processes
        return self.compute_loss(model, dict(inputs), num_items_in_batch=items)

    def _checked_head(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> HeadOutput:
        """Apply the head's adapter; until a batch has shown it to be right, check it."""
        head = self.sophia_head(model, inputs, outputs)
        if self._checked_model is not model and labels_are_aligned(
            model, head, inputs, outputs, num_items_in_batch, self.accelerator.num_processes
        ):
            self._checked_model = model
        return head

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the Trainer's own loss; during a refresh also use the logits it came from.

        Args:
            model: The wrapped model.
            inputs: One micro-batch.
            return_outputs: Return the model's outputs too.
            num_items_in_batch: The predictions of all micro-batches of this step.

        Returns:
            The loss, or the loss and the outputs.
        """
        # Evaluation comes through here as well, without gradients.
        refresh = self._refresh
        if refresh is None or not refresh.wants_graphs or not torch.is_grad_enabled():
            return super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        # Label smoothing and compute_loss_func take the labels out of the inputs.
        kept = dict(inputs)
        result = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        # An override further up may not know of outputs.
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        head = None
        if outputs is not None:
            with suppress(NoLogitsError):
                head = self._checked_head(self._unwrapped(model), kept, outputs, num_items_in_batch)
        if head is not None and head.logits.requires_grad:
            self._estimate_on_graph(refresh, head)
        else:
            # A fused loss, Liger's or TRL's, shows in what it returns only.
            self._turn_to_own_pass(refresh, "the training pass makes no logits with a graph")
        return (loss, outputs) if return_outputs else loss

    def _turn_to_own_pass(self, refresh: HessianRefresh, reason: str) -> None:
        fraction = self._asked_fraction(self._sophia) or DEFAULT_FRACTION
        self._plan = replace(self._plan, fraction=fraction, reason=reason, kept=None)
        logger.info("Hessian by %s: %s", self._plan, reason)
        refresh.start_over(fraction)

    def _estimate_on_graph(self, refresh: HessianRefresh, head: HeadOutput) -> None:
        once = False
        try:
            refresh.add_graph(head)
            return
        except RuntimeError as error:
            # torch.compile may have planned to reuse the graph's own memory in its one pass.
            once = "donated buffers" in str(error)
            if not once and not should_reduce_batch_size(error):
                raise
        # Out of the except clause: the exception would hold on to what did not fit.
        if once:
            self._turn_to_own_pass(refresh, "the compiled graph can be used only once")
        else:
            asked = self._asked_fraction(self._sophia) or DEFAULT_FRACTION
            self._make_smaller(refresh, min(asked, DEFAULT_FRACTION))

    def _fold_in(self, optimizer: Sophia, refresh: HessianRefresh) -> None:
        """Give the optimizer the step's estimate, or leave this refresh out and say why."""
        if self.accelerator.num_processes > 1:
            refresh.all_reduce()
        count = refresh.count
        step = self.state.global_step + 1
        try:
            if count:
                optimizer.update_hessian(refresh.estimate())
                self._hessian_tokens = count
                self._health.refreshed()
                return
        except NonFiniteHessianError:
            self._health.left_out(
                step,
                "not finite",
                "the Hessian estimate of step %d holds NaN or infinity and is discarded; the"
                " Hessian stays as it was",
            )
        else:
            self._health.left_out(
                step,
                "empty",
                "no label of the batch of step %d counts (all are -100), or memory did not last for"
                " one example: its Hessian refresh is left out",
            )
        optimizer.update_hessian({})
        self._left_out = True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Called after each step, before a checkpoint is written.
        optimizer = self._sophia
        if optimizer is not None and self._left_out:
            if optimizer.repeat_refresh():
                self._health.tried_again()
            self._left_out = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # A step on CUDA tells of a gradient that was not finite with the next one.
        if (optimizer := self._sophia) is not None:
            optimizer.check_finite()
        return super()._finalize_training(*args, **kwargs)

    def _hessian_facts(self) -> dict[str, Any]:
        optimizer = self._sophia
        if optimizer is None:
            return {}
        facts: dict[str, Any] = {}
        if self._plan is not None:
            facts["Hessian"] = str(self._plan)
        if self._hessian_tokens is not None:
            facts["B, predictions of the last refresh"] = f"{self._hessian_tokens:,}"
        if self._plan is not None and optimizer.param_groups[0]["rho"] == AUTO:
            facts["rho at the end (geometric mean)"] = f"{optimizer.mean_rho().item():.4g}"
        return facts

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the optimizer's metrics beside the training loss.

        Args:
            logs: The values to log; extended in place, as the Trainer does.
            *args: Passed on.
            **kwargs: Passed on.
        """
        optimizer = self._sophia
        if optimizer is not None and "loss" in logs:
            # One device sync for all of them.
            metrics = {
                "sophia/clip_fraction": optimizer.clip_fraction(),
                "sophia/hessian_norm": optimizer.hessian_norm(),
                "sophia/rho": optimizer.mean_rho(),
            }
            values = torch.stack([m.to(self.args.device) for m in metrics.values()]).tolist()
            logs.update(zip(metrics, values, strict=True))
            if self._health is not None:
                fixed = all(group["rho"] != AUTO for group in optimizer.param_groups)
                self._health.logged(values[0] if fixed else None, values[1])
            if self._hessian_tokens is not None:
                logs["sophia/hessian_tokens"] = float(self._hessian_tokens)
        super().log(logs, *args, **kwargs)


class SophiaTrainer(SophiaTrainerMixin, Trainer):
    """`transformers.Trainer` with the Hessian that `optim="sophia"` needs; same arguments.

    Example:
        ```python
        from transformers import TrainingArguments
        from hf_sophia import SophiaTrainer

        args = TrainingArguments("out", optim="sophia", learning_rate=1e-3, optim_args="rho=0.5")
        SophiaTrainer(model, args, train_dataset=dataset, data_collator=collator).train()
        ```

    References:
        Liu et al., "Sophia", 2023, arXiv 2305.14342, Algorithm 3.
    """


class SophiaSeq2SeqTrainer(SophiaTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with the Hessian that `optim="sophia"` needs; same arguments.

    Example:
        ```python
        from transformers import Seq2SeqTrainingArguments
        from hf_sophia import SophiaSeq2SeqTrainer

        args = Seq2SeqTrainingArguments("out", optim="sophia", predict_with_generate=True)
        SophiaSeq2SeqTrainer(model, args, train_dataset=dataset, data_collator=collator).train()
        ```
    """
