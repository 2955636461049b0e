"""Rows of a table turned into rows under role keys, each value checked at its place."""

from typing import Any

from deltaworks.core.errors import UserError
from deltaworks.train.columns import Choice, check_column, is_template, parts
from deltaworks.train.files import Row, Table


def normalised(table: Table, choice: Choice, labels: list[str] | None, notes: list[str]) -> list[Row]:
    """The table's rows as ``{role: value}``: texts as str, labels as class indices, pictures as arrays.

    Rows with an empty target teach nothing; they are left out, and `notes` says which.

    Raises:
        UserError: A column is missing, or a value has another type than the rest of its column.
    """
    by_role: dict[str, list[Any]] = {}
    for role, column in choice.columns.items():
        check_column(table, column)
        if role == "label":
            index = {name: number for number, name in enumerate(labels or [])}
            by_role[role] = [index[name] for name in _label_values(table, _label_column(table, column))]
        elif role == "image":
            by_role[role] = _image_values(table, parts(column, table.columns)[0])
        else:
            by_role[role] = _text_values(table, column)
    rows = [dict(zip(by_role, cells, strict=True)) for cells in zip(*by_role.values(), strict=True)]
    empty = [index for index, row in enumerate(rows) if not row.get("target", "some").strip()]
    if empty:
        notes.append(f"{len(empty)} rows with an empty target left out, the first at {table.place(empty[0])}")
    left_out = set(empty)
    return [row for index, row in enumerate(rows) if index not in left_out]


def label_names_of(table: Table, column: str, known: list[str] | None = None) -> list[str]:
    """Class names in index order: sorted as numbers where all are whole numbers, else alphabetically.

    Args:
        table: Where the labels are.
        column: The column of the labels: all int, all bool or all str.
        known: The class names of the training rows, which these rows must keep to.

    Raises:
        UserError: A label is missing, of another type than the others, or not among the known ones.
    """
    check_column(table, column)
    column = _label_column(table, column)
    values = _label_values(table, column)
    if known is not None:
        among = set(known)
        for index, name in enumerate(values):
            if name not in among:
                raise UserError(
                    f"{table.place(index)} has the label {name!r}, which no training row has; "
                    f"remove the row or add training rows with this label"
                )
        return known
    declared = table.label_names.get(column)
    if declared is not None:
        present = set(values)
        return [name for name in declared if name in present]
    names = set(values)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _label_values(table: Table, column: str) -> list[str]:
    values = _one_type(
        table, column, (bool, int, str, float), "a label must be a whole number, a truth value or a text"
    )
    declared = table.label_names.get(column)
    names: list[str] = []
    for index, value in enumerate(values):
        if isinstance(value, float):
            if not value.is_integer():
                raise UserError(
                    f"{table.place(index)} has the label {value!r} in column {column!r}; labels are classes, "
                    f"so give whole numbers or names"
                )
            value = int(value)
        if isinstance(value, str):
            value = value.strip()
            if not value:
                raise UserError(f"{table.place(index)} has an empty label in column {column!r}; fill it in")
        if declared is not None and isinstance(value, int) and 0 <= value < len(declared):
            value = declared[value]
        elif declared is not None:
            raise UserError(
                f"{table.place(index)} has no label in column {column!r} ({value!r}); this split cannot be used"
            )
        names.append(str(value).lower() if isinstance(value, bool) else str(value))
    return names


def _label_column(table: Table, column: str) -> str:
    """Raises UserError for several columns: a class is in one."""
    names = parts(column, table.columns)
    if len(names) != 1 or is_template(column, table.columns):
        raise UserError(f"the label column {column!r} is not one column; say which one holds the classes")
    return names[0]


def _text_values(table: Table, column: str) -> list[str]:
    names = parts(column, table.columns)
    if is_template(column, table.columns):
        filled = zip(*(_written_values(table, name) for name in names), strict=True)
        return [column.format_map(dict(zip(names, values, strict=True))) for values in filled]
    joined = [_one_type(table, name, (str,), "it must be a text") for name in names]
    if len(joined) == 1:
        return joined[0]
    return ["\n".join(text for text in texts if text.strip()) for texts in zip(*joined, strict=True)]


def _written_values(table: Table, column: str) -> list[str]:
    """A column in a template: its texts, or the names of its classes."""
    if column not in table.label_names and any(isinstance(row.get(column), str) for row in table.rows[:1]):
        return _one_type(table, column, (str,), "it must be a text")
    return _label_values(table, column)


def _image_values(table: Table, column: str) -> list[Any]:
    values = [row.get(column) for row in table.rows]
    for index, value in enumerate(values):
        if getattr(value, "ndim", 0) not in (2, 3):
            raise UserError(f"{table.place(index)} has no picture in column {column!r}")
        if value.ndim != values[0].ndim or value.shape[2:] != values[0].shape[2:]:  # type: ignore[union-attr]
            raise UserError(
                f"{table.place(index)} has a picture of shape {list(value.shape)} where the first has "  # type: ignore[union-attr]
                f"{list(values[0].shape)}; give all the same channels"  # type: ignore[union-attr]
            )
    return values


def _one_type(table: Table, column: str, types: tuple[type, ...], rule: str) -> list[Any]:
    """The column's values, all of the type that the first one has."""
    values: list[Any] = []
    first: type | None = None
    for index, row in enumerate(table.rows):
        value = row.get(column)
        if value is None:
            lack = "an empty value" if column in row else "no value"
            raise UserError(f"{table.place(index)} has {lack} in column {column!r}; {rule}")
        if type(value) not in types:
            raise UserError(f"{table.place(index)} has {_kind(value)} in column {column!r}; {rule}")
        first = first or type(value)
        if type(value) is not first:
            raise UserError(
                f"{table.place(index)} has {_kind(value)} in column {column!r}, where the rows before have "
                f"{_kind(values[0])}; make the column one type"
            )
        values.append(value)
    return values


def _kind(value: object) -> str:
    kinds = {str: "a text", bool: "a truth value", int: "a whole number", float: "a decimal number"}
    named = kinds.get(type(value), f"a {type(value).__name__}")
    return f"{named} ({str(value)[:40]!r})"
