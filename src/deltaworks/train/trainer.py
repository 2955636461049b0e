"""An adapter under the Hugging Face Trainer, TRL's trainers and any other subclass: one mixin before the class.

::

    class DeltaSFT(dw.DeltaTrainerMixin, SFTTrainer): ...

    DeltaSFT(delta, args=..., train_dataset=...).train()
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import logging

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Run
from deltaworks.core.sharding import is_sharded, whole
from deltaworks.core.showing import shown
from deltaworks.store.checkpoint import resume
from deltaworks.train.devices import Team
from deltaworks.train.losses import frozen_head
from deltaworks.train.progress import show_bars
from deltaworks.train.reference import Reference
from deltaworks.train.sharding import decides, keep_whole, needs_whole

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

logger = logging.get_logger(__name__)


class DeltaTrainerMixin(Base):
    """What a subclass of ``transformers.Trainer`` needs for an adapter: its procedure, its groups, its checkpoints.

    The first argument is the adapter; all others are those of the trainer, without its model. Checkpoints hold the
    adapter with what its training needs, never the base; resuming from one continues as if nothing had happened.
    ``save_model`` writes the adapter alone. A trainer that compares with a reference model gets the model itself
    with the adapter disabled. Raises UserError for arguments that make no sense with an adapter.
    """

    def __init__(self, delta: Delta, *args: Any, **options: Any) -> None:
        if not isinstance(delta, Delta):
            raise UserError(
                f"{type(self).__name__} trains an adapter and was given a {type(delta).__name__}: "
                "its first argument is what dw.attach() returns"
            )
        if delta.state != "acting":
            mend = {"resting": f"dw.switch(model, {delta.name!r})", "merged": "unmerge() it", "detached": "attach it"}
            raise UserError(
                f"adapter {delta.name!r} is {delta.state}, so nothing would train: {mend[delta.state]} first"
            )
        self.delta = delta
        bound = inspect.signature(super().__init__).bind_partial(delta.model, *args, **options)
        if bound.arguments.get("peft_config") is not None:
            raise UserError("the adapter is trained, so there is nothing to do for peft_config: leave it out")
        if "ref_model" in bound.signature.parameters and bound.arguments.get("ref_model") is None:
            bound.arguments["ref_model"] = Reference(delta)
        forward = delta.model.__dict__.get("forward")
        with _as_it_is(delta):
            super().__init__(*bound.args, **bound.kwargs)
        if delta.model.__dict__.get("forward") is not forward:
            self._show_head()
        if getattr(self.args, "sync_ref_model", False) and isinstance(getattr(self, "ref_model", None), Reference):
            raise UserError("sync_ref_model updates a second model: pass it as ref_model=, or leave sync_ref_model out")
        if self.is_fsdp_enabled:
            self._prepare_sharding()
        if self.is_deepspeed_enabled and decides(delta):
            raise UserError(f"{delta.config} acts on gradients, which DeepSpeed keeps to itself: train it with FSDP2")
        self.add_callback(_Clock(self))
        show_bars(self)
        kind: Any = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and kind.get("use_reentrant"):
            # the reentrant kind gives no gradient where no input of a block asks for one
            delta.model.enable_input_require_grads()  # type: ignore[operator]

    def _show_head(self) -> None:
        """The trainer has given the model a forward of its own, which reads the weight of the output layer itself."""
        model: Any = self.delta.model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        mine = [pair for item in self.delta.attached for pair in item.all if model.get_submodule(pair[0].path) is head]
        if any(tuner.form() == 3 for _, tuner in mine):
            raise UserError(
                f"{type(self).__name__} multiplies by the weight of {mine[0][0].path!r} itself, which "
                f"{self.delta.config} leaves as it is: leave it out of the targets"
            )
        if mine:
            forward = model.forward

            @functools.wraps(forward)
            def with_head(*args: Any, **kwargs: Any) -> Any:
                with shown(head):
                    return forward(*args, **kwargs)

            model.forward = with_head

    def _prepare_sharding(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError("adapters are trained with FSDP2, and this is FSDP1: set fsdp_version=2")
        if self.label_smoother is not None:
            raise UserError(
                "transformers does not know a model that FSDP2 has sharded as a language model, and would smooth the "
                "labels of the wrong tokens: leave label_smoothing_factor out"
            )
        self.replicated = needs_whole(self.delta)
        if self.replicated:
            keep_whole(self.delta, plugin)

    @property
    def team(self) -> Team:
        """The processes of this run."""
        return Team(self.args.process_index, self.args.world_size, self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimizer over the adapter's groups, after the procedure has begun. Raises UserError for odd kinds."""
        if self.optimizer is None:
            self._begin()
            made = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            if {"params", "model", "optimizer_dict"} & set(made[1]):
                raise UserError(
                    f"the optimizer {self.args.optim} chooses its own parameters: take one such as adamw_torch"
                )
            groups = self.delta.parameter_groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = made[0](groups, **made[1])
            self.delta.procedure.optimizing(self.optimizer)
        return self.optimizer

    def _begin(self) -> None:
        loss_of_trainer = super().compute_loss

        def loss_of(model: Any, batch: Any) -> Tensor:
            with self.compute_loss_context_manager(), self._head(model, batch):
                loss = loss_of_trainer(model, self._prepare_inputs(batch))
            assert isinstance(loss, Tensor)
            return loss

        with torch.random.fork_rng():  # the data order is the same with and without calibration
            self.delta.procedure.begin(Run(self.state.max_steps, _Batches(self), loss_of, one_by_one=_Singles(self)))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; in training with the procedure's own terms, averaged over accumulation steps."""
        with self._head(model, inputs, return_outputs):
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        full = self.delta.procedure.loss(loss)
        if full is not loss and self._is_scaled(num_items_in_batch):
            full = loss + (full - loss) / self.current_gradient_accumulation_steps
        return (full, outputs) if return_outputs else full

    def _head(self, model: Any, inputs: Any, return_outputs: bool = False) -> AbstractContextManager[None]:
        """Chunks of the frozen head, where this is transformers' own loss and nobody sees the logits."""
        own = inspect.unwrap(super().compute_loss).__func__ is Trainer.compute_loss  # type: ignore[attr-defined]
        logits = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        copied = self.args.n_gpu > 1 or isinstance(model, torch._dynamo.OptimizedModule)
        plain = not own or logits or copied or "labels" not in inputs
        return nullcontext() if plain else frozen_head(self.delta.model)

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss of a batch is its share of an accumulated one already (as in ``training_step``)."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return accepts or self.compute_loss_func is not None if said is None else bool(said)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """One pass forward and backward; a whole adapter beside a sharded base gets the mean of the gradients."""
        loss = super().training_step(*args, **options)
        if self.replicated and self.accelerator.sync_gradients:
            self.team.average(self.delta.parameters())
        return loss

    replicated = False  # the adapter is whole in every process, though FSDP2 shards the base
    readable_by_peft = True  # until peft's format is found not to express the adapter

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, in a checkpoint with the state of its training; for peft as well, where peft can read it.

        A folder of both formats is loaded from ours.
        """
        folder = output_dir or str(self.args.output_dir)
        if self.args.should_save or is_sharded(self.delta):  # all processes have a part of a sharded one
            with whole(self.delta) as writes:
                if writes:
                    self.delta.save(folder, training=_internal_call)
                    self._save_for_peft(folder)
        if _internal_call:
            return
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_for_peft(self, folder: str) -> None:
        if not self.readable_by_peft:
            return
        try:
            self.delta.save(folder, format="peft")
        except UserError as error:
            self.readable_by_peft = False
            logger.info(f"checkpoints are not written for peft: {error}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        # without the sharded base, which transformers would write beside it
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        resume(self.delta, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint and os.path.isdir(self.state.best_model_checkpoint):
            resume(self.delta, self.state.best_model_checkpoint)


class DeltaTrainer(DeltaTrainerMixin, Trainer):
    """``transformers.Trainer`` for an adapter: ``DeltaTrainer(delta, args=..., train_dataset=...)``."""


@contextmanager
def _as_it_is(delta: Delta) -> Iterator[None]:
    """What trainers do to adapters that they do not know, undone: masters stay float32, a quantized base may train."""
    masters = [(parameter, parameter.data) for parameter in delta.parameters()]
    mark = "_hf_peft_config_loaded"  # without it transformers trains no quantized model
    before = delta.model.__dict__.get(mark)
    setattr(delta.model, mark, True)
    try:
        yield
    finally:
        delattr(delta.model, mark)
        if before is not None:
            setattr(delta.model, mark, before)
    for parameter, values in masters:
        if parameter.dtype != values.dtype:
            parameter.data = values.to(parameter.device)


class _Batches:
    """The training batches; where several processes share the work, those of the first one, in all of them."""

    def __init__(self, trainer: DeltaTrainerMixin) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        team = self.trainer.team
        for batch in self.trainer.get_train_dataloader():
            yield team.of_main(lambda batch=batch: batch)  # type: ignore[misc]


class _Singles:
    """The training examples as batches of one."""

    def __init__(self, trainer: DeltaTrainerMixin) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        trainer, data = self.trainer, cast(Any, self.trainer.train_dataset)
        return (trainer._prepare_inputs(trainer.data_collator([data[index]])) for index in range(len(data)))


class _Clock(TrainerCallback):
    """Calls the procedure's hooks at the Trainer's moments."""

    def __init__(self, trainer: DeltaTrainerMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not args.max_grad_norm:  # clipping has unscaled the gradients otherwise
            self.trainer.accelerator.unscale_gradients()
        self.trainer.delta.procedure.gradients()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # by a loss scaler, for an overflow
            self.trainer.delta.procedure.stepped()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not is_sharded(self.trainer.delta):
            self.trainer.team.check(self.trainer.delta)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.delta.procedure.end()
