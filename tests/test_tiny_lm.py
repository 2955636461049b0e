"""tiny-lm, the causal base inside the package: what it is made of, that it knows English, and how it was trained."""

import gzip
import hashlib
import json
import math
import random
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scripts
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import deltaworks as dw
from deltaworks.train.models import TINY_LM, Loaded, load_model
from deltaworks.train.recipe import Recipe
from deltaworks.train.tasks import make_task

SCRIPT = Path(__file__).parents[1] / "examples" / "train_tiny_lm.py"
SENTENCES = [
    "The government of the United States is divided into three branches.",
    "She opened the door and looked out into the garden, but there was nobody there.",
    "Once there was a little girl who wanted to play with her friends.",
    "In the early years of the century, many people moved to the cities to find work.",
    "It is important to understand how the members of a group think about one another.",
]
BOUND = 2.8
"""Mean loss on them, in nats per token; an untrained model has ln(6144) = 8.7."""


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model("tiny-lm", "causal", labels=None)


def tokens_of(loaded: Loaded, text: str) -> dict[str, Any]:
    return loaded.processor(text, return_tensors="pt")


# ---- the files ------------------------------------------------------------------------------------------


def test_the_weights_are_bfloat16_and_fit_the_package() -> None:
    weights = TINY_LM / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    with safe_open(weights, "pt") as stream:
        slices = [stream.get_slice(name) for name in stream.keys()]  # noqa: SIM118
        assert {one.get_dtype() for one in slices} == {"BF16"}
    assert sum(path.stat().st_size for path in TINY_LM.iterdir()) <= 17_000_000


def test_the_card_states_these_weights_and_what_they_learned_from() -> None:
    _, header, text = (TINY_LM / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(header)["language"] == "en"
    assert hashlib.sha256((TINY_LM / "model.safetensors").read_bytes()).hexdigest() in text
    for word in ("CC BY 4.0", "CDLA-Sharing 1.0", "public domain", "tokens seen", "bits per byte"):
        assert word in text, word


def test_it_loads_without_the_hub_in_half_the_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert load_model("tiny-lm", "causal", labels=None).model.dtype == torch.float32
    assert load_model("tiny-lm", "causal", labels=None, dtype="bfloat16").model.dtype == torch.bfloat16


def test_it_is_a_small_llama_with_grouped_queries_and_one_embedding(loaded: Loaded) -> None:
    model: Any = loaded.model
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert loaded.base == "tiny-lm"
    assert loaded.head == []
    assert loaded.processor.model_max_length == 512
    assert attention.q_proj.weight.shape == (256, 256)  # 4 heads of 64
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (128, 256)  # 2 heads of 64
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (704, 256)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # embedding, then of 6 layers: attention, MLP and two norms, then the last norm
    assert sum(p.numel() for p in model.parameters()) == 6144 * 256 + 6 * (768 * 256 + 3 * 704 * 256 + 512) + 256


def test_it_is_the_default_where_a_text_is_to_be_continued() -> None:
    assert Recipe(data="stdlib-text").model == "tiny-lm"
    assert Recipe(data="reviews.csv", task="causal").model == "tiny-lm"
    assert Recipe(data="stdlib-docs").model == "minilm"
    assert Recipe(data="stdlib-text", model="minilm").model == "minilm"


def test_it_classifies_with_a_fresh_head() -> None:
    loaded = load_model("tiny-lm", "classification", labels=["no", "yes"])
    assert loaded.head == ["score"]
    assert loaded.model.score.weight.shape == (2, 256)


# ---- the tokenizer --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_every_text_comes_back_from_its_tokens(loaded: Loaded, text: str) -> None:
    ids = loaded.processor(text, add_special_tokens=False)["input_ids"]
    assert loaded.processor.decode(ids) == text


def test_a_text_begins_with_the_end_token_and_a_digit_is_a_token(loaded: Loaded) -> None:
    tokenizer = loaded.processor
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1
    assert tokenizer("a")["input_ids"][0] == 0
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    task = make_task("causal", tokenizer)
    (example,) = task.encode([{"text": "a"}])
    assert example["input_ids"] == [0, *tokenizer("a")["input_ids"][1:], 0]


def test_english_takes_fewer_tokens_than_bytes(loaded: Loaded) -> None:
    text = " ".join(SENTENCES)
    assert len(text) / (len(loaded.processor(text)["input_ids"]) - 1) > 4


# ---- what it knows --------------------------------------------------------------------------------------


@torch.no_grad()
def nats_per_token(loaded: Loaded, text: str) -> float:
    ids = tokens_of(loaded, text)
    return float(loaded.model(**ids, labels=ids["input_ids"]).loss)


def test_it_expects_english_sentences_and_not_their_words_in_disorder(loaded: Loaded) -> None:
    plain = sum(nats_per_token(loaded, text) for text in SENTENCES) / len(SENTENCES)
    assert plain < BOUND
    for text in SENTENCES:
        words = text.split()
        random.Random(0).shuffle(words)
        assert nats_per_token(loaded, " ".join(words)) > nats_per_token(loaded, text) + 2


@pytest.mark.parametrize("method", ["lora", "prefix-flat", "prompt"])
def test_it_writes_the_same_with_and_without_a_cache_under(method: str) -> None:
    loaded = load_model("tiny-lm", "causal", labels=None)
    model: Any = loaded.model
    start = tokens_of(loaded, "The people of the city were")
    words: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 5}
    before = model(**start).logits[:, -1]
    delta = dw.attach(model, method)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.3)
    cached, plain = (model.generate(**start, **words, use_cache=use) for use in (True, False))
    assert cached.shape[1] == start["input_ids"].shape[1] + 8
    assert torch.equal(cached, plain)
    assert (model(**start).logits[:, -1] - before).abs().max() > 0.1


