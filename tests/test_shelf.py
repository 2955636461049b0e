"""Many saved adapters over one model: who is attached, who is in memory, and how often a file is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.store import checkpoint

SPECS = ("lora[rank=1]", "lora[rank=3]", "ia3", "lora[rank=2,pissa=true]", "lora[rank=2,targets=mlp]")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the tensors of each folder were read."""
    counts: Counter[str] = Counter()

    def read(folder: Any, manifest: Any) -> Any:
        counts[Path(folder).name] += 1
        return original(folder, manifest)

    original = checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", read)
    return counts


@pytest.fixture
def saved(tmp_path: Path) -> tuple[list[str], dict[str | None, Tensor]]:
    """The folders of five adapters, and what the model gives with each."""
    model = zoo.ZOO["llama"]()[0]
    folders, expected = [], {None: outputs(model)}
    for index, spec in enumerate(SPECS):
        delta = dw.attach(model, spec, seed=index)
        disturb(delta, seed=index)
        folders.append(str(delta.save(tmp_path / f"{index}")))
        expected[folders[-1]] = outputs(model)
        delta.detach()
    return folders, expected


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return zoo.output_of("llama", model, {"input_ids": torch.arange(15).view(3, 5) + 3})


def test_the_least_recently_used_gives_way(saved: Any, reads: Counter[str]) -> None:
    (a, b, c, d, *_), expected = saved
    model = zoo.ZOO["llama"]()[0]
    shelf = dw.Shelf(model, max_active=2, max_cpu=1)
    assert shelf.use(None) is None
    for source in (a, b, a, c):  # a was used after b
        shelf.use(source)
        assert difference(outputs(model), expected[source]) < 1e-6
    assert (list(shelf.active), list(shelf.resting)) == ([a, c], [b])
    assert reads == {"0": 1, "1": 1, "2": 1}
    shelf.use(b)  # from memory
    assert difference(outputs(model), expected[b]) == 0
    assert (list(shelf.active), list(shelf.resting)) == ([c, b], [a])
    assert reads == {"0": 1, "1": 1, "2": 1}
    shelf.use(d)  # pushes c out, and that pushes a out of memory
    assert difference(outputs(model), expected[d]) < 1e-6
    assert (list(shelf.active), list(shelf.resting)) == ([b, d], [c])
    shelf.use(a)
    assert difference(outputs(model), expected[a]) == 0
    assert reads == {"0": 2, "1": 1, "2": 1, "3": 1}
    board: Any = shelf.active[a].board
    assert len(board.deltas) == 2
    shelf.use(None)
    assert difference(outputs(model), expected[None]) == 0


def test_rows_by_folder(saved: Any, reads: Counter[str]) -> None:
    (a, b, c, d, e), expected = saved
    model = zoo.ZOO["llama"]()[0]
    shelf = dw.Shelf(model, max_active=3, max_cpu=8)
    with shelf.rows([None] * 3):
        assert difference(outputs(model), expected[None]) == 0
    shelf.use(d)
    for rows in ([a, None, b], [c, b, e], [Path(a), a, d], [b, b, b], [None, None, None]):
        with shelf.rows(rows):
            mixed = outputs(model)
        for row, source in enumerate(rows):
            assert difference(mixed[row], expected[source and str(source)][row]) < 1e-5
        assert len(shelf.active) <= 3
    assert reads == dict.fromkeys("01234", 1)
    slots = {entry.slot for entry in shelf.active[b].board.banks.entries.values()}  # type: ignore[union-attr]
    assert max(slots) <= 4  # slots of those that gave way were used again
    with pytest.raises(dw.UserError, match="these rows name 4 adapters, but 3 can be attached at once"):
        shelf.rows([a, b, c, d]).__enter__()


def test_who_acts_is_not_touched_by_rows(saved: Any) -> None:
    (a, b, c, *_), expected = saved
    model = zoo.ZOO["llama"]()[0]
    mine = dw.attach(model, "lora", name="mine")
    disturb(mine, seed=9)
    acting = outputs(model)
    shelf = dw.Shelf(model, max_active=1, max_cpu=1)
    for source in (a, b, a, c):
        with shelf.rows([source] * 3):
            assert difference(outputs(model), expected[source]) < 1e-5
        assert difference(outputs(model), acting) == 0
        assert len(mine.board.deltas) == 2
    shelf.active[c].detach()  # by hand
    shelf.use(c)
    assert difference(outputs(model), expected[c]) < 1e-6
    mine.detach()
    assert list(shelf.active) == [c]


def test_an_adapter_of_a_row_does_not_give_way(saved: Any) -> None:
    folders, expected = saved
    model = zoo.ZOO["llama"]()[0]
    shelf = dw.Shelf(model, max_active=1)
    with shelf.rows([folders[0]] * 3):
        with pytest.raises(dw.UserError, match=r"all 1 adapters .* act in rows\(\) now"):
            shelf.use(folders[1])
        assert difference(outputs(model), expected[folders[0]]) < 1e-5
    shelf.use(folders[1])
    assert difference(outputs(model), expected[folders[1]]) < 1e-5


def test_what_cannot_be_loaded_leaves_the_shelf_as_it_was(saved: Any) -> None:
    (a, *_), expected = saved
    model = zoo.ZOO["llama"]()[0]
    shelf = dw.Shelf(model, max_active=1)
    shelf.use(a)
    with pytest.raises(dw.UserError, match="there is no adapter folder"):
        shelf.use(f"{a}-missing")
    assert list(shelf.active) == [a]
    assert difference(outputs(model), expected[a]) < 1e-6
    with pytest.raises(dw.UserError, match="max_active >= 1"):
        dw.Shelf(model, max_active=0)
