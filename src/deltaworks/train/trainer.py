"""The Hugging Face Trainer with an adapter: its procedure's hooks, its parameter groups, its checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Run
from deltaworks.store.checkpoint import resume


class DeltaTrainer(Trainer):
    """``transformers.Trainer`` for an adapter: ``DeltaTrainer(delta, args=..., train_dataset=...)``.

    Checkpoints hold the adapter with what its training needs, never the base; resuming from one continues as if
    nothing had happened. ``save_model`` writes the adapter alone.
    """

    def __init__(self, delta: Delta, args: Any = None, **options: Any) -> None:
        super().__init__(delta.model, args, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "DeltaTrainer saves adapters of whole models: FSDP and DeepSpeed shard them, leave them out"
            )
        self.delta = delta
        self.add_callback(_Clock(self))
        kind: Any = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and kind.get("use_reentrant"):
            # the reentrant kind gives no gradient where no input of a block asks for one
            delta.model.enable_input_require_grads()  # type: ignore[operator]

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
        trainer = self

        class Singles:
            def __iter__(self) -> Any:
                collate, data = trainer.data_collator, trainer.train_dataset
                return (trainer._prepare_inputs(collate([data[index]])) for index in range(len(data)))  # type: ignore

        def loss_of(model: Any, batch: Any) -> Tensor:
            with self.compute_loss_context_manager():
                loss = Trainer.compute_loss(self, model, self._prepare_inputs(batch))
            assert isinstance(loss, Tensor)
            return loss

        with torch.random.fork_rng():  # the data order is the same with and without calibration
            self.delta.procedure.begin(
                Run(self.state.max_steps, self.get_train_dataloader(), loss_of, one_by_one=Singles())
            )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; in training with the procedure's own terms, averaged over accumulation steps."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        whole = self.delta.procedure.loss(loss)
        if whole is not loss and self._is_scaled(num_items_in_batch):
            whole = loss + (whole - loss) / self.current_gradient_accumulation_steps
        return (whole, outputs) if return_outputs else whole

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss of a batch is its share of an accumulated one already (as in ``training_step``)."""
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return accepts or self.compute_loss_func is not None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; in a checkpoint with the state of its training."""
        if self.args.should_save:
            folder = output_dir or str(self.args.output_dir)
            self.delta.save(folder, training=_internal_call)
            if self.processing_class is not None and not _internal_call:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        resume(self.delta, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint and os.path.isdir(self.state.best_model_checkpoint):
            resume(self.delta, self.state.best_model_checkpoint)


class _Clock(TrainerCallback):
    """Calls the procedure's hooks at the Trainer's moments."""

    def __init__(self, trainer: DeltaTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not args.max_grad_norm:  # clipping has unscaled the gradients otherwise
            self.trainer.accelerator.unscale_gradients()
        self.trainer.delta.procedure.gradients()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # by a loss scaler, for an overflow
            self.trainer.delta.procedure.stepped()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.delta.procedure.end()
