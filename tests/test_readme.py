"""The README says what is true: its table is the registry's, its Python runs, its commands exist."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltaworks.cli import app
from deltaworks.core.abilities import abilities
from deltaworks.listing import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(mark: str) -> str:
    return README.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def test_the_table_of_methods_is_the_registry() -> None:
    assert between("methods") == markdown(abilities()), "write it again: deltaworks methods --markdown"


def test_the_table_of_make_bench_is_the_one_that_was_measured() -> None:
    assert between("lean") in (ROOT / "benchmarks/results/lean.md").read_text(encoding="utf-8")


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile("".join(blocks), "README.md", "exec"), {})
    assert (tmp_path / "out" / "support" / "adapter.json").is_file()
    assert (tmp_path / "out" / "peft" / "adapter_config.json").is_file()


def test_every_command_line_names_a_command_and_its_options() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    commands = [line.split("#")[0].split() for line in lines if line.startswith("deltaworks ")]
    assert len(commands) >= 6
    for words in commands:
        help_text = CliRunner().invoke(app, [words[1], "--help"])
        assert help_text.exit_code == 0, words
        for option in (word for word in words if word.startswith("--")):
            assert option in help_text.output, words
