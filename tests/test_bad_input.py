"""Checkpoints that are damaged, foreign or false, and folders that cannot take a file: one sentence, nothing lost."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn
from zoo import ZOO

import deltaworks as dw
from deltaworks.core.errors import UserError

Damage = Callable[[Path, dict[str, Any], Path], None]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A saved adapter whose values are not those of a fresh one."""
    model, _ = ZOO["bert"]()
    delta = dw.attach(model, "lora[rank=2]", also=["head"])
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1)
    return delta.save(tmp_path / "adapter")


def sealed(folder: Path, manifest: dict[str, Any], blob: bytes) -> None:
    """Write a checkpoint whose hash is right, as somebody who forges one would."""
    (folder / manifest["tensors"]).write_bytes(blob)
    manifest["sha256"] = hashlib.sha256(blob).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(manifest))


def changed(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    """Damage to the tensors behind a right hash."""

    def damage(folder: Path, manifest: dict[str, Any], file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        sealed(folder, manifest, save(tensors))

    return damage


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in sorted(tensors) if key.endswith(".A"))


def truncated(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def truncated_and_sealed(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    sealed(folder, manifest, file.read_bytes()[:-10])


def oversized(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 4096)


def oversized_and_sealed(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    sealed(folder, manifest, file.read_bytes() + b"\0" * 4096)


def absurd_header(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    sealed(folder, manifest, (2**62).to_bytes(8, "little") + b"{}")


def pickled(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    torch.save({"x": torch.ones(2)}, file)
    sealed(folder, manifest, file.read_bytes())


def empty(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    file.write_bytes(b"")


def gone(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    file.unlink()


def a_folder(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    file.unlink()
    file.mkdir()


def elsewhere(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    (folder / "adapter.json").write_text(json.dumps({**manifest, "tensors": "../adapter.safetensors"}))


def set_key(key: str, value: Any) -> Damage:
    def damage(folder: Path, manifest: dict[str, Any], file: Path) -> None:
        (folder / "adapter.json").write_text(json.dumps({**manifest, key: value}))

    return damage


def half_manifest(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    text = (folder / "adapter.json").read_text()
    (folder / "adapter.json").write_text(text[: len(text) // 2])


def a_list(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    (folder / "adapter.json").write_text("[1]")


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = torch.zeros(3, 32)


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)].T.contiguous()


def enormous(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = torch.zeros(64, 4096)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)][0, 0] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)][0, 0] = float("inf")


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)].to(torch.int64)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first(tensors)]


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bert.somewhere.A"] = torch.zeros(2)


CASES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncated, "truncated or was changed"),
    "truncated and sealed": (truncated_and_sealed, "not a safetensors file"),
    "oversized": (oversized, "truncated or was changed"),
    "oversized and sealed": (oversized_and_sealed, "not a safetensors file"),
    "absurd header": (absurd_header, "not a safetensors file"),
    "pickled": (pickled, "not a safetensors file"),
    "empty": (empty, "truncated or was changed"),
    "gone": (gone, "cannot be read"),
    "a folder": (a_folder, "cannot be read"),
    "elsewhere": (elsewhere, "outside its folder"),
    "half a manifest": (half_manifest, "cut off|not JSON"),
    "newer format": (set_key("format", 99), "newer deltaworks"),
    "no seed": (set_key("seed", None), "lacks a proper 'seed'"),
    "truth for a number": (set_key("seed", True), "lacks a proper 'seed'"),
    "no methods": (set_key("methods", []), "lacks a proper 'methods'"),
    "unknown method": (set_key("methods", [{"method": "lorra"}]), "did you mean 'lora'"),
    "unknown option": (set_key("methods", [{"method": "lora", "rnk": 2}]), "did you mean 'rank'"),
    "other rank": (set_key("methods", [{"method": "lora", "rank": 3}]), "shape"),
    "absurd rank": (set_key("methods", [{"method": "lora", "rank": 10**9}]), "rank"),
    "foreign head": (set_key("also", ["nothing.here"]), "nothing.here"),
    "also of numbers": (set_key("also", [3]), "lacks a proper 'also'"),
    "a name with a slash": (set_key("name", "../x"), "letters, digits"),
    "a base of words": (set_key("base", {"parameters": "many", "values": []}), "lacks a proper 'base'"),
    "a base of nothing": (set_key("base", {"parameters": None, "values": {}}), "another base|with None parameters"),
    "a list": (a_list, "does not describe an adapter"),
    "wrong shape": (changed(wrong_shape), "shape"),
    "transposed": (changed(transposed), "shape"),
    "enormous": (changed(enormous), "shape"),
    "nan": (changed(not_a_number), "not finite"),
    "infinite": (changed(infinite), "not finite"),
    "integers": (changed(integers), "of type torch.int64, not torch.float32"),
    "missing": (changed(missing), "misses"),
    "extra": (changed(extra), "no place for"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_one_sentence_and_leaves_the_model_alone(case: str, adapter: Path) -> None:
    damage, sentence = CASES[case]
    manifest = json.loads((adapter / "adapter.json").read_text())
    damage(adapter, manifest, adapter / manifest["tensors"])
    model, _ = ZOO["bert"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=sentence) as caught:
        dw.load(model, adapter)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads


def test_an_adapter_of_another_base_is_refused_unless_asked_for(adapter: Path) -> None:
    other, _ = ZOO["roberta"]()
    with pytest.raises(UserError, match=r"another base|trained on a base"):
        dw.load(other, adapter)
    same_shape, _ = ZOO["bert"]()
    with torch.no_grad():
        for parameter in same_shape.parameters():
            parameter.mul_(1.5)
    with pytest.raises(UserError, match="holds other values: load it on its own base"):
        dw.load(same_shape, adapter)
    assert dw.load(same_shape, adapter, any_base=True).name == "default"


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    model, _ = ZOO["bert"]()
    with pytest.raises(UserError, match="there is no adapter folder"):
        dw.load(model, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no adapter\.json"):
        dw.load(model, tmp_path)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sync of a file to the disk fails, as on a full one."""

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)


def test_a_full_disk_keeps_the_old_adapter(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = ZOO["bert"]()
    delta = dw.load(model, adapter)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with torch.no_grad():
        delta.parameters()[0].add_(1)
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(UserError, match="the disk is full"):
            delta.save(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_device_that_is_always_full(adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real error of the system, from writing to /dev/full in place of the temporary file."""
    import builtins

    real = builtins.open

    def diverted(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        return real("/dev/full" if "w" in mode and str(path).endswith(".tmp") else path, mode, *rest, **named)

    model, _ = ZOO["bert"]()
    delta = dw.attach(model, "lora[rank=2]")
    monkeypatch.setattr(builtins, "open", diverted)
    with pytest.raises(UserError, match="the disk is full"):
        delta.save(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.json"))


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    model, _ = ZOO["bert"]()
    delta = dw.attach(model, "lora[rank=2]")
    with pytest.raises(UserError, match=r"in the way|a file, not a folder"):
        delta.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "here first"


def test_values_that_are_not_finite_are_not_saved(adapter: Path) -> None:
    model, _ = ZOO["bert"]()
    delta = dw.load(model, adapter)
    with torch.no_grad():
        delta.parameters()[0][0] = float("nan")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(UserError, match="not finite"):
        delta.save(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.mark.parametrize("method", ["lora[rank=2]", "houlsby[reduction=4]", "ia3", "bitfit"])
def test_a_checkpoint_of_training_with_false_state_is_one_sentence(method: str, tmp_path: Path) -> None:
    model, _ = ZOO["bert"]()
    folder = dw.attach(model, method).save(tmp_path / "adapter", training=True)
    manifest = json.loads((folder / "adapter.json").read_text())
    manifest["procedure"] = {"tensor": "nowhere"}
    (folder / "adapter.json").write_text(json.dumps(manifest))
    fresh, _ = ZOO["bert"]()
    with pytest.raises(UserError, match="nowhere"):
        dw.load(fresh, folder)
    assert not any(isinstance(module, nn.ModuleDict) for module in fresh.modules())


def test_a_false_state_of_a_procedure_is_one_sentence(tmp_path: Path) -> None:
    model, _ = ZOO["bert"]()
    folder = dw.attach(model, "adalora[rank=2]").save(tmp_path / "adapter", training=True)
    manifest = json.loads((folder / "adapter.json").read_text())
    for false in (
        {},
        [],
        {"step": 1},
        {"step": 1, "history": 4, "scores": {}},
        {"step": 1, "history": [], "scores": 3},
    ):
        manifest["procedure"] = false
        (folder / "adapter.json").write_text(json.dumps(manifest))
        fresh, _ = ZOO["bert"]()
        with pytest.raises(UserError, match=r"adalora|state"):
            dw.load(fresh, folder)
