"""Data for a run: found, read, checked, split the same way every time, and given a digest."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.core.errors import UserError, nearest
from deltaworks.train.columns import Choice, choose_columns
from deltaworks.train.files import SUFFIXES, Row, Table, missing_path, read_splits
from deltaworks.train.rows import label_names_of, normalised
from deltaworks.train.standard_library import docstrings, python_version, read_standard_library

BUILT_IN = ("stdlib-docs", "stdlib-text")
TEST_FRACTION = 0.2  # of the rows, where the source has no test split


@dataclass
class Data:
    """Rows under role keys ("text", "pair", "label", "prompt", "target", "image"), in three splits.

    Attributes:
        name: Short name of the source, such as "banking77".
        task: One of `deltaworks.train.tasks.TASKS`.
        train: Rows to train on.
        validation: Rows to choose learning rates on, never part of `train` or `test`.
        test: Rows to report on.
        columns: Role to the source's column.
        labels: Class names in index order, or None where the task has no classes.
        digest: SHA-256 (hexadecimal) over all rows in order.
        notes: What was guessed or made, in sentences for the user.
    """

    name: str
    task: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    columns: dict[str, str]
    labels: list[str] | None
    digest: str
    notes: list[str]


def load_data(
    source: str | Path,
    *,
    task: str | None = None,
    columns: dict[str, str] | None = None,
    test: str | Path | None = None,
    limit: int | None = None,
    limit_per_class: int | None = None,
    test_limit: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Data:
    """Load a data set as rows under role keys, with everything that was guessed said in `notes`.

    Args:
        source: "stdlib-docs", "stdlib-text", a file, a folder with train and test files, or a Hub id.
        task: One of "classification", "pairs", "causal", "seq2seq", "images"; guessed from the columns.
        columns: Role to column name; "a+b" joins two, "premise: {a} hypothesis: {b}" is a template, in which classes
            are written by name. What is not given is guessed.
        test: A file with the test rows, where the source does not hold them.
        limit: Most training rows, validation included; drawn with the seed, in proportion to the classes.
        limit_per_class: Most training rows of each class, validation included.
        test_limit: Most test rows, and most rows of a validation split that the source brings along.
        validation: Fraction of the training rows set aside, where the source has no validation split.
        seed: Decides limits and splits, nothing else.

    Raises:
        UserError: Anything the user can mend: a path, a line, a column, a label, a limit.
    """
    for name, count in (("limit", limit), ("limit_per_class", limit_per_class), ("test_limit", test_limit)):
        if count is not None and count < 1:
            raise UserError(f"{name}={count} leaves no rows; give at least 1, or leave it out for all rows")
    if not 0 <= validation < 1:
        raise UserError(f"validation={validation} is not a fraction; give a number from 0 up to, not with, 1")
    tables, notes = _tables(source, test, task)
    if task is None and str(source) == "stdlib-text":
        task = "causal"
    choice = choose_columns(list(tables.values()), task, columns)
    if str(source) not in BUILT_IN:
        notes += choice.notes
    labels = _labels(tables, choice)
    splits = {split: normalised(table, choice, labels, notes) for split, table in tables.items()}

    generator = random.Random(seed)
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(splits["train"], TEST_FRACTION, generator)
        notes.append(f"no test split: {len(splits['test'])} rows held out with seed {seed}")
    splits["train"] = _limited(splits["train"], limit, limit_per_class, generator)
    splits["test"] = _limited(splits["test"], test_limit, None, generator)
    if "validation" in splits:
        splits["validation"] = _limited(splits["validation"], test_limit, None, generator)
    else:
        splits["train"], splits["validation"] = _hold_out(splits["train"], validation, generator)
    for split in ("train", "test"):
        if not splits[split]:
            raise UserError(f"{source} leaves no {split} rows after the split; give more rows")
    if labels is not None:
        absent = len(labels) - len({row["label"] for row in splits["train"]})
        if absent:
            notes.append(f"{absent} of {len(labels)} classes have no training row")
    return Data(
        name=_short_name(source),
        task=choice.task,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        columns=choice.columns,
        labels=labels,
        digest=_digest([splits["train"], splits["validation"], splits["test"]]),
        notes=notes,
    )


def _tables(source: str | Path, test: str | Path | None, task: str | None) -> tuple[dict[str, Table], list[str]]:
    """The tables of the source (and of the separate test file), and what there is to say about them."""
    notes: list[str] = []
    name = str(source)
    if name in BUILT_IN:
        tables = _built_in(name)
        notes.append(f"docstrings of {python_version()}; other versions give other rows")
        if task is not None and (task == "causal") != (name == "stdlib-text"):
            fitting = "stdlib-text" if task == "causal" else "stdlib-docs"
            if task not in ("causal", "classification"):
                raise UserError(f"{name!r} has no {task!r} task; it serves 'classification' or 'causal'")
            tables = _built_in(fitting)
            notes.append(f"read as {fitting!r}, since the task is {task!r}")
    else:
        tables = _tables_of(source)
        notes += [note for table in tables.values() for note in table.notes]
    if test is not None:
        extra = _tables_of(test)
        tables["test"] = extra.get("test") or extra["train"]
    return tables, notes


def _built_in(name: str) -> dict[str, Table]:
    if name == "stdlib-text":
        rows = [{"text": text} for text, _ in docstrings()]
        return {"train": Table.of(name, rows, "docstring")}
    train, test = read_standard_library()
    return {"train": Table.of(name, list(train), "docstring"), "test": Table.of(name, list(test), "docstring")}


def _tables_of(source: str | Path) -> dict[str, Table]:
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, the home of an unknown user
        raise UserError(f"{str(source)!r} cannot be read: {error}") from error
    if there or isinstance(source, Path):
        return read_splits(path)
    from deltaworks.store.hub import HUB_ID
    from deltaworks.train.hub import read_hub_dataset

    looks_local = (
        source.startswith((".", "/", "~"))
        or path.name.removesuffix(".gz").endswith(SUFFIXES)
        or (len(path.parts) > 1 and path.parent.is_dir())
    )
    if looks_local or not HUB_ID.fullmatch(source.partition(":")[0]):
        raise missing_path(path)
    hint = nearest(source, BUILT_IN)
    if "/" not in source and hint.startswith("did you mean"):
        raise UserError(f"the data set {source!r} is not known; {hint}")
    return read_hub_dataset(source)


def _labels(tables: dict[str, Table], choice: Choice) -> list[str] | None:
    """Class names of the training table; every other split must keep to them."""
    if "label" not in choice.columns:
        return None
    column = choice.columns["label"]
    names = label_names_of(tables["train"], column)
    for table in tables.values():
        label_names_of(table, column, known=names)
    if len(names) < 2:
        raise UserError(
            f"{tables['train'].source} has one class only ({names[0]!r} in column {column!r}); "
            f"a classifier needs at least two"
        )
    return names


def _hold_out(rows: list[Row], fraction: float, generator: random.Random) -> tuple[list[Row], list[Row]]:
    """Split off a fraction: per class where there are classes, whole prompts otherwise.

    Rows of one prompt stay on one side, so that no reference of a held-out prompt is trained on.
    """
    if not fraction or len(rows) < 2:
        return rows, []
    wanted = max(1, round(fraction * len(rows)))
    if "label" in rows[0]:
        held_out = set(_spread(rows, wanted, generator, spared=1))
    else:
        groups: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row["prompt"] if "prompt" in row else row["text"], []).append(index)
        order = list(groups.values())
        generator.shuffle(order)
        held_out = set()
        for group in order[:-1]:
            if len(held_out) >= wanted:
                break
            held_out.update(group)
    kept = [row for index, row in enumerate(rows) if index not in held_out]
    return kept, [row for index, row in enumerate(rows) if index in held_out]


def _limited(rows: list[Row], limit: int | None, limit_per_class: int | None, generator: random.Random) -> list[Row]:
    """A random part of the rows in their own order."""
    if limit_per_class is not None:
        if rows and "label" not in rows[0]:
            raise UserError("limit_per_class needs a task with classes; use limit for this one")
        kept: set[int] = set()
        for members in _by_class(rows):
            kept.update(generator.sample(members, min(limit_per_class, len(members))))
        rows = [row for index, row in enumerate(rows) if index in kept]
    if limit is not None and limit < len(rows):
        if "label" in rows[0]:
            chosen = set(_spread(rows, limit, generator))
        else:
            chosen = set(generator.sample(range(len(rows)), limit))
        rows = [row for index, row in enumerate(rows) if index in chosen]
    return rows


def _by_class(rows: list[Row]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row["label"], []).append(index)
    return [members[label] for label in sorted(members)]


def _spread(rows: list[Row], count: int, generator: random.Random, spared: int = 0) -> list[int]:
    """At most `count` indices, drawn so that each class has its share, with `spared` rows of each left alone.

    Every row of a class of n gets a place (k + u) / n with one u in [0, 1) per class; the `count` rows with
    the lowest places have the proportions of the whole, and ties between small classes fall at random.
    """
    places: list[tuple[float, int]] = []
    for members in _by_class(rows):
        shuffled = generator.sample(members, len(members))
        offset = generator.random()
        drawn = shuffled[: len(members) - spared]
        places += [((k + offset) / len(members), index) for k, index in enumerate(drawn)]
    return [index for _, index in sorted(places)[:count]]


def _short_name(source: str | Path) -> str:
    name = str(source)
    if name in BUILT_IN or not Path(name).expanduser().exists():
        return name
    path = Path(name).expanduser().resolve()
    if path.is_dir():
        return path.name
    stem = path.name.split(".")[0]
    return path.parent.name if stem in ("train", "data") and path.parent.name else stem


def _digest(splits: list[list[Row]]) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        digest.update(f"{len(rows)}\n".encode())
        for row in rows:
            line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_image_digest)
            digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _image_digest(image: Any) -> str:
    return f"{image.dtype} {image.shape} {hashlib.sha256(image.tobytes()).hexdigest()}"
