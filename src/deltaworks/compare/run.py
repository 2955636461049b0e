"""A comparison: a protocol planned, checked, run somewhere, and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deltaworks.compare.jobs import Crew, Engine, Job
from deltaworks.compare.live import Live, summary
from deltaworks.compare.protocols import Protocol
from deltaworks.core.delta import attach
from deltaworks.core.errors import UserError, nearest
from deltaworks.store.files import check_writable
from deltaworks.store.records import Record
from deltaworks.train.data import Data
from deltaworks.train.models import load_model
from deltaworks.train.recipe import Recipe
from deltaworks.train.recording import facts_of
from deltaworks.train.stage import read_data, steps_of

ENGINES = ("local", "ray")


@dataclass
class Outcome:
    """Where the page is, and the records of the comparison's own runs, in their order."""

    page: Path
    records: list[Record]


def compare(
    protocol: Protocol,
    folder: str | Path,
    *,
    engine: str = "local",
    console: Console | None = None,
    keep_adapters: bool = False,
) -> Outcome:
    """Run what is missing of a protocol in ``folder``, then write and show the report.

    Every run has a process of its own, on this machine (``engine="local"``) or on a Ray cluster (``"ray"``). Runs whose
    records are there are not made again, so an interrupted comparison continues where it was. Raises UserError before
    any run starts for what the user can mend, and KeyboardInterrupt, with nothing finished lost, when interrupted.
    """
    console = console or Console()
    place = check_writable(folder)
    worlds = protocol.recipes()
    if engine not in ENGINES:
        raise UserError(f"the engine {engine!r} is unknown: {nearest(engine, ENGINES)}")
    with console.status("reading the data and the models, and trying every method on them"):
        jobs = plan_all(worlds, console)
    crew = Crew(place, protocol.run_seconds)
    for job in jobs:
        job.record = crew.finished(job)
    missing = [job for job in jobs if job.record is None]
    if len(missing) < len(jobs):
        console.print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished already")
    if missing:
        try:
            with Live(console, jobs) as live:
                crew.run(missing, engine_of(engine, place, protocol.workers, keep_adapters), live.hear)
        except KeyboardInterrupt:
            done = sum(crew.finished(job) is not None for job in jobs)
            console.print(f"stopped: {done} of {len(jobs)} runs are finished and kept; the same command runs the rest")
            raise
    from deltaworks.compare.report import write_report

    page = write_report(place)
    records = [job.record for job in jobs if job.record is not None]
    summary(console, records, page)
    return Outcome(page, records)


def engine_of(name: str, folder: Path, workers: int, keep_adapters: bool) -> Engine:
    """The engine of this name. Raises UserError where its library is missing."""
    if name == "ray":
        from deltaworks.compare.cluster import Cluster

        return Cluster(folder, workers, keep_adapters=keep_adapters)
    from deltaworks.compare.processes import Processes

    return Processes(folder, workers, keep_adapters=keep_adapters)


def plan_all(worlds: Sequence[Sequence[Recipe]], console: Console) -> list[Job]:
    """The jobs of all worlds, in order; data that several worlds share are read once."""
    jobs: list[Job] = []
    read: list[tuple[Recipe, Data]] = []
    for recipes in worlds:
        data = next((data for other, data in read if same_data(other, recipes[0])), None)
        if data is None:
            data = read_data(recipes[0])
            read.append((recipes[0], data))
            for note in data.notes:
                start = f"{data.name}: " if len(worlds) > 1 else ""
                console.print(f"[dim]{start}{note}[/dim]", highlight=False)
        jobs += plan(recipes, data)
    return jobs


def same_data(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes read the same rows in the same splits."""
    fields = {"data", "task", "columns", "test", "limit", "limit_per_class", "test_limit", "validation", "data_seed"}
    return one.model_dump(include=fields) == other.model_dump(include=fields)


def plan(recipes: Sequence[Recipe], data: Data) -> list[Job]:
    """One job for each recipe, each method tried on the model without its storage. Raises UserError for a misfit."""
    first = recipes[0]
    shape = data.train[0]["image"].shape if "image" in data.train[0] else None
    loaded = load_model(first.model, data.task, labels=data.labels, dtype=first.dtype, image_shape=shape)
    loaded.model.to("meta")
    jobs: dict[str, Job] = {}
    searchers: dict[tuple[str, int], Job] = {}
    fitting: set[str] = set()
    for recipe in recipes:
        config = recipe.config()
        if recipe.method not in fitting:
            try:
                attach(loaded.model, config, also=loaded.head).detach()
            except UserError as error:
                raise UserError(f"{recipe.method}: {error}") from None
            fitting.add(recipe.method)
        facts = facts_of(recipe, config, data, loaded, steps_of(recipe, len(data.train)))
        searcher = None if recipe.searched_on is None else searchers[recipe.method, recipe.searched_on]
        job = jobs.setdefault(facts["run_id"], Job(facts["run_id"], recipe, facts, data, searcher))
        searchers[recipe.method, recipe.seed] = job
    return list(jobs.values())
