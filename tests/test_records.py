"""Records: what is written comes back, what is broken is named."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from pydantic import ValidationError
from synthetic import a_record, some_records

from deltaworks.core.errors import UserError
from deltaworks.store.records import CurvePoint, Record, Score, Trial, read_records, run_key

KEY = {
    "model": "m",
    "data_digest": "d",
    "method": "lora[rank=16]",
    "config": {"rank": 16, "alpha": 32.0},
    "learning_rate": 3e-4,
    "seed": 0,
    "steps": 10,
    "batch_size": 4,
    "task": "t",
    "dtype": "float32",
}


def test_written_records_come_back_equal_and_in_order(tmp_path: Path) -> None:
    records = some_records(5, seeds=2)
    for record in records:
        assert record.write(tmp_path) == tmp_path / f"{record.run_id}.json"
    back = read_records(tmp_path)
    assert len(back) == 10
    assert sorted(back, key=lambda r: r.run_id) == sorted(records, key=lambda r: r.run_id)
    assert [(r.method, r.seed) for r in back] == sorted((r.method, r.seed) for r in back)
    assert len(list(tmp_path.iterdir())) == 10


def test_the_key_is_the_same_everywhere_and_changes_with_every_setting() -> None:
    key = run_key(**KEY)
    assert key == "7054ee9ec32ec414"  # a changed key would orphan every record written so far
    assert run_key(**{**KEY, "config": {"alpha": 32, "rank": 16.0}}) == key
    changes = {
        "model": "n",
        "data_digest": "e",
        "method": "lora",
        "config": {"rank": 8, "alpha": 32.0},
        "learning_rate": 1e-4,
        "seed": 1,
        "steps": 11,
        "batch_size": 8,
        "task": "u",
        "dtype": {"base": "bfloat16"},
        "targets": "attention.q",
    }
    keys = {key, *(run_key(**{**KEY, name: value}) for name, value in changes.items())}
    assert len(keys) == 1 + len(changes)


def test_a_record_finds_its_own_key_and_name() -> None:
    record = a_record(name="")
    assert record.name == "lora[rank=16]"
    assert record.run_id == a_record(name="LoRA", message="other words").run_id
    assert record.run_id != a_record(seed=1).run_id


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record = a_record(
        curve=[CurvePoint(step=1, loss=math.nan), CurvePoint(step=2, loss=math.inf, validation=0.5)],
        learning_rates=[Trial(rate=1e-3, score=float("-inf"))],
        details={"norms": [1.0, math.nan], "kept": {"a", "b"}},
        merge_error=math.nan,
    )
    path = record.write(tmp_path)
    raw = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [point["loss"] for point in raw["curve"]] == [None, None]
    assert raw["learning_rates"][0]["score"] is None
    assert raw["details"] == {"norms": [1.0, None], "kept": ["a", "b"]}
    assert raw["merge_error"] is None


def test_numbers_of_arrays_and_foreign_objects_are_taken_as_they_read(tmp_path: Path) -> None:
    record = a_record(
        config={"rank": numpy.int64(8), "alpha": numpy.float32(0.5), "dtype": torch.bfloat16, "names": ("a", "b")},
        sites=numpy.int64(12),
        details={"energy": torch.tensor(2.0)},
    )
    assert record.config == {"rank": 8, "alpha": 0.5, "dtype": "torch.bfloat16", "names": ["a", "b"]}
    assert record.sites == 12
    assert record.details == {"energy": 2.0}
    record.write(tmp_path)
    assert read_records(tmp_path) == [record]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"status": "fine"},
        {"method": ""},
        {"run_id": "../outside"},
        {"run_id": "a/b"},
        {"peak_memory_bytes": -5},
        {"unknown_field": 1},
        {"test": {"score": 0.5, "correct": "01x"}},
        {"test": {"score": 0.5, "values": [0.25, 0.5]}},
        {"test": {"score": 0.5, "values": [0.5, 0.5], "weights": [1.0]}},
        {"test": {"score": 0.5, "values": [0.5], "weights": [-1.0]}},
        {"test": {"score": 0.5, "values": [0.5], "weights": [0.0]}},
        {"learning_rates": [{"rate": 1e-3, "stopped_at": -1}]},
        {"started": "yesterday"},
    ],
)
def test_values_a_record_cannot_hold_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        a_record(**change)


def test_a_record_spoilt_after_it_was_made_is_not_written(tmp_path: Path) -> None:
    record = a_record()
    record.steps = -3
    with pytest.raises(ValidationError):
        record.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_ignored_and_broken_records_are_named(tmp_path: Path) -> None:
    a_record().write(tmp_path)
    (tmp_path / "notes.txt").write_text("not a record")
    (tmp_path / "other.json").write_text('{"loss": 1}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "folder.json").mkdir()
    assert len(read_records(tmp_path)) == 1

    content = json.loads((tmp_path / f"{a_record().run_id}.json").read_text())
    for name, change, message in (
        ("wrong.json", {"steps": "many"}, "steps"),
        ("nested.json", {"counts": {"trainable": -1}}, "counts"),
        ("newer.json", {"schema_version": 99}, "update deltaworks"),
        ("older.json", {"schema_version": None}, "schema_version"),
    ):
        path = tmp_path / name
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message) as caught:
            read_records(tmp_path)
        assert name in str(caught.value)
        path.unlink()
    (tmp_path / "cut.json").write_text(json.dumps(content)[:200])
    with pytest.raises(UserError, match=r"cut\.json.*cut off"):
        read_records(tmp_path)


def test_no_folder_is_a_mistake_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        read_records(tmp_path / "absent")
    assert read_records(tmp_path) == []


def test_a_score_is_the_weighted_mean_of_its_values() -> None:
    assert Score(score=1 / 3, values=[0.25, 0.5, 1.0], weights=[4, 2, 0]).weights == [4, 2, 0]
    assert Score(score=0.5, values=[0.25, 0.5, 0.75]).weights == []
    with pytest.raises(ValidationError, match=r"0\.5 is not the weighted mean of the values, 0\.4"):
        Score(score=0.5, values=[0.25, 0.5], weights=[2, 3])
    with pytest.raises(ValidationError, match="1 weights do not fit 2 values"):
        Score(score=0.5, values=[0.5, 0.5], weights=[1])


def test_records_from_before_a_field_was_known_are_read(tmp_path: Path) -> None:
    record = a_record(test=Score(score=0.5, correct="01"))
    content = json.loads(record.write(tmp_path).read_text())
    for name in ("forgetting", "forgetting_text", "searched_on"):
        del content[name]
    for trial in content["learning_rates"]:
        del trial["stopped_at"]
    del content["test"]["values"], content["test"]["weights"]
    (tmp_path / f"{record.run_id}.json").write_text(json.dumps(content))
    assert read_records(tmp_path) == [record]
    assert (record.forgetting, record.searched_on, record.learning_rates[0].stopped_at) == (None, None, None)


def test_every_field_survives_the_json_schema() -> None:
    record = a_record(test=Score(metric="perplexity", score=12.5, higher_is_better=False))
    assert Record.model_validate_json(record.model_dump_json()) == record
