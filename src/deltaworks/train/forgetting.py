"""Forgetting: text that is not trained on, and how much worse the model has become at it."""

from __future__ import annotations

from dataclasses import dataclass

from deltaworks.core.errors import UserError
from deltaworks.train.batching import Encoded
from deltaworks.train.data import BUILT_IN, load_data
from deltaworks.train.files import Row
from deltaworks.train.recipe import Recipe
from deltaworks.train.standard_library import python_version
from deltaworks.train.tasks import Task

ROWS = 64  # enough for a mean loss, few enough to cost seconds
DEFAULT, NONE = "stdlib-text", "none"


@dataclass
class Probe:
    """The text that a run watches: what it is called in the record, and its rows encoded for the task."""

    name: str
    examples: list[Encoded]


def probe_of(recipe: Recipe, task: Task) -> Probe | None:
    """The text of a recipe, the same rows for every run; None where it asks for none or the model writes no text.

    Raises UserError for a text that cannot be read, that is trained on, or that a classifier cannot be asked for.
    """
    writes = task.name in ("causal", "seq2seq")
    source = recipe.forgetting or (DEFAULT if writes and recipe.data not in BUILT_IN else NONE)
    if source == NONE:
        return None
    if not writes:
        raise UserError(f"forgetting={source!r} needs a language model; for the task {task.name!r} leave it out")
    if source == recipe.data:
        raise UserError(f"forgetting={source!r} is what is trained on: give another text, or none")
    text = load_data(source, task="causal", test_limit=ROWS, validation=0.0)
    rows = text.test if task.name == "causal" else [halved(row) for row in text.test]
    version = f" of {python_version()}" if source in BUILT_IN else ""
    return Probe(f"{text.name}{version}, {len(rows)} texts", task.encode(rows))


def halved(row: Row) -> Row:
    """A text as a prompt and its continuation, for models with an encoder (the prefix LM of Raffel et al., 2020)."""
    if "target" in row:
        return row
    words = row["text"].split()
    middle = (len(words) + 1) // 2
    return {"prompt": " ".join(words[:middle]), "target": " ".join(words[middle:])}
