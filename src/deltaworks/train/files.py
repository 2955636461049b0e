"""Reading rows from local files, with errors that name the file, the line and the mend."""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from deltaworks.core.errors import UserError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".npz")
COMPRESSIBLE = (".jsonl", ".json", ".csv", ".tsv", ".txt")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class Table:
    """Rows of one split and where each of them came from.

    Attributes:
        source: The file or data set, as it is named in errors.
        rows: One dictionary per row, column name to value.
        unit: What `numbers` counts: "line", "row" or "item".
        numbers: The place of each row in its source, from 1.
        label_names: Names of integer labels, where the source declares them, by column.
        notes: What was done to the source on the way, for the user.
    """

    source: str
    rows: list[Row]
    unit: str
    numbers: list[int]
    label_names: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: str, rows: list[Row], unit: str, numbers: list[int] | None = None) -> "Table":
        return cls(source, rows, unit, numbers or list(range(1, len(rows) + 1)))

    @cached_property
    def columns(self) -> list[str]:
        """All column names, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def place(self, index: int) -> str:
        """``"train.jsonl, line 7"`` for the row at this index."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"


def suffix_of(path: Path) -> str:
    """The suffix that says the format, ``".jsonl"`` for ``train.jsonl.gz``; "" where it is unknown."""
    name = path.name.lower()
    if name.endswith(".gz"):
        inner = Path(name.removesuffix(".gz")).suffix
        return inner if inner in COMPRESSIBLE else ""
    return Path(name).suffix if Path(name).suffix in SUFFIXES else ""


def missing_path(path: Path) -> UserError:
    """The error for a path that does not exist, with the nearest names of its folder."""
    folder = path.parent
    if not folder.is_dir():
        return UserError(f"{path} does not exist, nor does the folder {folder}; check the path")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, 3, cutoff=0.5)
    hint = "did you mean " + " or ".join(map(repr, close)) + "?" if close else "check the path"
    return UserError(f"{path} does not exist; {hint}")


def read_splits(path: Path) -> dict[str, Table]:
    """The tables under "train", "validation" and "test" of a file or a folder; a lone table is "train".

    Raises:
        UserError: The path is missing or unreadable, or what it holds cannot be read.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise missing_path(path)
        if not suffix_of(path):
            raise UserError(
                f"{path} has a suffix that is not known; use one of {', '.join(SUFFIXES)} (text formats also with .gz)"
            )
        splits = _read_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    for table in splits.values():
        if not table.rows:
            raise UserError(f"{table.source} is empty; it must hold at least one row")
    return splits


def _read_folder(folder: Path) -> dict[str, Table]:
    entries = sorted(folder.iterdir())
    if any(entry.name in ("dataset_dict.json", "dataset_info.json") for entry in entries):
        from deltaworks.train.hub import read_saved_dataset

        return read_saved_dataset(folder)
    files = [entry for entry in entries if entry.is_file() and suffix_of(entry)]
    found: dict[str, Path] = {}
    for split, stems in SPLIT_NAMES.items():
        matches = [file for file in files if file.name.lower().split(".")[0] in stems]
        if len(matches) > 1:
            names = " and ".join(match.name for match in matches)
            raise UserError(f"{folder} holds more than one {split} file ({names}); keep one of them")
        if matches:
            found[split] = matches[0]
    if not found:
        data_files = [file for file in files if file.suffix != ".json"] or files
        if len(data_files) == 1:
            return read_splits(data_files[0])
        listed = ", ".join(file.name for file in data_files[:8]) or "no data file at all"
        raise UserError(
            f"{folder} holds no train.* or test.* file ({listed}); name one file, or rename it to train.jsonl"
        )
    if "train" not in found:
        # a data set published with one held-out split only: it is all there is to train on
        found = {"train": found.get("validation") or found["test"]}
    return {split: _only_table(file) for split, file in found.items()}


def _only_table(file: Path) -> Table:
    splits = read_splits(file)
    if len(splits) > 1:
        raise UserError(f"{file} holds {', '.join(splits)} itself; name this file instead of its folder")
    return splits["train"]


def _read_file(path: Path) -> dict[str, Table]:
    suffix = suffix_of(path)
    if suffix == ".npz":
        from deltaworks.train.images import read_image_arrays

        return read_image_arrays(path)
    if suffix == ".parquet":
        return {"train": _read_parquet(path)}
    text = _read_text(path)
    if suffix == ".json":
        return _read_json(path, text)
    reader = {".jsonl": _read_json_lines, ".txt": _read_plain_lines}.get(suffix)
    if reader is not None:
        return {"train": reader(path, text)}
    return {"train": _read_delimited(path, text, "\t" if suffix == ".tsv" else ",")}


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is not a whole gzip file ({error}); copy or download it again") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(
            f"{path}, line {line} holds the byte 0x{byte:02x}, which is not UTF-8; save the file as UTF-8"
        ) from error


def _read_json_lines(path: Path, text: str) -> Table:
    rows: list[Row] = []
    numbers: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not valid JSON ({error}); mend or remove it") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} is a JSON {_json_kind(row)}, not an object; "
                f'each line must look like {{"text": "...", "label": "..."}}'
            )
        rows.append(row)
        numbers.append(number)
    return Table.of(str(path), rows, "line", numbers)


def _read_json(path: Path, text: str) -> dict[str, Table]:
    if not text.strip():
        return {"train": Table.of(str(path), [], "item")}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it, or name it .jsonl") from error
    if isinstance(content, list):
        return {"train": _items(path, str(path), content)}
    if isinstance(content, dict) and isinstance(content.get("train"), list):
        known = {stem: split for split, stems in SPLIT_NAMES.items() for stem in stems}
        return {
            known[name]: _items(path, f"{path} [{name}]", items)
            for name, items in content.items()
            if name in known and isinstance(items, list)
        }
    raise UserError(
        f"{path} holds a JSON {_json_kind(content)}; it must be a list of objects, "
        f'or an object with lists under "train" and "test"'
    )


def _items(path: Path, source: str, items: list[Any]) -> Table:
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{source}, item {number} is a JSON {_json_kind(item)}, not an object")
    return Table.of(source, items, "item")


def _json_kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _read_plain_lines(path: Path, text: str) -> Table:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return Table.of(str(path), [{"text": line} for _, line in lines], "line", [number for number, _ in lines])


def _read_delimited(path: Path, text: str, delimiter: str) -> Table:
    records = _records(path, text, delimiter)
    _, header = next(records, (0, []))
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(f"{path} has the column {repeated[0]!r} twice in its header; rename one of them")
    rows: list[Row] = []
    numbers: list[int] = []
    for number, cells in records:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number} has {len(cells)} cells where the header has {len(header)}; "
                f"put double quotes around cells that hold {delimiter!r}"
            )
        rows.append(dict(zip(header, cells, strict=True)))
        numbers.append(number)
    return Table.of(str(path), rows, "line", numbers)


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The non-empty records with the line on which each begins (a quoted cell may span lines)."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {number} cannot be split into cells ({error}); mend it") from error
        if cells:
            yield number, cells


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return Table.of(str(path), [], "row")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is not a whole Parquet file ({reason}); copy or download it again") from error
    return Table.of(str(path), rows, "row")
