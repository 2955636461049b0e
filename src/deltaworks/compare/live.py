"""What a person sees in the terminal while a comparison runs, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from deltaworks.compare.jobs import Event, Job
from deltaworks.compare.standings import Comparison, Entry
from deltaworks.compare.standings import compare as sort_records
from deltaworks.compare.verdict import describe
from deltaworks.compare.wording import show_bytes, show_count, three_digits
from deltaworks.store.records import Record
from deltaworks.train.bars import bars


class Live:
    """Bars for the runs under way and one line for each run that ended; plain lines where there is no terminal."""

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self.console, self.jobs = console, jobs
        worlds = dict.fromkeys(job.world for job in jobs)
        self.several = len(worlds) > 1
        self.progress = bars(console)
        self.counts: dict[str, TaskID] = {}  # of all runs, and of each world where there are several
        for world in ("all runs", *(worlds if self.several else ())):
            inside = [job for job in jobs if world in ("all runs", job.world)]
            done = sum(job.record is not None for job in inside)
            self.counts[world] = self.progress.add_task(world, total=len(inside), completed=done, note="")
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> Live:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def hear(self, event: Event) -> None:
        """Show one event of the crew."""
        job = event.job
        if event.said is None:
            if job.run_id in self.bars:
                self.progress.remove_task(self.bars.pop(job.run_id))
            for world in {"all runs", job.world} & self.counts.keys():
                self.progress.advance(self.counts[world])
            self.progress.console.print(self._line(job), highlight=False, markup=False)
            return
        if job.run_id not in self.bars:
            self.bars[job.run_id] = self.progress.add_task(self._name(job), total=1.0, note="")
        said, note = event.said, None
        if said["event"] == "step":
            done = (said["rate"] + said["step"] / said["steps"]) / said["rates"]
            note = f"loss {said['loss']:.3f}"
            if "validation" in said:
                note += f", validation {said['validation']:.3f}"
            self.progress.update(self.bars[job.run_id], completed=done, note=note)
        elif said["event"] == "test":
            self.progress.update(self.bars[job.run_id], completed=1.0, note="testing")

    def _name(self, job: Job) -> str:
        return f"{job.world}: {job.label}" if self.several else job.label

    def _line(self, job: Job) -> str:
        record = job.record
        done = sum(other.record is not None for other in self.jobs)
        start = f"[{done}/{len(self.jobs)}] {self._name(job):<26}"
        if record is None or record.status != "finished" or record.test is None or record.test.score is None:
            return f"{start} {record.status if record else 'failed'}: {record.message if record else job.message}"
        size = show_count(record.counts.trainable)
        return f"{start} {record.test.metric} {record.test.score:.3f}, {size} trainable, {_time(record.wall_seconds)}"


def _time(seconds: float | None) -> str:
    """Seconds as 38 s or 1:40."""
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def summary(console: Console, records: Sequence[Record], page: Path) -> None:
    """The table, the verdict and the path of the page."""
    for comparison in sort_records(records):
        console.print(score_table(comparison))
        for sentence in describe(comparison):
            console.print(f"• {sentence}", highlight=False, markup=False)
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def score_table(comparison: Comparison) -> Table:
    """One row for each method, best first; failed and diverged ones last."""
    run = comparison.any_run
    title = f"{run.data.name} with {run.model.id}, {run.steps} steps of {run.batch_size}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("method", overflow="fold")
    score = comparison.metric if comparison.split == "test" else f"{comparison.split} {comparison.metric}"
    for heading in (score, "trainable", "stored", "memory", "samples/s", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in comparison.entries:
        table.add_row(*_cells(comparison, entry))
    return table


def _cells(comparison: Comparison, entry: Entry) -> list[str]:
    run = entry.any_run
    if entry.score is None:
        return [escape(entry.label), run.status, "", "", "", "", ""]
    score = comparison.show(entry.score)
    if entry.interval is not None and comparison.split == "test":
        score += f" ± {50 * (entry.interval[1] - entry.interval[0]):.1f}" if entry.is_proportion else ""
    speed, memory = entry.training_samples_per_second, entry.peak_memory_bytes
    return [
        escape(entry.label),
        score,
        show_count(run.counts.trainable),
        show_bytes(run.counts.stored_bytes),
        "-" if memory is None else show_bytes(memory),
        "-" if speed is None else three_digits(speed),
        _time(entry.wall_seconds),
    ]
