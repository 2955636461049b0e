"""Data sets and models of the Hugging Face Hub, and what to say when it cannot be reached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaworks.core.errors import UserError
from deltaworks.store.hub import hub_is_reachable
from deltaworks.train.files import SPLIT_NAMES, Row, Table


def cached_model(name: str) -> Path | None:
    """The folder of a model in the local Hub cache, without any network; None where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def read_hub_dataset(name: str) -> dict[str, Table]:
    """The splits of a Hub data set, ``"owner/name"`` or ``"owner/name:configuration"``.

    Raises:
        UserError: The Hub cannot be reached and the data set is not in the local cache, or it cannot be read.
    """
    import datasets

    identifier, _, configuration = name.partition(":")
    reachable = hub_is_reachable()
    download = datasets.DownloadConfig(local_files_only=not reachable)
    offline_before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline_before or not reachable
    try:
        found = datasets.load_dataset(identifier, configuration or None, download_config=download)
    except Exception as error:  # the client raises many kinds; each ends in the same mend
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        if not reachable:
            raise UserError(
                f"the data set {name!r} is no local file or folder, and the Hugging Face Hub cannot be reached "
                "from here and has no cached copy of it; give a local path (for a protocol: --data-root) or "
                "'stdlib-docs'"
            ) from error
        raise UserError(f"the data set {name!r} could not be loaded from the Hub: {reason}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline_before
    return _tables(name, found)


def read_saved_dataset(folder: Path) -> dict[str, Table]:
    """The splits of a folder written by ``datasets.Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder} is not a whole saved data set ({error}); save it again") from error
    return _tables(str(folder), found)


def _tables(name: str, found: Any) -> dict[str, Table]:
    if not isinstance(found, Mapping):
        return {"train": _table(name, found)}
    known = {stem: split for split, stems in SPLIT_NAMES.items() for stem in stems}
    splits: dict[str, Table] = {}
    for split, dataset in found.items():
        role = known.get(str(split))
        if role is not None and role not in splits:
            splits[role] = _table(f"{name} [{split}]", dataset)
    if not splits:
        raise UserError(f"{name} has the splits {', '.join(map(str, found))}, none of which is 'train'")
    if "train" not in splits:
        return {"train": next(iter(splits.values()))}
    if "test" in splits and _labels_are_secret(splits["test"]):
        del splits["test"]
        if "validation" in splits:
            splits["test"] = splits.pop("validation")
            splits["test"].notes.append("the labels of the test split are secret: its validation split is the test")
    return splits


def _labels_are_secret(table: Table) -> bool:
    """Whether a class column is -1 throughout, as benchmarks with a leaderboard publish their test rows."""
    return any(all(row[column] == -1 for row in table.rows) for column in table.label_names)


def _table(source: str, dataset: Any) -> Table:
    rows: list[Row] = [_plain(row) for row in dataset]
    table = Table.of(source, rows, "row")
    for column, feature in dataset.features.items():
        if hasattr(feature, "names") and hasattr(feature, "int2str"):  # a ClassLabel
            table.label_names[column] = list(feature.names)
    return table


def _plain(row: Row) -> Row:
    """The row with pictures as uint8 arrays [height, width(, channels)]."""
    import numpy

    return {
        name: numpy.asarray(value.convert("RGB") if value.mode not in ("L", "RGB") else value, dtype=numpy.uint8)
        if hasattr(value, "convert") and hasattr(value, "mode")
        else value
        for name, value in row.items()
    }
