"""The runs of a comparison: what waits for what, where it is made, and a record for however it ends."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaworks.store.records import Record, read_record
from deltaworks.train.data import Data
from deltaworks.train.recipe import Recipe
from deltaworks.train.recording import failed_record

PATIENCE = 5.0  # seconds that a stopped run gets to end by itself
KEPT_RESULTS = ("finished", "diverged")  # a failed or interrupted run is made again


@dataclass(eq=False)
class Job:
    """One run to be made. ``facts`` are the fields of its record that are known before it starts.

    ``searcher`` is the run whose search chooses the learning rate of this one.
    """

    run_id: str
    recipe: Recipe
    facts: dict[str, Any]
    data: Data
    searcher: Job | None = None
    message: str = ""
    started: float = 0.0
    record: Record | None = None

    @property
    def world(self) -> str:
        return f"{self.data.name} with {self.recipe.model}"

    @property
    def label(self) -> str:
        return f"{self.facts['method']}" + (f" (seed {self.recipe.seed})" if self.recipe.seed else "")

    @property
    def ready(self) -> bool:
        return self.searcher is None or self.searcher.record is not None

    @property
    def hindrance(self) -> str:
        """Why a run that is ready cannot be made: the search that it waited for found no rate."""
        found = self.searcher.record if self.searcher is not None else None
        if found is None or found.status == "finished":
            return ""
        return f"not run, since the search with seed {found.seed} {found.status}: {found.message}"

    def final_recipe(self) -> Recipe:
        """The recipe with the rate that the searcher chose."""
        found = self.searcher.record if self.searcher is not None else None
        return self.recipe if found is None else self.recipe.model_copy(update={"chosen_rate": found.learning_rate})


@dataclass
class Event:
    """What a run said (``said`` is the worker's line), or that it ended (``said`` is None)."""

    job: Job
    said: dict[str, Any] | None


class Engine(ABC):
    """Where runs are made. A run that fails raises nothing here: it ends without a record, its message says why."""

    capacity: int
    """Runs side by side."""

    @abstractmethod
    def start(self, job: Job, recipe: Recipe) -> None:
        """Begin a run; its record will be written to the folder of records."""

    @abstractmethod
    def heard(self) -> list[Event]:
        """What the runs said, and which ended, since the last call; waits a moment for something."""

    @abstractmethod
    def stop(self, jobs: Sequence[Job]) -> None:
        """End these runs now, and wait until they have ended."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more will be asked for."""


@dataclass
class Crew:
    """Makes runs in the folder of a comparison, as many side by side as an engine has room for."""

    folder: Path
    run_seconds: float | None = None
    running: list[Job] = field(default_factory=list)

    @property
    def records(self) -> Path:
        return self.folder / "records"

    def finished(self, job: Job) -> Record | None:
        """The record of a run that need not be made again."""
        path = self.records / f"{job.run_id}.json"
        record = read_record(path) if path.is_file() else None
        return record if record is not None and record.status in KEPT_RESULTS else None

    def run(self, jobs: Sequence[Job], engine: Engine, tell: Callable[[Event], None]) -> None:
        """Make all the runs; ``tell`` hears every event. On an interruption every run is stopped first."""
        waiting = list(jobs)
        try:
            while waiting or self.running:
                self._begin(waiting, engine, tell)
                for event in engine.heard():
                    if event.said is None:
                        self.running.remove(event.job)
                        self._conclude(event.job)
                    elif event.said.get("event") == "failed":
                        event.job.message = event.said.get("message", "")
                    tell(event)
                self._stop_late(engine)
        finally:
            engine.stop(self.running)
            self.running = []
            engine.close()

    def _begin(self, waiting: list[Job], engine: Engine, tell: Callable[[Event], None]) -> None:
        """Start what is ready, in order, while there is room; what cannot be made becomes a record that says so."""
        for job in [job for job in waiting if job.ready]:
            if job.hindrance:
                job.message = job.hindrance
                self._conclude(job)
                tell(Event(job, None))
            elif len(self.running) < engine.capacity:
                job.started = time.monotonic()
                self.running.append(job)
                engine.start(job, job.final_recipe())
            else:
                break
            waiting.remove(job)

    def _conclude(self, job: Job) -> None:
        job.record = self.finished(job)
        if job.record is None:
            job.record = failed_record(job.facts, job.message or "the run ended and said nothing")
            job.record.wall_seconds = time.monotonic() - job.started if job.started else None
            job.record.write(self.records)

    def _stop_late(self, engine: Engine) -> None:
        for job in self.running:
            if self.run_seconds and not job.message and time.monotonic() - job.started > self.run_seconds:
                job.message = f"stopped after {self.run_seconds:g} seconds, the limit of the comparison"
                engine.stop([job])
