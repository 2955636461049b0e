"""What the command line shows of methods, models and saved adapters."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from deltaworks.core.abilities import Ability, abilities
from deltaworks.core.errors import UserError
from deltaworks.core.registry import from_data

FORMS = {1: "factors", 2: "weight", 3: "around"}


def markdown(found: list[Ability]) -> str:
    """The methods as a Markdown table, for documents."""
    lines = ["| method | family | form | merges | rows | at step 0 | paper |", "|---|---|---|---|---|---|---|"]
    for each in found:
        form = "-" if each.form is None else f"{each.form} {FORMS[each.form]}"
        merge, rows = ("no" if reason else "yes" for reason in (each.merge, each.rows))
        start = "identity" if each.identity else "changed"
        lines.append(f"| `{each.name}` | {each.family} | {form} | {merge} | {rows} | {start} | {each.paper} |")
    return "\n".join(lines)


def print_methods(pattern: str, *, as_json: bool, as_markdown: bool = False) -> None:
    """A table, or JSON with every option and the reason of every limit, or Markdown."""
    found = abilities(pattern)
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=1, default=str))
        return
    if as_markdown:
        print(markdown(found))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", "form", "merge", "rows", "start", "rate", "paper"):
        table.add_column(title, no_wrap=title != "paper")
    family = ""
    for each in found:
        if each.family != family:
            family = each.family
            table.add_row(f"[bold]{family}[/bold]")
        form = "-" if each.form is None else f"{each.form} {FORMS[each.form]}"
        merge, rows = ("no" if reason else "yes" for reason in (each.merge, each.rows))
        start = "identity" if each.identity else "changed"
        table.add_row(f"  {each.name}", form, merge, rows, start, f"{each.learning_rate:g}", each.paper)
    console.print(table, highlight=False)
    limited = [(each.name, key, text) for each in found for key, text in each.limits.items()]
    if limited:
        console.print("\nlimits", style="bold")
        for name, key, text in limited:
            console.print(f"{name}, {key}: {text}", highlight=False, markup=False)
    console.print(
        "\nform: what the method gives, strongest first (1 implies 2 implies 3); rows: another adapter for each row "
        "of one batch; rate: default learning rate",
        style="dim",
        highlight=False,
    )


def print_anatomy(source: str, task: str | None) -> None:
    """The tree of a model. Raises UserError where it cannot be loaded."""
    from deltaworks.core.anatomy import anatomy
    from deltaworks.train.columns import ROLES
    from deltaworks.train.models import load_model
    from deltaworks.train.skeleton import skeleton

    errors: list[UserError] = []
    for name in [task] if task else list(ROLES):
        try:
            loaded = load_model(source, name, labels=["0", "1"])
        except UserError as error:
            errors.append(error)
            continue
        print(anatomy(loaded.model))
        return
    bare = None if task else skeleton(Path(source).expanduser())
    if bare is None:
        raise errors[0]
    print(anatomy(bare))


def print_adapter(folder: Path) -> None:
    """Method, sizes and origin of a saved adapter, and its scores where its record lies beside it."""
    from deltaworks.compare.wording import show_bytes, show_count
    from deltaworks.store.checkpoint import MANIFEST, read_manifest, read_tensors
    from deltaworks.store.foreign import peft
    from deltaworks.store.foreign import tensors as files
    from deltaworks.store.records import read_record

    if not (folder / MANIFEST).is_file() and peft.recognises(folder):
        manifest: dict[str, Any] = {}
        lines, tensors = peft.described(folder), files.read_tensors(folder / peft.WEIGHTS)
    else:
        manifest = read_manifest(folder)
        base, tensors = manifest["base"], read_tensors(folder, manifest)
        lines = {
            "adapter": f"{manifest.get('name')}: {from_data(manifest['methods'])}",
            "also trained": ", ".join(manifest["also"]) or "nothing",
            "base": f"{base.get('class')} with {show_count(base.get('parameters', 0))} parameters",
            "seed": str(manifest["seed"]),
        }
    values = sum(tensor.numel() for tensor in tensors.values())
    size = sum(path.stat().st_size for path in folder.glob("adapter*"))
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    lines["stored"] = f"{len(tensors)} tensors, {show_count(values)} values ({', '.join(kinds)}), {show_bytes(size)}"
    if manifest.get("training"):
        lines["state"] = "a checkpoint in the middle of training"
    if (folder / "record.json").is_file():
        record = read_record(folder / "record.json")
        lines["trained on"] = f"{record.data.name} with {record.model.id}, {record.steps} steps of {record.batch_size}"
        if record.test is not None and record.test.score is not None:
            lines["test"] = f"{record.test.metric} {record.test.score:.4f}"
    for key, text in lines.items():
        print(f"{key:<14}{text}")
