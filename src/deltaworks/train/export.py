"""``deltaworks export``: an adapter in the format of another library, or merged into its base."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deltaworks.core.delta import Delta
from deltaworks.core.errors import UserError, nearest
from deltaworks.store.checkpoint import MANIFEST, load, read_manifest
from deltaworks.store.files import claimed, read_json
from deltaworks.store.foreign import ConversionWarning, peft, writers
from deltaworks.train.columns import ROLES
from deltaworks.train.models import PUBLISHED, Loaded, load_model
from deltaworks.train.skeleton import named
from deltaworks.train.tune import RECORD, base_of, merge, save_model

MERGED = "merged"
TASKS = {"CAUSAL_LM": "causal", "SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}
"""Our tasks by those of peft."""
HEAD = re.compile(r"(^|\.)(classifier|score|head|fc|classification_head)(\.(out_proj|masters))*\.weight$")
"""The last layer of a classifier among the tensors of an adapter [classes, features]."""


def export(
    adapter: Path,
    format: str,
    out: Path,
    *,
    source: str | None = None,
    task: str | None = None,
    labels: int | None = None,
    rank: int | None = None,
) -> None:
    """Write an adapter in another format and say what that loses.

    The base is that of the adapter's recipe or configuration, or ``source`` loaded for ``task``. Without a recipe it
    keeps the dtype of its files, and its classes unless ``labels`` or the adapter's own head are another number of
    them. ``rank`` cuts the change to a LoRA of that rank. Raises UserError with the reason where the format cannot
    express the adapter.
    """
    known = [*writers(), MERGED, "deltaworks"]
    if format not in known:
        raise UserError(f"{format!r} is not a format to export to: {nearest(format, known)}")
    if format == MERGED and rank is not None:
        raise UserError("a merged model holds the whole change: leave the rank out")
    if out.resolve() == adapter.resolve():
        raise UserError(f"{str(out)!r} is the adapter itself: choose another folder")
    with claimed(out):
        _write(adapter, format, out, source, task, labels, rank)


def _write(
    adapter: Path, format: str, out: Path, source: str | None, task: str | None, labels: int | None, rank: int | None
) -> None:
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


def _attached(adapter: Path, source: str | None, task: str | None, labels: int | None) -> tuple[Loaded, Delta]:
    """The adapter on its base. Raises UserError where the base is not known, or is another."""
    if (adapter / RECORD).is_file():
        _, _, loaded = base_of(adapter, source)
        return loaded, load(loaded.model, adapter)
    said = read_json(adapter / peft.CONFIG) if peft.recognises(adapter) else {}
    if not said and not (adapter / MANIFEST).is_file():
        raise UserError(f"{str(adapter)!r} holds no adapter of deltaworks or of peft")
    base = said.get("base_model_name_or_path")
    source = source or next((name for name, published in PUBLISHED.items() if published == base), base)
    if source is None:
        raise UserError(f"{str(adapter)!r} does not say what its base is: give --model")
    wanted = task or TASKS.get(str(said.get("task_type")))
    labels = _classes(adapter) if labels is None else labels
    errors: list[UserError] = []
    for name in [wanted] if wanted else list(ROLES):
        try:
            loaded = load_model(source, name, labels=labels, dtype="auto")
        except UserError as error:
            errors.append(error)
            continue
        try:
            return loaded, load(loaded.model, adapter)
        except UserError as error:
            if wanted is not None:
                raise
            errors.append(error)
    bare = None if task else named(Path(source).expanduser())
    if bare is None:
        raise errors[0]
    return Loaded(bare, None, source, []), load(bare, adapter)


def _classes(adapter: Path) -> int:
    """How many classes the head has that an adapter holds, 0 where it holds none."""
    own = (adapter / MANIFEST).is_file()
    file = adapter / (read_manifest(adapter)["tensors"] if own else peft.WEIGHTS)
    if not file.is_file():
        return 0
    try:
        with safe_open(file, framework="pt") as tensors:
            heads = [tensors.get_slice(name).get_shape() for name in tensors.offset_keys() if HEAD.search(name)]
    except SafetensorError:  # load says what is wrong
        return 0
    return int(heads[0][0]) if len(heads) == 1 else 0
