"""The runs of a comparison as processes: started, listened to, and turned into records however they end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaworks.store.files import write_atomically
from deltaworks.store.records import Record, read_record
from deltaworks.train.recipe import Recipe
from deltaworks.train.recording import failed_record

PATIENCE = 5.0  # seconds that a stopped run gets to end by itself
KEPT_RESULTS = ("finished", "diverged")  # a failed or interrupted run is made again


@dataclass
class Job:
    """One run to be made. ``facts`` are the fields of its record that are known before it starts."""

    run_id: str
    recipe: Recipe
    facts: dict[str, Any]
    process: subprocess.Popen[str] | None = None
    message: str = ""
    started: float = 0.0
    record: Record | None = None

    @property
    def label(self) -> str:
        return f"{self.facts['method']}" + (f" (seed {self.recipe.seed})" if self.recipe.seed else "")


@dataclass
class Event:
    """What a run said (``said`` is the worker's line), or that it ended (``said`` is None)."""

    job: Job
    said: dict[str, Any] | None


@dataclass
class Crew:
    """At most ``workers`` runs side by side, each a process of its own, in the folder of a comparison."""

    folder: Path
    workers: int
    prepared: Path | None
    keep_adapters: bool = False
    run_seconds: float | None = None
    running: list[Job] = field(default_factory=list)
    events: queue.Queue[Event] = field(default_factory=queue.Queue)

    @property
    def records(self) -> Path:
        return self.folder / "records"

    def finished(self, job: Job) -> Record | None:
        """The record of a run that need not be made again."""
        path = self.records / f"{job.run_id}.json"
        record = read_record(path) if path.is_file() else None
        return record if record is not None and record.status in KEPT_RESULTS else None

    def run(self, jobs: Sequence[Job], tell: Callable[[Event], None]) -> None:
        """Make all the runs; ``tell`` hears every event. On an interruption every process is stopped first."""
        waiting = list(jobs)
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.workers:
                    self._start(waiting.pop(0))
                for event in self._heard():
                    if event.said is None:
                        self._end(event.job)
                    elif event.said.get("event") == "failed":
                        event.job.message = event.said.get("message", "")
                    tell(event)
                self._stop_late()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process that runs; finished records stay."""
        processes = [job.process for job in self.running if job.process is not None]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for job in self.running:
            self._clear(job)
        self.running = []

    def _start(self, job: Job) -> None:
        threads = job.recipe.threads or max(1, cores() // self.workers)
        adapter = self.folder / "adapters" / job.run_id
        plan = {
            "recipe": {**job.recipe.model_dump(exclude_none=True), "threads": threads},
            "records": str(self.records),
            "prepared": str(self.prepared) if self.prepared else None,
            "adapter": str(adapter),
        }
        write_atomically(self._plan(job), json.dumps(plan, indent=1))
        self._log(job).parent.mkdir(parents=True, exist_ok=True)
        words = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with open(self._log(job), "w", encoding="utf-8") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-m", "deltaworks.train.worker", str(self._plan(job))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, **words, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # an interruption reaches this process, which ends the others in order
            )
        job.started = time.monotonic()
        self.running.append(job)
        threading.Thread(target=self._listen, args=(job, job.process), daemon=True).start()

    def _listen(self, job: Job, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # the last line of a process that was killed while writing
                continue
            self.events.put(Event(job, said))
        process.wait()
        self.events.put(Event(job, None))

    def _heard(self) -> Iterator[Event]:
        try:
            yield self.events.get(timeout=0.2)
            while True:
                yield self.events.get_nowait()
        except queue.Empty:
            return

    def _end(self, job: Job) -> None:
        self.running.remove(job)
        job.record = self.finished(job)
        if job.record is None:
            job.record = failed_record(job.facts, job.message or self._last_words(job))
            job.record.write(self.records)
        self._clear(job)

    def _stop_late(self) -> None:
        for job in self.running:
            if self.run_seconds and job.process and time.monotonic() - job.started > self.run_seconds:
                job.message = f"stopped after {self.run_seconds:.0f} seconds, the limit of the comparison"
                job.process.kill()

    def _clear(self, job: Job) -> None:
        self._plan(job).unlink(missing_ok=True)
        adapter = self.folder / "adapters" / job.run_id
        if not self.keep_adapters and adapter.is_dir():
            for path in adapter.iterdir():
                path.unlink(missing_ok=True)
            adapter.rmdir()
            if not any(adapter.parent.iterdir()):
                adapter.parent.rmdir()

    def _last_words(self, job: Job) -> str:
        code = job.process.returncode if job.process is not None else None
        text = self._log(job).read_text(encoding="utf-8", errors="replace").strip()
        last = text.splitlines()[-1].strip() if text else ""
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            return f"the process was ended by {name}{hint}" + (f"; its last line: {last}" if last else "")
        return last or f"the process ended with status {code} and said nothing"

    def _plan(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.run_id}.json"

    def _log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.run_id}.log"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
