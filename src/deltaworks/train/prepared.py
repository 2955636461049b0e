"""Data that was read once and is handed to many runs as one file, so that all of them see the same rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from deltaworks.core.errors import UserError
from deltaworks.store.files import read_json, write_atomically
from deltaworks.train.data import Data


def write_prepared(data: Data, path: Path) -> Path | None:
    """Write the rows as JSON; None where they hold pictures, which every run reads from the source again."""
    if any("image" in row for row in (*data.train[:1], *data.test[:1])):
        return None
    write_atomically(path, json.dumps(dataclasses.asdict(data), ensure_ascii=True))
    return path


def read_prepared(path: str | Path) -> Data:
    """The inverse of ``write_prepared``. Raises UserError for a file that it did not write."""
    values: Any = read_json(path)
    try:
        return Data(**values)
    except TypeError as error:
        raise UserError(f"{str(path)!r} is not prepared data ({error}): remove it and start again") from None
