"""An adapter on disk: ``adapter.json`` names one safetensors file; both are written so that a crash loses nothing.

The tensors go to a file named after their own hash first; replacing ``adapter.json`` is the single step that makes
them the adapter. Nothing is unpickled. A checkpoint holds the trained values, and a few values of the base by
which another base is recognised.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaworks.core.delta import Delta, attach
from deltaworks.core.errors import UserError
from deltaworks.core.registry import as_data, from_data
from deltaworks.core.sharding import whole
from deltaworks.store import foreign
from deltaworks.store.files import check_writable, read_json, write_atomically
from deltaworks.store.hub import located
from deltaworks.store.positions import expanded, squeezed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FORMAT = 1
MANIFEST = "adapter.json"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


PROPER: dict[str, Callable[[Any], bool]] = {
    "format": _is_count,
    "methods": lambda value: bool(value) and _are(dict, value),
    "also": lambda value: _are(str, value),
    "seed": _is_count,
    "tensors": lambda value: isinstance(value, str) and bool(value),
    "sha256": lambda value: isinstance(value, str),
    "base": lambda value: isinstance(value, dict) and isinstance(value.get("values"), dict),
}
"""What the keys of a manifest must hold."""


def save(
    delta: Delta, folder: str | Path, *, training: bool = False, format: str = "deltaworks", rank: int | None = None
) -> Path:
    """Write an adapter. ``training`` also keeps what only further training needs. Raises UserError for a bad path.

    Other formats are those of ``store.foreign``; there ``rank`` allows to cut the change to a LoRA of that rank.
    """
    from safetensors.torch import save as serialize

    folder = Path(folder)
    if format != "deltaworks":
        if training:
            raise UserError(f"the state of a training is kept in our own format alone: save it without {format=}")
        foreign.writer(format).write(delta, folder, rank)
        return folder
    if rank is not None:
        raise UserError("rank cuts an adapter for another format: give format='peft' with it")
    check_writable(folder)
    tensors = {key: value.detach().cpu().contiguous() for key, value in delta.tensors(training=training).items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"tensor {key!r} holds values that are not finite, so {delta.name!r} is not saved")
    progress = pack(delta.procedure.state(), tensors, "procedure") if training else None
    blob = serialize(squeezed(tensors))
    file = f"adapter-{hashlib.sha256(blob).hexdigest()[:12]}.safetensors"
    manifest = {
        "format": FORMAT,
        "name": delta.name,
        "methods": as_data(delta.config),
        "also": delta.also,
        "tied": delta.tied,
        "seed": delta.seed,
        "training": training,
        "tensors": file,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "base": delta.base,
    }
    if training:
        manifest["procedure"] = progress
    write_atomically(folder / file, blob)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2))
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != file:
            old.unlink(missing_ok=True)
    return folder


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The checked description of a saved adapter. Raises UserError where it is not one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no adapter folder {str(folder)!r}")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{str(folder)!r} holds no {MANIFEST}: it is not an adapter saved by deltaworks")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise UserError(f"{str(folder / MANIFEST)!r} does not describe an adapter: it is damaged or something else")
    for key, is_proper in PROPER.items():
        if not is_proper(manifest.get(key)):
            raise UserError(f"{str(folder / MANIFEST)!r} lacks a proper {key!r}: it is damaged or not an adapter")
    if manifest["format"] > FORMAT:
        raise UserError(f"{str(folder)!r} was written by a newer deltaworks (format {manifest['format']}): update")
    if Path(manifest["tensors"]).name != manifest["tensors"]:
        raise UserError(f"{str(folder / MANIFEST)!r} names a file outside its folder: {manifest['tensors']!r}")
    return manifest


def read_tensors(folder: str | Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Raises UserError for a truncated, changed or foreign file."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialize

    path = Path(folder) / manifest["tensors"]
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if hashlib.sha256(blob).hexdigest() != manifest["sha256"]:
        raise UserError(f"{str(path)!r} is truncated or was changed since it was saved: copy or train it again")
    try:
        return expanded(deserialize(blob))
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} is not a safetensors file ({error})") from None


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    any_base: bool = False,
    revision: str | None = None,
) -> Delta:
    """Attach a saved adapter to its base model. Strict: every tensor must have its place, and all places a tensor.

    ``folder`` is a path of this machine, or an id on the Hugging Face Hub ("user/name") with its ``revision``.
    Formats of other libraries are recognised (see ``store.foreign``). ``any_base`` skips the comparison with the base
    that it was trained on. Raises UserError, and leaves the model as it was, for anything that does not fit.
    """
    folder = located(folder, revision)
    if not (folder / MANIFEST).is_file() and (format := foreign.recognised(folder)) is not None:
        return format.read(model, folder, name or "default")
    manifest = read_manifest(folder)
    tensors = read_tensors(folder, manifest)
    config = from_data(manifest["methods"])
    chosen = name or str(manifest.get("name", "default"))
    delta = attach(model, config, name=chosen, **_start(manifest))
    try:
        _fill(delta, folder, manifest, tensors, any_base)
    except BaseException:
        delta.detach()
        raise
    return delta


def _start(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter was attached with, beside its method. Files without "tied" are from before it was a choice."""
    return {"also": manifest["also"], "seed": manifest["seed"], "tied": manifest.get("tied") is True}


