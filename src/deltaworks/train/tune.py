"""``deltaworks tune`` and ``deltaworks merge``: one recipe to an adapter folder, one adapter folder to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from deltaworks.core.errors import UserError
from deltaworks.store.checkpoint import load
from deltaworks.store.files import check_writable, replacing, write_atomically
from deltaworks.store.hub import CARD
from deltaworks.store.records import Record, read_record
from deltaworks.train.card import card_of_run
from deltaworks.train.devices import join
from deltaworks.train.examine import output_of
from deltaworks.train.loop import train
from deltaworks.train.models import Loaded, load_model
from deltaworks.train.recipe import Recipe, read_recipe
from deltaworks.train.stage import Stage, read_data
from deltaworks.train.tasks import make_task

RECORD, RECIPE = "record.json", "recipe.yaml"


def tune(recipe: Recipe) -> Record:
    """Train as a recipe says, with progress on the terminal; the adapter, its record, recipe and card go to ``out``.

    Where several processes were started together, they share the work, and the main one does what is seen of it.
    Raises UserError before the training for what the user can mend, and where the run diverged.
    """
    from rich.console import Console

    from deltaworks.train.bars import bars

    if recipe.out is None:
        raise UserError("the recipe says nowhere to save the adapter: add out=FOLDER")
    team = join(recipe.device)
    folder = check_writable(recipe.out) if team.main else Path(recipe.out)
    console = Console(quiet=not team.main)
    config = recipe.config()
    with bars(console) as progress:
        bar = progress.add_task(str(config), total=1.0, note="loading")

        def tell(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                done = (event["rate"] + event["step"] / event["steps"]) / event["rates"]
                progress.update(bar, completed=done, note=f"step {event['step']}, loss {event['loss']:.3f}")
            elif event["event"] == "test":
                progress.update(bar, completed=1.0, note="testing")
            if "validation" in event:
                console.print(f"step {event['step']}: validation {event['validation']:.4f}", highlight=False)

        record = train(recipe, team=team, adapter=folder, tell=tell)
    if team.main:
        _write(folder, recipe, record)
    if record.status != "finished":
        raise UserError(f"the run {record.status}, so no adapter is saved: {record.message}; try a smaller rate")
    if record.test is not None and record.test.score is not None:
        console.print(f"test {record.test.metric} {record.test.score:.4f}", highlight=False)
    console.print(f"adapter, record and card: {folder}", highlight=False, markup=False, soft_wrap=True)
    return record


def _write(folder: Path, recipe: Recipe, record: Record) -> None:
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / RECORD, text + "\n")
    chosen = recipe.model_dump(exclude_none=True, exclude={"out"})
    write_atomically(folder / RECIPE, yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
    write_atomically(folder / CARD, card_of_run(recipe, record, folder))


def base_of(adapter: Path, source: str | None) -> tuple[Recipe, Record, Loaded]:
    """The base model that ``tune`` trained an adapter on, loaded again. Raises UserError where it cannot be known."""
    for name in (RECORD, RECIPE):
        if not (adapter / name).is_file():
            raise UserError(f"{str(adapter)!r} has no {name}, so its base is not known: use the folder that tune wrote")
    record, recipe = read_record(adapter / RECORD), read_recipe(adapter / RECIPE)
    shape = None
    if record.data.task == "images":
        shape = read_data(recipe).train[0]["image"].shape
    loaded = load_model(
        source or recipe.model,
        record.data.task,
        labels=record.data.labels or None,
        dtype=recipe.dtype,
        seed=recipe.seed,
        image_shape=shape,
        quantization=recipe.quantization,
    )
    return recipe, record, loaded


def merge(adapter: Path, out: Path, source: str | None = None, *, requantize: bool = False) -> float:
    """Merge an adapter into its base, save the model, and tell how far its outputs are on a probe.

    A quantized base is made plain, or quantized again with ``requantize``. Returns the largest absolute difference of
    an output. Raises UserError where it cannot be merged or saved.
    """
    recipe, record, loaded = base_of(adapter, source)
    delta = load(loaded.model, adapter)
    if reason := delta.limit("merge"):
        raise UserError(f"{delta.config} cannot be merged: {reason}")
    check_writable(out)
    data = read_data(recipe)
    task = make_task(record.data.task, loaded.processor, recipe.max_length)
    probe = task.encode(data.test[:8])
    stage = Stage(recipe, delta.config, data, loaded, task, torch.device("cpu"), [], [], probe)
    before = output_of(stage)
    cut = delta.cut
    delta.merge(keep_base=False, requantize=requantize)
    if cut is not None:
        cut.fill()  # the model's configuration, by which others load the files, knows its whole sizes alone
    after = output_of(stage)
    difference = float((before.double() - after.double()).abs().max())
    scale = float(before.double().abs().max())
    print(f"largest output difference, merged to unmerged: {difference:.2g} (outputs up to {scale:.2g})")
    save_model(loaded.model, loaded.processor, out)
    print(f"merged model: {out}")
    return difference


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """With ``save_pretrained`` where the model has it, else its state as safetensors."""
    if hasattr(model, "save_pretrained"):
        try:
            model.save_pretrained(folder)
            if hasattr(processor, "save_pretrained"):
                processor.save_pretrained(folder)
        except OSError as error:
            raise UserError(f"the merged model cannot be written to {str(folder)!r}: {error.strerror}") from None
        return
    _save_state(model, folder)


def _save_state(model: nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model as save_tensors

    try:
        with replacing(folder / "model.safetensors") as temporary:
            save_tensors(model, str(temporary))  # shared tensors are written once
    except SafetensorError as error:
        raise UserError(f"the merged model cannot be written to {str(folder)!r}: {error}") from None