# ---- how it was trained ---------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The training script with sizes that take no time."""
    module = scripts.loaded(SCRIPT)
    for name, size in {"CONTEXT": 16, "PLATEAU_CONTEXT": 8, "VOCABULARY": 300, "BATCH": 4, "MICROBATCH": 2}.items():
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(module, "WARMUP", 2)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", math.inf)
    monkeypatch.setattr(module.torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(module, "new_model", small_model)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


def small_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
        )
    )  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    chance = random.Random(0)
    names = ("openstax_a", "openstax_introduction_business", "eltec_english_novels", "us_presidential_speeches",
             "tinystories_lowercase", "tiny_shakespeare", "wikitext2_valid")  # fmt: skip
    for name in names:
        works = [" ".join(chance.choices([*name.split("_"), "the", "and", "is"], k=60)) for _ in range(20)]
        (folder / f"{name}.txt.gz").write_bytes(gzip.compress("\n\n".join(works).encode()))
    return folder


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    script: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = {"minutes": math.inf, "tokens": 8 * 4 * 16}
    script.train(corpus, tmp_path / "whole", **budget)
    step = script.Run.step

    def stopping(run: Any) -> tuple[float, float]:
        outcome: tuple[float, float] = step(run)
        if run.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return outcome

    monkeypatch.setattr(script.Run, "step", stopping)
    for _ in range(2):
        script.train(corpus, tmp_path / "parts", **budget)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["progress"]["step"] == parts["progress"]["step"] == 8
    assert tuple(whole["progress"]["decay"]) == (6, 2)  # a quarter of the run
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())
    logged = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [3, 8]


def test_the_rate_rises_stays_and_falls(script: ModuleType) -> None:
    rates = [script.Progress(step, decay=(6, 4)).factor() for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])


def test_blocks_come_by_share_and_each_once_in_a_pass(script: ModuleType) -> None:
    blocks = {group: np.full((10, 1), place) + np.arange(10)[:, None] * 10 for place, group in enumerate(script.SHARES)}
    coming = [int(block[0]) for block in islice(script.order(blocks, 0), 4000)]
    for place, share in enumerate(script.SHARES.values()):
        own = [block // 10 for block in coming if block % 10 == place]
        assert len(own) / len(coming) == pytest.approx(share, abs=0.03)
        assert sorted(own[:10]) == list(range(10))


def test_the_corpus_without_the_book_that_must_not_be_used(script: ModuleType, corpus: Path) -> None:
    assert [path.name for path in script.files_of(corpus, "openstax_*")] == ["openstax_a.txt.gz"]
    story = corpus / "tinystories_lowercase.txt.gz"
    story.write_bytes(gzip.compress("one.\n\nthe end.\ntwo: “yes”".encode()))
    assert script.documents(story) == ["one.\nthe end.", 'two: "yes"']


class Uniform(torch.nn.Module):
    """Every token is as likely as any other."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert input_ids.shape[1] <= 16
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 32))


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 24, 25, 26, 100])
def test_every_token_is_scored_once(script: ModuleType, length: int) -> None:
    loss = script.text_loss(Uniform(), torch.zeros(length, dtype=torch.long))
    assert loss == pytest.approx((length - 1) * math.log(32), rel=1e-5)


def test_wikitext_as_people_write(script: ModuleType) -> None:
    set_apart = "He said : \" It 's a well @-@ known $ 1 @,@ 000 ( or 2 @.@ 5 % ) , is n't it ? \""
    assert script.written_out(set_apart) == "He said: \"It's a well-known $1,000 (or 2.5%), isn't it?\""
