"""What models write and how it is scored; columns filled into templates."""

import json

import pytest
import tiny_decoders
import torch

from deltaworks.core.errors import UserError
from deltaworks.train.data import load_data
from deltaworks.train.fitting import rate_factor
from deltaworks.train.loop import train
from deltaworks.train.recipe import Recipe
from deltaworks.train.tasks import make_task
from deltaworks.train.writing import exact_match, last_number, rouge_l, written


def test_measures_by_hand():
    # the cat sat / the cat lay on a mat: the longest common subsequence is "the cat", 2 of 3 and of 6 words
    assert rouge_l("The cat sat.", "the cat lay on a mat") == pytest.approx(2 * 2 / (3 + 6))
    assert rouge_l("b a c", "a b c") == pytest.approx(2 / 3)
    assert (rouge_l("", "word"), rouge_l("word", ""), rouge_l("Word!", "word")) == (0.0, 0.0, 1.0)
    assert exact_match(" Not  entailed\n", "not entailed")
    assert not exact_match("entailed", "not entailed")
    assert last_number("3 + 4 = 7, so she has $1,007.50 left", "#### 1007.5")
    assert last_number("it is -2", "-2.0")
    assert not last_number("it is 2", "-2")
    assert not last_number("nothing", "4")


def test_the_rate_falls_along_a_cosine():
    factor = rate_factor(100, 0.1, "cosine")
    assert [factor(step) for step in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0], abs=1e-12)
    assert rate_factor(100, 0.1, "linear")(55) == pytest.approx(0.5)
    assert factor(32) == pytest.approx((1 + torch.cos(torch.tensor(torch.pi * 22 / 90)).item()) / 2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions whose answer is always the same two words."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"first": f"word {n}", "second": f"more {n}", "answer": n % 2 == 0} for n in range(40)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_templates_fill_columns_in_and_classes_by_name(rows):
    columns = {"prompt": "first: {first} second: {second}", "target": "{answer}"}
    data = load_data(rows, task="seq2seq", columns=columns, validation=0)
    every = {row["prompt"]: row["target"] for row in data.train + data.test}
    assert len(every) == 40
    assert every["first: word 6 second: more 6"] == "true"
    assert every["first: word 7 second: more 7"] == "false"
    with pytest.raises(UserError, match="no column 'secnd'; did you mean 'second'"):
        load_data(rows, task="seq2seq", columns=columns | {"prompt": "{first} {secnd}"})
    with pytest.raises(UserError, match="is not one"):
        load_data(rows, task="seq2seq", columns=columns | {"prompt": "{first} {second"})
    with pytest.raises(UserError, match="is not one column"):
        load_data(rows, task="classification", columns={"text": "{first}", "label": "{answer}"})


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_what_is_written_is_the_likeliest_token_each_time(kind):
    model = getattr(tiny_decoders, kind)()
    task = make_task(kind, model.processor, 32, target_length=6)
    encoded = task.encode([{"prompt": "a b c d", "target": "x y"}, {"prompt": "c", "target": "x y z u v w q"}])
    most = max(len(task.target_of(example)) for example in encoded)
    texts = written(model, task, encoded, beams=1, batch_size=2)
    for example, text in zip(encoded, texts, strict=True):
        prompt = torch.tensor([task.prompt_of(example)])
        out = prompt if kind == "causal" else torch.tensor([[model.config.decoder_start_token_id]])
        begun = out.shape[1]
        while out.shape[1] < begun + most and out[0, -1] != model.generation_config.eos_token_id:
            inputs = {"input_ids": out} if kind == "causal" else {"input_ids": prompt, "decoder_input_ids": out}
            with torch.no_grad():
                out = torch.cat([out, model.eval()(**inputs).logits[:, -1:].argmax(-1)], 1)
        assert text == model.processor.batch_decode(out[:, begun:], skip_special_tokens=True)[0]


@pytest.mark.parametrize(("kind", "beams"), [("causal", 1), ("seq2seq", 2)])
def test_a_run_is_scored_by_what_the_model_writes(rows, kind, beams):
    columns = {"prompt": "{first}", "target": "so {answer}"}
    settings = {
        "model": f"tiny_decoders:{kind}", "data": str(rows), "task": kind, "method": "full", "steps": 60,
        "rates": [3e-3], "columns": columns, "score": "exact match", "beams": beams, "max_length": 24,
        "forgetting": "none",
    }  # fmt: skip
    record = train(Recipe(**settings))
    assert record.test.metric == "exact match"
    assert record.test.correct.count("1") / 8 == record.test.score
    assert record.test.score >= 0.25  # "so true" or "so false" at least; an untrained model writes neither
    rouge = train(Recipe(**settings | {"score": "rouge-l", "steps": 1}))
    assert len(rouge.test.values) == 8
    assert rouge.test.score == pytest.approx(sum(rouge.test.values) / 8, abs=1e-6)


def test_a_score_of_texts_needs_a_prompt_and_a_target(rows):
    for task, columns in (("classification", {"text": "first", "label": "answer"}), ("causal", {"text": "first"})):
        with pytest.raises(UserError, match="give columns of a prompt and a target"):
            train(Recipe(data=str(rows), model="tiny-lm" if task == "causal" else "minilm", task=task, columns=columns,
                         score="rouge-l", steps=1))  # fmt: skip
