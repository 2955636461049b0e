"""Runs as tasks of a Ray cluster: data travel in its object store, records come back as text and are written here."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from deltaworks.compare.jobs import PATIENCE, Engine, Event, Job
from deltaworks.core.errors import UserError
from deltaworks.store.files import write_atomically
from deltaworks.store.records import Record
from deltaworks.train.data import Data
from deltaworks.train.recipe import Recipe, parse_recipe


def make(values: dict[str, Any], data: Data, run_id: str, progress: Any, keep: bool) -> tuple[str, dict[str, bytes]]:
    """One run, on whichever machine it is: the record as JSON, and the files of the adapter where it is kept."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from deltaworks.train.loop import train
    from deltaworks.train.worker import sparing

    tell = sparing(lambda event: progress.actor.put_nowait.remote((run_id, event)))  # training waits for no answer
    with TemporaryDirectory(prefix="deltaworks-") as scratch:
        adapter = Path(scratch) / "adapter"
        record = train(parse_recipe(values), data=data, adapter=adapter, tell=tell)
        files = sorted(adapter.iterdir()) if keep and adapter.is_dir() else []
        return record.model_dump_json(), {path.name: path.read_bytes() for path in files}


class Cluster(Engine):
    """Every run is a Ray task in a fresh process, on the cluster that Ray finds here or a new one on this machine.

    The runs share the processors of the cluster evenly, each within one node, and have a GPU each where there are any.
    """

    def __init__(self, folder: Path, workers: int, *, keep_adapters: bool = False) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError:
            raise UserError("--engine ray needs Ray: pip install 'deltaworks[ray]'") from None
        self.ray, self.folder, self.capacity, self.keep_adapters = ray, folder, workers, keep_adapters
        self.started_here = not ray.is_initialized()
        if self.started_here:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if not processors:
            raise UserError("the Ray cluster has no processors: start a node with 'ray start'")
        self.threads = min(*processors, max(1, sum(processors) // workers), sum(processors))
        self.gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
        # a process serves one run, so that memory is honest; Ray repeats no run: a failed one becomes a record
        self.make = ray.remote(max_calls=1, max_retries=0)(make)
        self.progress = Queue(actor_options={"num_cpus": 0})
        self.data: dict[str, Any] = {}  # by digest
        self.tasks: dict[Any, Job] = {}  # by the reference of its result

    def start(self, job: Job, recipe: Recipe) -> None:
        if job.data.digest not in self.data:
            self.data[job.data.digest] = self.ray.put(job.data)
        threads = recipe.threads or self.threads
        values = {**recipe.model_dump(exclude_none=True), "threads": threads}
        if Path(recipe.model).is_dir():  # tasks have a working folder of their own
            values["model"] = str(Path(recipe.model).resolve())
        task = self.make.options(num_cpus=threads, num_gpus=int(self.gpus and recipe.device != "cpu"))
        result = task.remote(values, self.data[job.data.digest], job.run_id, self.progress, self.keep_adapters)
        self.tasks[result] = job

    def heard(self) -> list[Event]:
        ended, _ = self.ray.wait(list(self.tasks), timeout=0.2) if self.tasks else ([], [])
        jobs = {job.run_id: job for job in self.tasks.values()}
        said = self.progress.get_nowait_batch(self.progress.qsize())
        events = [Event(jobs[run_id], event) for run_id, event in said if run_id in jobs]
        return events + [self._end(result) for result in ended]

    def _end(self, result: Any) -> Event:
        job = self.tasks.pop(result)
        try:
            text, files = self.ray.get(result)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            job.message = job.message or (
                str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
            )
        except self.ray.exceptions.RayError as error:  # the process or its machine is gone, or memory ran out
            job.message = job.message or " ".join(str(error).split())
        else:
            self._keep(job, text, files)
        return Event(job, None)

    def _keep(self, job: Job, text: str, files: dict[str, bytes]) -> None:
        try:
            record = Record.model_validate_json(text)
        except ValidationError:
            job.message = "the record that came back cannot be read: install this version of deltaworks on every node"
            return
        record.write(self.folder / "records")
        for name, content in files.items():
            write_atomically(self.folder / "adapters" / job.run_id / name, content)

    def stop(self, jobs: Sequence[Job]) -> None:
        left = [result for result, job in self.tasks.items() if job in jobs]
        for force in (False, True):  # an interruption in the task, then the end of its process
            for result in left:
                self.ray.cancel(result, force=force)
            _, left = self.ray.wait(left, num_returns=len(left), timeout=PATIENCE) if left else ([], [])

    def close(self) -> None:
        self.progress.shutdown(force=True)
        if self.started_here:
            self.ray.shutdown()
