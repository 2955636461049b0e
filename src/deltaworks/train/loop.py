"""One training run in this process: the rates of a recipe tried, the best one chosen, everything measured."""

from __future__ import annotations

import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltaworks.store.records import Record, Trial, Validation, versions
from deltaworks.train import measure
from deltaworks.train.data import Data
from deltaworks.train.devices import Team
from deltaworks.train.examine import examine, per_second
from deltaworks.train.fitting import Tell
from deltaworks.train.recipe import Recipe
from deltaworks.train.recording import facts_of
from deltaworks.train.search import choose, search
from deltaworks.train.stage import prepare


def train(
    recipe: Recipe,
    *,
    data: Data | None = None,
    team: Team | None = None,
    adapter: Path | None = None,
    tell: Tell = lambda event: None,
) -> Record:
    """Train as the recipe says and return the record; a run that diverges is one with that status.

    Every rate is trained from the same start on the training split; the best on validation is kept (never the
    test split) and tested once. ``adapter`` is the folder where it is saved; without one it is not kept. ``team`` are
    the processes that share the work; all of them return the record. ``tell`` gets progress as dictionaries. Raises
    UserError for what the user can mend, before the training begins.
    """
    began, clock, work = datetime.now(UTC), time.perf_counter(), time.process_time()
    stage = prepare(recipe, data, team)
    tell({"event": "prepared", "steps": stage.steps, "rates": recipe.trained_rates(stage.config)})
    cuda = stage.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="deltaworks-") as scratch:
        folder = adapter or Path(scratch) / "adapter"
        trials = search(stage, folder, tell)
        best = choose(trials)
        fields: dict[str, Any] = {
            **facts_of(recipe, stage.config, stage.data, stage.loaded, stage.steps),
            "learning_rates": [
                Trial(rate=trial.rate, score=trial.score, stopped_at=trial.stopped_at) for trial in trials
            ],
            "learning_rate": best.rate,
            "learning_rate_split": "validation" if stage.validation else "",
            "examples": best.examples,
            "curve": best.curve,
            "peak_memory_bytes": best.peak_memory,
            "peak_memory_includes": (measure.INCLUDES_CUDA if cuda else measure.INCLUDES_TENSORS) + stage.team.words,
            "saved_activation_bytes": best.activations,
            "training_samples_per_second": per_second(best.timed_samples, best.timed_seconds),
            "training_tokens_per_second": per_second(best.timed_tokens, best.timed_seconds),
            "process_peak_bytes": measure.process_peak_bytes(),
            "details": best.details,
            "hardware": measure.hardware(stage.device) + stage.team.words,
            "versions": versions(),
            "started": began,
        }
        if best.diverged:
            fields |= {"status": "diverged", "message": best.diverged}
        else:
            fields |= {"status": "finished", **stage.team.of_main(lambda: examine(stage, folder, tell))}
            scores = [point.validation for point in best.curve if point.validation is not None]
            fields["validation"] = Validation(last=best.score, best=max(scores, default=best.score))
    fields |= {
        "finished": datetime.now(UTC),
        "wall_seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - work,
    }
    return Record(**fields)
