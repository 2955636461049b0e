"""Runs over Ray: the scores of local runs, records as content, failures as rows, and an orderly end."""

import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_data import SETTINGS, write_letters

from deltaworks.compare.protocols import Protocol
from deltaworks.compare.run import Outcome, compare
from deltaworks.store.records import read_records

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers on this machine, which find the tests' models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.chdir(HERE)
        ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        yield
        ray.shutdown()


def protocol(tmp_path: Path, *methods: str, seeds: int = 1, **settings: Any) -> Protocol:
    recipe = {**SETTINGS, "data": str(write_letters(tmp_path)), "threads": 1, **settings}
    return Protocol(name="test", methods=methods, workers=2, seeds=tuple(range(seeds)), search="first", settings=recipe)


def run(chosen: Protocol, folder: Path, engine: str, **options: Any) -> tuple[Outcome, str]:
    with open(folder.with_suffix(".txt"), "w+") as stream:
        outcome = compare(chosen, folder, engine=engine, console=Console(file=stream, width=200), **options)
        stream.seek(0)
        return outcome, stream.read()


def test_runs_over_ray_score_what_local_runs_score(tmp_path: Path) -> None:
    chosen = protocol(tmp_path, "lora[rank=2]", "bitfit", seeds=2, rates=[1e-2, 3e-2])
    local, _ = run(chosen, tmp_path / "local", "local")
    spread, shown = run(chosen, tmp_path / "spread", "ray", keep_adapters=True)
    assert len(spread.records) == 4
    for one, other in zip(spread.records, local.records, strict=True):
        assert one.status == "finished"
        assert one.run_id == other.run_id
        assert one.test == other.test
        assert one.learning_rates == other.learning_rates
        assert one.curve == other.curve
        assert any((tmp_path / "spread" / "adapters" / one.run_id).glob("adapter-*.safetensors"))
    assert [record.searched_on for record in spread.records] == [None, None, 0, 0]
    assert {len(record.learning_rates) for record in spread.records[2:]} == {1}
    assert "[4/4]" in shown
    # a second time nothing is made
    _, shown = run(chosen, tmp_path / "spread", "ray")
    assert "4 of 4 runs are finished already" in shown


@pytest.mark.parametrize(
    ("model", "sentence"), [("killed", "died|crash"), ("unlucky", "^RuntimeError: no luck today$")]
)
def test_failures_are_rows(model: str, sentence: str, tmp_path: Path) -> None:
    methods = ("lora[rank=2, targets=bag.first]", "bitfit[targets=bag.first]")
    outcome, _ = run(protocol(tmp_path, *methods, model=f"tiny_models:{model}"), tmp_path / "out", "ray")
    assert [record.status for record in outcome.records] == ["failed", "failed"]
    assert all(re.search(sentence, record.message) for record in outcome.records)


def test_a_run_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    slow = protocol(tmp_path, "lora[rank=2]", steps=10**6).model_copy(update={"run_seconds": 3.0})
    outcome, _ = run(slow, tmp_path / "out", "ray")
    assert outcome.records[0].status == "failed"
    assert outcome.records[0].message == "stopped after 3 seconds, the limit of the comparison"
    assert outcome.records[0].wall_seconds is not None
    assert outcome.records[0].wall_seconds >= 3


def test_an_interruption_stops_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaworks.compare.live import Live

    heard = Live.hear

    def interrupted(self: Live, event: Any) -> None:
        heard(self, event)
        if event.said is not None and event.said["event"] == "step":
            raise KeyboardInterrupt

    monkeypatch.setattr(Live, "hear", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run(protocol(tmp_path, "lora[rank=2]", "bitfit", steps=10**6), tmp_path / "out", "ray")
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2  # no task holds a processor
    assert threading.active_count() <= before + 1
    assert not (tmp_path / "out" / "records").exists() or not read_records(tmp_path / "out" / "records")