def resume(delta: Delta, folder: str | Path) -> None:
    """Put an adapter and its procedure back to the state of a checkpoint that was saved with ``training=True``.

    Raises UserError where the checkpoint is of another method or base, or holds no state of a training.
    """
    manifest = read_manifest(folder)
    if not manifest.get("training"):
        raise UserError(f"{str(folder)!r} holds a finished adapter, not a checkpoint of its training: load it instead")
    if (saved := from_data(manifest["methods"])) != delta.config:
        raise UserError(f"{str(folder)!r} is a checkpoint of '{saved}', not of '{delta.config}'")
    if (start := _start(manifest)) != {"also": delta.also, "seed": delta.seed, "tied": delta.tied}:
        mend = "attach with " + ", ".join(f"{key}={value!r}" for key, value in start.items())
        raise UserError(f"{str(folder)!r} is a checkpoint of another start: {mend}")
    _fill(delta, folder, manifest, read_tensors(folder, manifest), any_base=False)


def _fill(
    delta: Delta, folder: str | Path, manifest: Mapping[str, Any], tensors: dict[str, Tensor], any_base: bool
) -> None:
    """Tensors and, where they are there, the procedure's state into a fitting adapter."""
    if not any_base:
        check_base(manifest["base"], delta.base, folder)
    training = bool(manifest.get("training"))
    progress = unpack(manifest.get("procedure", {}), tensors)
    with whole(delta, write=True):
        for key, own in delta.tensors(training=training).items():
            found = tensors.get(key, own)
            if found.is_floating_point() != own.is_floating_point():
                raise UserError(f"the checkpoint's tensor {key!r} is of type {found.dtype}, not {own.dtype}")
        delta.restore(tensors, training=training)
    if training:
        try:
            delta.procedure.resume(progress)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{str(folder)!r} holds no state that '{delta.config}' can resume from: {error}") from None


def pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """A procedure's state as JSON data: each tensor moves to ``tensors`` and leaves its name there."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {key: pack(inner, tensors, f"{path}/{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [pack(inner, tensors, f"{path}/{index}") for index, inner in enumerate(value)]
    return value


def unpack(data: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``pack``; takes its tensors out of ``tensors``. Raises UserError for one that is not there."""
    if isinstance(data, dict) and data.keys() == {"tensor"} and isinstance(data["tensor"], str):
        if data["tensor"] not in tensors:
            raise UserError(f"the checkpoint misses {data['tensor']!r}")
        return tensors.pop(data["tensor"])
    if isinstance(data, dict):
        return {key: unpack(inner, tensors) for key, inner in data.items()}
    return [unpack(inner, tensors) for inner in data] if isinstance(data, list) else data


def check_base(saved: Mapping[str, Any], found: Mapping[str, Any], folder: str | Path) -> None:
    """Raises UserError where an adapter was trained on another base (values within bfloat16 rounding agree)."""
    mend = "load it on its own base, or pass any_base=True"
    if saved.get("parameters") != found["parameters"]:
        raise UserError(
            f"{str(folder)!r} was trained on a base with {saved.get('parameters')} parameters, "
            f"this {found['class']} has {found['parameters']}: {mend}"
        )
    for name, values in found["values"].items():
        other = saved.get("values", {}).get(name)
        if other is None:
            continue
        near = torch.isclose(torch.tensor(values), torch.tensor(other), rtol=1e-2, atol=1e-4)
        if not bool(near.all()):
            raise UserError(f"{str(folder)!r} was trained on a base whose {name} holds other values: {mend}")
