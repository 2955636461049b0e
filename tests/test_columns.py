"""Columns that are joined, and columns that have another name in the test rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltaworks.core.errors import UserError
from deltaworks.train.columns import parts
from deltaworks.train.data import load_data


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_the_parts_of_a_column() -> None:
    assert parts("a+b", {"a", "b"}) == ["a", "b"]
    assert parts("a+b", {"a+b"}) == ["a+b"]
    assert parts("a|b", {"b"}) == ["b"]
    assert parts("a+b|c", {"a", "c"}) == ["c"]
    assert parts("a|b", {"a|b", "a"}) == ["a|b"]
    assert parts("a|b", {"c"}) == ["a"]


def test_test_rows_with_names_of_their_own(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"query": f"q{i}", "response": f"r{i}"} for i in range(8)])
    test = write(tmp_path / "other.jsonl", [{"question": "Q", "answer": "A"}])
    columns = {"prompt": "query|question", "target": "response|answer"}
    data = load_data(train, task="causal", columns=columns, test=test, validation=0.25)
    assert data.test == [{"prompt": "Q", "target": "A"}]
    assert (len(data.train), len(data.validation)) == (6, 2)
    with pytest.raises(UserError, match=r"other\.jsonl has no column 'query'"):
        load_data(train, task="causal", columns={"prompt": "query", "target": "response|answer"}, test=test)


def test_labels_with_names_of_their_own(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(8)])
    test = write(tmp_path / "other.jsonl", [{"text": "t", "class": "b"}])
    data = load_data(train, columns={"text": "text", "label": "label|class"}, test=test)
    assert (data.labels, data.test) == (["a", "b"], [{"text": "t", "label": 1}])
