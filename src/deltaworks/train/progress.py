"""What a Trainer shows while it works: a bar in a terminal, and a line for each log anywhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import TaskID
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from deltaworks.train.bars import bars


def show_bars(trainer: Trainer) -> None:
    """Put our bars in the place of the Trainer's own, where it would show any (``disable_tqdm``, notebooks)."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bars())


class Bars(TrainerCallback):
    """Training, and evaluation below it, on the process that is seen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress = bars(self.console)
        self.training: TaskID | None = None
        self.testing: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start()
            self.training = self.progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, note=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.training is not None:
            self.progress.update(self.training, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if not (state.is_world_process_zero and has_length(eval_dataloader)):
            return
        if self.testing is None:
            self.progress.start()
            self.testing = self.progress.add_task("evaluation", total=len(eval_dataloader), note="")
        self.progress.advance(self.testing)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end_of_testing()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._end_of_testing()

    def _end_of_testing(self) -> None:
        if self.testing is not None:
            self.progress.remove_task(self.testing)
            self.testing = None
        if self.training is None:
            self.progress.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        shown = {key: _number(value) for key, value in (logs or {}).items() if key != "total_flos"}
        if self.training is not None and "loss" in shown:
            self.progress.update(self.training, note=f"loss {shown['loss']}")
        words = ", ".join(f"{key} {value}" for key, value in shown.items())
        self.console.print(f"step {state.global_step}: {words}", highlight=False, markup=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.training is not None:
            self.progress.remove_task(self.training)
            self.training = None
        self.progress.stop()


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
