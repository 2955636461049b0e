"""Checkpoints of huggingface/peft 0.21: ``adapter_config.json`` beside ``adapter_model.safetensors``.

The methods are the rows of ``peft_types.TYPES``. Patterns that give modules a rank of their own become members of a
composition; trained biases become ``bitfit``; ``modules_to_save`` is our ``also``. An adapter whose method peft has
not is written as LoRA: exactly where its change is low-rank factors, else cut to a rank, with the error said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deltaworks.core.delta import Delta, attach
from deltaworks.core.errors import UserError
from deltaworks.core.registry import Config
from deltaworks.store.files import check_writable, read_json
from deltaworks.store.foreign import lost
from deltaworks.store.foreign.peft_config import STARTS, Plan, as_plain, plan, row_of, rows_of, usual
from deltaworks.store.foreign.peft_matrices import unstacked
from deltaworks.store.foreign.peft_slots import (
    TOKENS,
    check_whole,
    narrowed,
    same,
    slots,
    without_repeated,
    without_twins,
)
from deltaworks.store.foreign.peft_written import made_for_twins, written
from deltaworks.store.foreign.targets import is_tied, module_names
from deltaworks.store.foreign.tensors import check_fit, read_tensors, widened, write_json, write_tensors

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KERNELS = (".hada_t1", ".hada_t2", ".lokr_t2")
"""The factors that ``use_effective_conv2d`` makes of kernels."""


def recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def understands(spec: Any) -> bool:
    """Whether this is a configuration object of peft, or the content of an ``adapter_config.json``."""
    return (isinstance(spec, Mapping) and "peft_type" in spec) or (
        hasattr(spec, "peft_type") and hasattr(spec, "to_dict")
    )


def translated(model: nn.Module, spec: Any, seed: int) -> tuple[Config, list[str], int, bool]:
    """What to attach for a configuration of theirs: configuration, ``also``, seed, ``tied``. Raises UserError."""
    data = as_plain(spec)
    row = row_of(data)
    if row.made:
        raise UserError(f"peft's {row.peft} is no method here: only what it has made can be loaded, as {row.method}")
    start = next((data[name] for name in STARTS if name in data), True)
    if start == "gaussian":
        lost("init_lora_weights='gaussian': here A starts uniform, as nn.Linear does")
    elif start not in row.starts:
        raise UserError(f"peft's start {start!r} is not held for {row.peft}: choose one of {row.starts}")
    for field, value in row.begins.items():
        if data.get(field, value) != value:
            lost(f"{field}={data[field]!r} acts in training alone and is not held for {row.peft}: here it is {value!r}")
    if data.get("target_modules") is None and not row.whole:
        data["target_modules"] = [] if data.get("target_parameters") else usual(model, row, "TARGET_MODULES")
        if data["target_modules"] is None:
            of = type(model).__name__
            raise UserError(f"peft's {row.peft} needs target_modules for {of}: name the modules to adapt")
    if "feedforward_modules" in row.sited and data.get("feedforward_modules") is None:
        data["feedforward_modules"] = usual(model, row, "FEEDFORWARD_MODULES")
    made = plan(data, model, fresh=True)
    return made.config, made.also, seed if made.seed is None else made.seed, is_tied(data)


def read(model: nn.Module, folder: Path, name: str) -> Delta:
    """Attach a checkpoint of peft. Raises UserError that lists what is missing, extra or misshapen."""
    data = _configuration(folder)
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise UserError(
            f"{str(folder / PICKLED)!r} is a pickle, which can run any code and is not read here: load it with peft "
            "and save it again, as safetensors"
        )
    return attached(model, data, read_tensors(folder / WEIGHTS), folder / WEIGHTS, name)


def _configuration(folder: Path) -> dict[str, Any]:
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict) or "peft_type" not in data:
        raise UserError(f"{str(folder / CONFIG)!r} does not name a peft_type: it is no configuration of peft")
    return data


def described(folder: Path) -> dict[str, str]:
    """What a checkpoint says of itself, without a model. Raises UserError where it is none."""
    data = _configuration(folder)
    row = row_of(data)
    options = {own.theirs: data[own.theirs] for own in row.fields if data.get(own.theirs, own.default) != own.default}
    chosen = data.get("target_modules") or "the model"
    return {
        "adapter": f"{row.peft} of peft" + "".join(f", {key}={value}" for key, value in options.items()),
        "targets": chosen if isinstance(chosen, str) else ", ".join(chosen),
        "also trained": ", ".join(data.get("modules_to_save") or []) or "nothing",
        "base": str(data.get("base_model_name_or_path") or "not said"),
    }


def attached(model: nn.Module, data: Mapping[str, Any], tensors: dict[str, Any], path: Path, name: str) -> Delta:
    """Attach what a configuration and the tensors of a file say. Raises UserError as ``read`` does."""
    tensors = widened(tensors)
    if not any(key.endswith(KERNELS) for key in tensors):  # the option made none
        data = {key: value for key, value in data.items() if key != "use_effective_conv2d"}
    made = plan(data, model, _resized(model, row_of(data).prefix, tensors))
    for own, rows in rows_of(data, model, module_names(model)).items():  # ours are in ascending order
        key = f"{made.row.prefix}{own}{TOKENS}"
        if key in tensors and len(tensors[key]) == len(rows):
            tensors = tensors | {key: tensors[key][sorted(range(len(rows)), key=rows.__getitem__)]}
    delta = attach(model, made.config, name=name, also=made.also, seed=made.seed or 0, tied=is_tied(data))
    try:
        _fill(delta, path, made, tensors)
    except BaseException:
        delta.detach()
        raise
    return delta


def _fill(delta: Delta, path: Path, made: Plan, tensors: dict[str, Any]) -> None:
    tensors = unstacked(delta, made.row.prefix, tensors)
    places, stored = list(slots(delta, made.row)), delta.tensors().keys()
    tensors = without_repeated(delta, made.row, tensors, {slot.theirs for slot in places})
    tensors, copies = without_twins(delta, narrowed(places, tensors))
    # what is made again, or shared with another slot, may be left out
    needed = [slot for slot in places if slot.theirs in tensors or slot.ours in stored]
    check_fit(path, tensors, {slot.theirs: slot.shape for slot in needed})
    check_whole(path, needed, tensors)
    delta.restore({slot.ours: slot.read(tensors[slot.theirs]) for slot in needed if slot.ours in stored})
    again = {slot.theirs: slot.current() for slot in needed if slot.ours not in stored} | made_for_twins(delta)
    saved = {slot.theirs for slot in needed if slot.spot.tuner.config is None}
    for key, value in (copies | {slot.theirs: slot.read(tensors[slot.theirs]) for slot in needed}).items():
        if key in again and not same(again[key], value):
            if key in saved:
                raise UserError(
                    f"{str(path)!r}: {key!r} and the weight that it is tied to were trained apart: untie them first, "
                    "by loading the model with tie_word_embeddings=False"
                )
            raise UserError(f"{str(path)!r}: {key!r} is not what its seed, or the weight that it is tied to, makes")


def _resized(model: nn.Module, prefix: str, tensors: Mapping[str, Any]) -> list[str]:
    """Embeddings that the file holds as a whole though nothing names them, as peft writes them once resized."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, get)() if hasattr(model, get) else None
        path = (
            next((path for path, own in model.named_modules() if own is module), None) if module is not None else None
        )
        if path is not None and f"{prefix}{path}.weight" in tensors:
            found.append(path)
    return found


def write(delta: Delta, folder: Path, rank: int | None = None) -> None:
    """Write an adapter as peft does; ``rank`` cuts its change to a LoRA of that rank. Raises UserError."""
    check_writable(folder)
    data, tensors = written(delta, rank)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, data)
