"""Picture arrays from .npz files: which array holds what, and one uint8 layout for all of them."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from deltaworks.core.errors import UserError
from deltaworks.train.files import Row, Table

if TYPE_CHECKING:
    import numpy

IMAGE_KEYS = ("x", "images", "image", "data", "pixels")
LABEL_KEYS = ("y", "labels", "label", "target", "targets", "classes", "char")
SPLIT_KEYS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test",)}
CHANNELS = (1, 3, 4)


def read_image_arrays(path: Path) -> dict[str, Table]:
    """Pictures and their labels: keys such as ``x_train, y_train, x_test, y_test`` or ``images, labels``.

    Rows are ``{"image": uint8 [height, width(, channels)], "label": int or str}``; further arrays with one
    entry per picture become columns too.

    Raises:
        UserError: The file is broken, holds pickled objects, or no array is a stack of pictures.
    """
    arrays = _read_arrays(path)
    splits: dict[str, Table] = {}
    for split, endings in SPLIT_KEYS.items():
        for ending in endings:
            of_split = {
                name.lower().removesuffix("_" + ending).removeprefix(ending + "_"): array
                for name, array in arrays.items()
                if name.lower().endswith("_" + ending) or name.lower().startswith(ending + "_")
            }
            if of_split:
                splits[split] = _table(path, f"{path} [{split}]", of_split)
    if "train" not in splits:
        splits = {"train": _table(path, str(path), arrays)}
    return splits


def _read_arrays(path: Path) -> "dict[str, numpy.ndarray]":
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
            raise UserError(
                f"{path} holds pickled Python objects, which are never loaded; save plain number arrays"
            ) from error
        raise UserError(f"{path} is not a whole .npz file of arrays; copy or save it again") from error


def _table(path: Path, source: str, arrays: "dict[str, numpy.ndarray]") -> Table:
    images_key = next((key for key in IMAGE_KEYS if key in arrays and arrays[key].ndim in (3, 4)), None)
    if images_key is None:
        stacks = [key for key, array in arrays.items() if array.ndim in (3, 4) and array.dtype == "uint8"]
        if len(stacks) != 1:
            shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in arrays.items())
            raise UserError(
                f"{source} holds no array named like 'images' or 'x_train' with the shape "
                f"[pictures, height, width(, channels)]; it holds {shapes or 'nothing'}"
            )
        images_key = stacks[0]
    images = _as_bytes(source, images_key, arrays[images_key])
    labels_key = next((key for key in LABEL_KEYS if key in arrays and key != images_key), None)
    columns = {"image": list(images)}
    for key, array in arrays.items():
        if key == images_key:
            continue
        name = "label" if key == labels_key else key
        values = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
        if values.ndim != 1:
            continue
        if len(values) != len(images):
            if key == labels_key:
                raise UserError(
                    f"{source} holds {len(images)} pictures in {images_key!r} but {len(values)} labels in "
                    f"{key!r}; they must be as many"
                )
            continue
        columns[name] = values.tolist()
    rows: list[Row] = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return Table.of(source, rows, "picture")


def _as_bytes(source: str, key: str, images: "numpy.ndarray") -> "numpy.ndarray":
    """The pictures as uint8 with the channels last."""
    import numpy

    if images.ndim == 4 and images.shape[-1] not in CHANNELS:
        if images.shape[1] not in CHANNELS:
            raise UserError(
                f"{source}, {key!r} has the shape {list(images.shape)}: neither its second nor its last axis "
                f"is 1, 3 or 4 channels"
            )
        images = numpy.moveaxis(images, 1, -1)
    if images.dtype == numpy.uint8:
        return images
    if images.dtype.kind not in "biuf" or not numpy.isfinite(images).all():
        raise UserError(f"{source}, {key!r} must hold finite numbers, not {images.dtype} values with gaps")
    low, high = float(images.min(initial=0)), float(images.max(initial=0))
    if low < 0 or high > 255:
        raise UserError(f"{source}, {key!r} ranges from {low:g} to {high:g}; use 0 to 255, or 0 to 1")
    scale = 255.0 if images.dtype.kind in "bf" and high <= 1 else 1.0
    return numpy.rint(images.astype(numpy.float32) * scale).astype(numpy.uint8)
