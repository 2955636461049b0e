"""A comparison: a protocol planned, checked, run in processes, and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deltaworks.compare.jobs import Crew, Job
from deltaworks.compare.live import Live, summary
from deltaworks.compare.protocols import Protocol
from deltaworks.core.delta import attach
from deltaworks.core.errors import UserError
from deltaworks.store.files import check_writable
from deltaworks.store.records import Record
from deltaworks.train.data import Data
from deltaworks.train.loop import read_data, steps_of
from deltaworks.train.models import load_model
from deltaworks.train.prepared import write_prepared
from deltaworks.train.recipe import Recipe
from deltaworks.train.recording import facts_of


@dataclass
class Outcome:
    """Where the page is, and the records of the comparison's own runs, in their order."""

    page: Path
    records: list[Record]


def compare(
    protocol: Protocol, folder: str | Path, *, console: Console | None = None, keep_adapters: bool = False
) -> Outcome:
    """Run what is missing of a protocol in ``folder``, then write and show the report.

    Every run is a process of its own. Runs whose records are there are not made again, so an interrupted
    comparison continues where it was. Raises UserError before any run starts for what the user can mend, and
    KeyboardInterrupt, with nothing finished lost, when interrupted.
    """
    console = console or Console()
    place = check_writable(folder)
    recipes = protocol.recipes()
    with console.status("reading the data and the model, and trying every method on it"):
        data = read_data(recipes[0])
        jobs = plan(recipes, data)
        prepared = write_prepared(data, place / "data.json")
    for note in data.notes:
        console.print(f"[dim]{note}[/dim]", highlight=False)
    crew = Crew(place, protocol.workers, prepared, keep_adapters, protocol.run_seconds)
    for job in jobs:
        job.record = crew.finished(job)
    missing = [job for job in jobs if job.record is None]
    if len(missing) < len(jobs):
        console.print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished already")
    try:
        with Live(console, jobs) as live:
            crew.run(missing, live.hear)
    except KeyboardInterrupt:
        done = sum(crew.finished(job) is not None for job in jobs)
        console.print(f"stopped: {done} of {len(jobs)} runs are finished and kept; the same command runs the rest")
        raise
    from deltaworks.compare.report import write_report

    page = write_report(place)
    records = [job.record for job in jobs if job.record is not None]
    summary(console, records, page)
    return Outcome(page, records)


def plan(recipes: Sequence[Recipe], data: Data) -> list[Job]:
    """One job for each recipe, each method tried on the model without its storage. Raises UserError for a misfit."""
    first = recipes[0]
    shape = data.train[0]["image"].shape if "image" in data.train[0] else None
    loaded = load_model(first.model, data.task, labels=data.labels, dtype=first.dtype, image_shape=shape)
    loaded.model.to("meta")
    jobs: dict[str, Job] = {}
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
        jobs.setdefault(facts["run_id"], Job(facts["run_id"], recipe, facts))
    return list(jobs.values())
