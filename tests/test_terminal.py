"""What a person reads in a terminal, and what stays out of a file or a pipe."""

import io
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from small_data import SETTINGS, write_letters
from test_trainer import trainer_of
from toy import Toy

import deltaworks as dw
from deltaworks.train.progress import Bars
from deltaworks.train.recipe import parse_recipe
from deltaworks.train.tune import tune


def test_a_report_is_an_aligned_table() -> None:
    delta = dw.attach(Toy(32), "lora", rank=2, targets="mlp")
    for parameter in delta.parameters():
        parameter.data.fill_(1.0)
    # two blocks: up [64, 32] and down [32, 64], rank 1 since all entries are the same
    assert str(delta.report(ranks=True)).splitlines() == [
        "lora[targets=mlp, rank=2] on Toy",
        "trainable  768 of 17,152 (4.48 %)",
        "changed    8,192",
        "stored     3,072 bytes",
        "",
        "role      sites  trainable  changed  rank of the change",
        "mlp.up        2        384    4,096                   1",
        "mlp.down      2        384    4,096                   1",
    ]


def test_ranks_that_were_not_asked_for_have_no_column() -> None:
    delta = dw.attach(Toy(32), "lora[rank=2]+parallel[width=4]")
    lines = str(delta.report()).splitlines()
    assert lines[5].split() == ["role", "sites", "trainable", "changed"]
    assert len({len(line) for line in lines[5:]}) == 1
    assert max(map(len, lines)) <= 80


# ---- progress -------------------------------------------------------------------------------------------


def shown(tmp_path: Path, *, terminal: bool) -> str:
    """What a Trainer of two steps, with one evaluation, writes to a terminal or to a file."""
    stream = io.StringIO()
    trainer = trainer_of(tmp_path, "lora[rank=2]", max_steps=2, disable_tqdm=False, eval_strategy="steps", eval_steps=2)
    assert trainer.pop_callback(Bars) is not None
    trainer.add_callback(Bars(Console(file=stream, force_terminal=terminal, width=120)))
    trainer.train()
    return stream.getvalue()


def test_a_trainer_shows_bars_in_a_terminal(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    for piece in ("training", "evaluation", "100 %", "\x1b["):
        assert piece in text


def test_in_a_file_a_trainer_writes_its_logs_and_nothing_else(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 1", "step 2", "step 2", "step 2"]
    assert lines[0].startswith("step 1: loss ")
    assert "eval_loss" in lines[2]
    assert "train_runtime" in lines[3]


def test_a_trainer_that_shall_show_no_bars_has_none(tmp_path: Path) -> None:
    assert trainer_of(tmp_path, "lora[rank=2]", disable_tqdm=True).pop_callback(Bars) is None


def test_tune_shows_a_bar_in_a_terminal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({**SETTINGS, "data": str(write_letters(tmp_path)), "out": str(tmp_path / "out"), "steps": 4})
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr("rich.console.Console", partial(Console, file=stream, force_terminal=terminal, width=160))
        tune(recipe)
        lines = stream.getvalue().splitlines()
        assert any("━" in line for line in lines) is terminal
        assert lines[-1] == f"adapter, record and card: {tmp_path / 'out'}"
        if not terminal:
            assert {line.partition(" ")[0] for line in lines} == {"step", "test", "adapter,"}
