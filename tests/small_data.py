"""A data set that a tiny model learns in seconds: which of four letters a text holds most."""

import json
import random
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "model": "tiny_models:classifier",
    "steps": 20,
    "batch_size": 8,
    "curve_points": 2,
    "max_length": 16,
    "validation": 0.2,
    "rates": [1e-2],
}
"""A recipe, but for its data, that trains in a second."""


def write_letters(folder: Path, count: int = 160) -> Path:
    """A file of rows with "text" and "label"."""
    chance = random.Random(0)
    rows = []
    for index in range(count):
        label = "abcd"[index % 4]
        text = "".join(label if chance.random() < 0.7 else chance.choice("abcd") for _ in range(12))
        rows.append(json.dumps({"text": text, "label": label}))
    path = folder / "letters.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path
