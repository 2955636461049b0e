"""Runs as processes of this machine, listened to line by line."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from deltaworks.compare.jobs import PATIENCE, Engine, Event, Job
from deltaworks.store.files import write_atomically
from deltaworks.train.prepared import write_prepared
from deltaworks.train.recipe import Recipe


class Processes(Engine):
    """Every run is a process of its own in the folder of a comparison; they share the cores evenly."""

    def __init__(self, folder: Path, workers: int, *, keep_adapters: bool = False) -> None:
        self.folder, self.capacity, self.keep_adapters = folder, workers, keep_adapters
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.prepared: dict[str, Path | None] = {}
        self.events: queue.Queue[Event] = queue.Queue()

    def start(self, job: Job, recipe: Recipe) -> None:
        threads = recipe.threads or max(1, cores() // self.capacity)
        plan = {
            "recipe": {**recipe.model_dump(exclude_none=True), "threads": threads},
            "records": str(self.folder / "records"),
            "prepared": self._prepared(job),
            "adapter": str(self._adapter(job)),
        }
        write_atomically(self._plan(job), json.dumps(plan, indent=1))
        self._log(job).parent.mkdir(parents=True, exist_ok=True)
        words = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with open(self._log(job), "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "deltaworks.train.worker", str(self._plan(job))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, **words, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # an interruption reaches this process, which ends the others in order
            )
        self.processes[job.run_id] = process
        threading.Thread(target=self._listen, args=(job, process), daemon=True).start()

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

    def heard(self) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self.events.get(timeout=0.2))
            while True:
                events.append(self.events.get_nowait())
        except queue.Empty:
            pass
        for event in events:
            if event.said is None:
                process = self.processes.pop(event.job.run_id)
                event.job.message = event.job.message or self._last_words(event.job, process.returncode)
                self._clear(event.job)
        return events

    def stop(self, jobs: Sequence[Job]) -> None:
        processes = [self.processes[job.run_id] for job in jobs if job.run_id in self.processes]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for job in jobs:
            self._clear(job)

    def close(self) -> None:
        """Processes leave nothing behind."""

    def _prepared(self, job: Job) -> str | None:
        """The file of the job's data, written when the first run needs them."""
        digest = job.data.digest
        if digest not in self.prepared:
            self.prepared[digest] = write_prepared(job.data, self.folder / "data" / f"{digest[:16]}.json")
        path = self.prepared[digest]
        return None if path is None else str(path)

    def _clear(self, job: Job) -> None:
        self._plan(job).unlink(missing_ok=True)
        adapters = self._adapter(job).parent
        if not self.keep_adapters and adapters.is_dir():
            shutil.rmtree(self._adapter(job), ignore_errors=True)
            if not any(adapters.iterdir()):
                adapters.rmdir()

    def _last_words(self, job: Job, code: int) -> str:
        text = self._log(job).read_text(encoding="utf-8", errors="replace").strip()
        last = text.splitlines()[-1].strip() if text else ""
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            return f"the process was ended by {name}{hint}" + (f"; its last line: {last}" if last else "")
        return last or f"the process ended with status {code} and said nothing"

    def _plan(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.run_id}.json"

    def _log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.run_id}.log"

    def _adapter(self, job: Job) -> Path:
        return self.folder / "adapters" / job.run_id


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
