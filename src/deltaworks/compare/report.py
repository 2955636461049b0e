"""The page a person looks at: one HTML file, made from the records alone, that needs no network.

Each comparison is a section: the verdict in words, the table (`tables`), the plots (`plots`), what the methods did
(`pictures`), what their learning rates did (`sensitivity`), the runs that were lost, and the fine print (`facts`).
Where there are several, all methods at a glance come first (`overview`). The template lays them out.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaworks.compare.colours import COLOURS, family_colours, legend, looks_of
from deltaworks.compare.exports import exports
from deltaworks.compare.facts import setting, shared_facts
from deltaworks.compare.overview import overview
from deltaworks.compare.pictures import WIDTH, procedures
from deltaworks.compare.plots import curves_drawn, pareto_front, plots
from deltaworks.compare.sensitivity import WIDTH as SMALL_WIDTH
from deltaworks.compare.sensitivity import sensitivity
from deltaworks.compare.standings import Comparison, compare
from deltaworks.compare.tables import columns, rank_groups, score_ticks, table
from deltaworks.compare.verdict import caveats, findings
from deltaworks.compare.wording import plural, show_count, show_seconds
from deltaworks.core.errors import UserError
from deltaworks.store.files import write_atomically
from deltaworks.store.records import Record, read_records

__all__ = ["family_colours", "pareto_front", "render", "section", "write_report"]


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Read the records in ``folder/records`` and write ``folder/report.html``, a page that stands alone.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no records, one is broken, or the page cannot be written.
    """
    place = Path(folder)
    records = read_records(place / "records")
    if not records:
        raise UserError(f"there is nothing to report: {str(place / 'records')!r} holds no record")
    path = place / "report.html"
    write_atomically(path, render(records))
    return path


def render(records: Sequence[Record]) -> str:
    """The page for ``records`` as HTML."""
    import jinja2  # heavy parts load when used
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deltaworks.compare", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparisons = compare(records)
    sections = [section(comparison) for comparison in comparisons]
    heading = sections[0]["title"] if len(sections) == 1 else f"{len(sections)} comparisons"
    fingerprint = "".join(record.model_dump_json() for record in records)
    return environment.get_template("report.html.j2").render(
        title=f"{heading} · deltaworks",
        sections=sections,
        overview=overview(comparisons) if len(comparisons) > 1 else [],
        data=[found["plots"] for found in sections],
        exports=[exports(comparison) for comparison in comparisons],
        plotly=get_plotlyjs(),
        # Only scripts with this word run; a text in a record cannot hold the digest of itself.
        nonce=hashlib.sha256(fingerprint.encode("utf-8", "surrogatepass")).hexdigest(),
        colours=COLOURS,
        picture_width=WIDTH,
        small_width=SMALL_WIDTH,
    )


def section(comparison: Comparison) -> dict[str, Any]:
    """What the template shows of one comparison."""
    looks = looks_of(comparison)
    drawn = plots(comparison, looks)
    shown = columns(comparison)
    rows = table(comparison, looks, shown)
    seeds = len({found.seed for found in comparison.records})
    lead, *others = findings(comparison)
    return {
        "title": _title(comparison),
        "short": f"{comparison.any_run.data.name}, {comparison.any_run.model.id}",
        "subtitle": _subtitle(comparison, seeds),
        "seeds": seeds,
        "lead": lead,
        "findings": others,
        "caveats": caveats(comparison),
        "higher": comparison.entries[0].higher_is_better,
        "columns": shown,
        "rows": rows,
        "groups": rank_groups(rows),
        "ticks": score_ticks(comparison),
        "sensitivity": sensitivity(comparison, looks),
        "head": show_count(max(found.counts.head for found in comparison.records)),
        "families": legend(looks),
        "plots": drawn,
        "curves": curves_drawn(drawn),
        "procedures": procedures(comparison, looks),
        "lost": [
            (entry.label, found.seed, found.status, found.message or "no message was left")
            for entry in comparison.entries
            for found in entry.unfinished
        ],
        "settings": [
            (
                entry.label,
                look.colour,
                [setting(entry, run) for run in sorted([*entry.runs, *entry.unfinished], key=lambda run: run.seed)],
            )
            for entry, look in zip(comparison.entries, looks, strict=True)
        ],
        "facts": shared_facts(comparison),
    }


def _title(comparison: Comparison) -> str:
    methods = sum(entry.baseline is None for entry in comparison.entries)
    count = plural(methods, "method") if methods else plural(len(comparison.entries), "baseline")
    return f"{count} on {comparison.any_run.data.name}"


def _subtitle(comparison: Comparison, seeds: int) -> list[str]:
    run = comparison.any_run
    parts = [f"{run.model.id}, {show_count(run.model.parameters)} parameters", run.data.task]
    if run.data.labels:
        parts.append(plural(len(run.data.labels), "label"))
    if len({found.steps for found in comparison.records}) == 1:
        parts.append(f"{plural(run.steps, 'step')} of {run.batch_size}")
    parts += [plural(len(comparison.records), "run"), plural(seeds, "seed")]
    cost = comparison.cost_seconds
    return parts if cost is None else [*parts, f"{show_seconds(cost)} of runs in all"]
