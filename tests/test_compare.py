"""A comparison: processes, records, resumption after any end, and runs that fail without stopping the others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_data import SETTINGS, write_letters

from deltaworks.compare.protocols import Protocol, find_protocol
from deltaworks.compare.run import Outcome, compare
from deltaworks.core.errors import UserError
from deltaworks.store.records import read_records

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_letters(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def protocol(letters: Path, *methods: str, **settings: Any) -> Protocol:
    recipe = {**SETTINGS, "data": str(letters), **settings}
    return Protocol(name="test", methods=methods, workers=2, settings=recipe)


def run(chosen: Protocol, folder: Path) -> tuple[Outcome, str]:
    with open(folder.with_suffix(".txt"), "w+") as stream:
        outcome = compare(chosen, folder, console=Console(file=stream, width=160))
        stream.seek(0)
        return outcome, stream.read()


def command(letters: Path, folder: Path, methods: str, **settings: Any) -> list[str]:
    recipe = {**SETTINGS, "data": str(letters), **settings}
    words = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in recipe.items()]
    start = [sys.executable, "-m", "deltaworks", "compare", *words]
    return [*start, "--methods", methods, "--out", str(folder), "--workers", "1"]


@pytest.fixture(scope="module")
def finished(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Outcome, str]]:
    folder = tmp_path_factory.mktemp("comparison") / "out"
    before = os.getcwd()
    os.chdir(HERE)
    yield folder, *run(protocol(letters, "head", "lora[rank=2]"), folder)
    os.chdir(before)


def test_every_run_is_recorded_and_shown(finished: tuple[Path, Outcome, str]) -> None:
    folder, outcome, shown = finished
    assert [record.method for record in outcome.records] == ["head", "lora[rank=2]"]
    assert {record.status for record in outcome.records} == {"finished"}
    assert read_records(folder / "records") == sorted(outcome.records, key=lambda record: record.method)
    assert outcome.page == folder / "report.html"
    assert "lora[rank=2]" in outcome.page.read_text()
    for piece in ("[2/2]", "accuracy", "samples/s", f"report: {outcome.page}", "• "):
        assert piece in shown
    assert outcome.records[0].data.digest == outcome.records[1].data.digest
    assert sorted(path.name for path in folder.iterdir()) == ["data", "jobs", "logs", "records", "report.html"]
    assert not list((folder / "jobs").iterdir())


def test_finished_runs_are_not_made_again_and_new_ones_join(finished: tuple[Path, Outcome, str], letters: Path) -> None:
    folder, outcome, _ = finished
    times = {path.name: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    joined, shown = run(protocol(letters, "head", "lora[rank=2]", "bitfit"), folder)
    assert "2 of 3 runs are finished already" in shown
    assert [record.method for record in joined.records] == ["head", "lora[rank=2]", "bitfit"]
    assert joined.records[:2] == outcome.records
    for name, changed in times.items():
        assert (folder / "records" / name).stat().st_mtime_ns == changed


def test_runs_that_fail_or_diverge_do_not_stop_the_others(letters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    hopeless = protocol(letters, "lora[rank=2]", rates=[1e6], steps=5)
    outcome, shown = run(hopeless, folder)
    assert [record.status for record in outcome.records] == ["diverged"]
    assert "diverged: the loss became" in shown
    killed = protocol(
        letters, "lora[rank=2, targets=bag.first]", "bitfit[targets=bag.first]", model="tiny_models:killed"
    )
    outcome, shown = run(killed, folder)
    assert [record.status for record in outcome.records] == ["failed", "failed"]
    assert all("SIGKILL" in record.message for record in outcome.records)
    assert "memory runs out" in shown
    assert {record.status for record in read_records(folder / "records")} == {"diverged", "failed"}
    assert outcome.page.is_file()


def test_a_killed_comparison_continues_where_it_was(letters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = command(letters, folder, "head,lora[rank=2]", steps=60)
    process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.DEVNULL, start_new_session=True)
    first = wait_for_record(folder, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in first}
    settings = {**SETTINGS, "data": str(letters), "steps": 60}
    outcome, shown = run(find_protocol("quick").changed("head,lora[rank=2]", workers=1, settings=settings), folder)
    assert f"{len(list(before))} of 2 runs are finished already" in shown
    assert {record.status for record in outcome.records} == {"finished"}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_interruption_keeps_what_is_finished_and_says_how_to_go_on(letters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = command(letters, folder, "head,lora[rank=2]", steps=1500)
    process = subprocess.Popen(
        words, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell runs in the background is deaf
    )  # fmt: skip
    wait_for_record(folder, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 of 2 runs are finished and kept; the same command runs the rest" in out
    assert err.splitlines()[-1] == "interrupted"  # a library may have warned before
    assert len(read_records(folder / "records")) == 1
    assert not list((folder / "jobs").iterdir())


def wait_for_record(folder: Path, process: subprocess.Popen[Any]) -> list[Path]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list((folder / "records").glob("[!.]*.json")) if (folder / "records").is_dir() else []
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("no run finished")


def test_mistakes_are_found_before_any_run_starts(letters: Path, tmp_path: Path) -> None:
    for methods, sentence in (
        (("lora", "lora[targets=attention.quary]"), "attention.quary"),
        (("lora", "lora[rank=33]"), "lora\\[rank=33\\]: .*rank"),
        (("lora[rnk=1]",), "did you mean 'rank'"),
        ((), "at least one method"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(protocol(letters, *methods), tmp_path / "out")
        assert not (tmp_path / "out" / "records").exists()
    with pytest.raises(UserError, match="did you mean 'steps'"):
        run(protocol(letters, "lora", stepz=4), tmp_path / "out")
