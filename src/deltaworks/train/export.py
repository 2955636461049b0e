"""``deltaworks export``: an adapter in the format of another library, or merged into its base."""

from __future__ import annotations

import warnings
from pathlib import Path

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError, nearest
from deltaworks.store.checkpoint import MANIFEST, load
from deltaworks.store.files import check_writable, read_json
from deltaworks.store.foreign import ConversionWarning, peft, writers
from deltaworks.train.columns import ROLES
from deltaworks.train.models import Loaded, load_model
from deltaworks.train.skeleton import named
from deltaworks.train.tune import RECORD, base_of, merge, save_model

MERGED = "merged"
TASKS = {"CAUSAL_LM": "causal", "SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}
"""Our tasks by those of peft."""


def export(
    adapter: Path,
    format: str,
    out: Path,
    *,
    source: str | None = None,
    task: str | None = None,
    labels: int = 2,
    rank: int | None = None,
) -> None:
    """Write an adapter in another format and say what that loses.

    The base is that of the adapter's recipe or configuration, or ``source`` loaded for ``task``; a classifier's has
    ``labels`` classes. ``rank`` cuts the change to a LoRA of that rank. Raises UserError with the reason where the
    format cannot express the adapter.
    """
    known = [*writers(), MERGED, "deltaworks"]
    if format not in known:
        raise UserError(f"{format!r} is not a format to export to: {nearest(format, known)}")
    if format == MERGED and rank is not None:
        raise UserError("a merged model holds the whole change: leave the rank out")
    check_writable(out)
    if out.resolve() == adapter.resolve():
        raise UserError(f"{str(out)!r} is the adapter itself: choose another folder")
    if format == MERGED and (adapter / RECORD).is_file():
        merge(adapter, out, source)
        return
    loaded, delta = _attached(adapter, source, task, labels)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConversionWarning)
        if format == MERGED:
            cost = delta.merge(keep_base=False)
            save_model(loaded.model, loaded.processor, out)
            print(f"largest rounding of an output of one layer, for an input of length one: {cost:.2g}")
        else:
            delta.save(out, format=format, rank=rank)
    for text in dict.fromkeys(str(one.message) for one in said if issubclass(one.category, ConversionWarning)):
        print(f"lost: {text}")
    print(f"{format}: {out}")


def _attached(adapter: Path, source: str | None, task: str | None, labels: int) -> tuple[Loaded, Delta]:
    """The adapter on its base. Raises UserError where the base is not known, or is another."""
    if (adapter / RECORD).is_file():
        _, _, loaded = base_of(adapter, source)
        return loaded, load(loaded.model, adapter)
    said = read_json(adapter / peft.CONFIG) if peft.recognises(adapter) else {}
    if not said and not (adapter / MANIFEST).is_file():
        raise UserError(f"{str(adapter)!r} holds no adapter of deltaworks or of peft")
    source = source or said.get("base_model_name_or_path")
    if source is None:
        raise UserError(f"{str(adapter)!r} does not say what its base is: give --model")
    task = task or TASKS.get(str(said.get("task_type")))
    errors: list[UserError] = []
    for name in [task] if task else list(ROLES):
        try:
            loaded = load_model(source, name, labels=[str(label) for label in range(labels)])
            return loaded, load(loaded.model, adapter)
        except UserError as error:
            errors.append(error)
    model = None if task else named(Path(source).expanduser())
    if model is None:
        raise errors[0]
    return Loaded(model, None, source, []), load(model, adapter)
