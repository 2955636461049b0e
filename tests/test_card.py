"""The model card: metadata that the Hub accepts, facts of the record, and a recipe for loading that runs."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from synthetic import a_record

import deltaworks as dw
from deltaworks.store.card import card_of_delta
from deltaworks.train.card import card_of_run
from deltaworks.train.recipe import parse_recipe


def test_the_metadata_of_a_run_is_what_the_hub_reads() -> None:
    record = a_record(method="lora[rank=16]+ist")
    record.data.task = "classification"
    recipe = parse_recipe({"model": "minilm", "data": "PolyAI/banking77:default", "method": record.method})
    found = ModelCard(card_of_run(recipe, record, "runs/lora")).data
    assert found.library_name == "deltaworks"
    assert found.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert found.to_dict()["base_model_relation"] == "adapter"
    assert found.datasets == ["PolyAI/banking77"]
    assert found.pipeline_tag == "text-classification"
    assert found.tags == ["deltaworks", "peft", "lora", "ist"]
    (result,) = found.eval_results
    assert (result.dataset_type, result.dataset_split) == ("PolyAI/banking77", "test")
    assert record.test is not None
    assert (result.metric_type, result.metric_value) == ("accuracy", round(record.test.score, 6))


def test_what_is_not_on_the_hub_is_not_named_as_if_it_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model").mkdir()
    for model, data in (("tiny-lm", "stdlib-text"), ("own/model", "reviews.csv"), ("zoo:plain", "own/model")):
        recipe = parse_recipe({"model": model, "data": data})
        found = ModelCard(card_of_run(recipe, a_record(), "runs/lora")).data
        assert (found.base_model, found.datasets) == (None, None)
        assert "base_model_relation" not in found.to_dict()


def test_the_facts_of_a_run() -> None:
    record = a_record()
    text = card_of_run(parse_recipe({"method": "lora[rank=16]"}), record, "runs/lora")
    for piece in (
        f"{record.counts.trainable:,} values",
        f"{record.counts.stored_bytes:,} bytes",
        f"accuracy {record.test.score:.4f}" if record.test and record.test.score else "-",
        record.hardware,
        *(f"{name} {version}" for name, version in record.versions.items()),
        "rank: 16",
    ):
        assert piece in text


def test_a_diverged_run_has_a_card_without_scores() -> None:
    record = a_record(status="diverged", message="the loss is not finite", test=None)
    text = card_of_run(parse_recipe({}), record, "runs/lora")
    assert ModelCard(text).data.eval_results is None
    assert "| status | diverged: the loss is not finite |" in text


def test_the_recipe_for_loading_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaworks.train.models import load_model

    monkeypatch.chdir(tmp_path)
    base = load_model("tiny_models:classifier", "classification", labels=["no", "it's"])
    delta = dw.attach(base.model, "lora", rank=2, also="head")
    for parameter in delta.parameters():
        parameter.data.add_(0.01)
    delta.save("out")
    record = a_record()
    record.data.labels = ["no", "it's"]
    record.data.task = "classification"
    text = card_of_run(parse_recipe({"model": "tiny_models:classifier", "method": "lora[rank=2]"}), record, "out")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(names["model"](tokens).logits, base.model(tokens).logits)


def test_a_quantized_base_is_loaded_quantized() -> None:
    record = a_record()
    record.data.task = "causal"
    text = card_of_run(parse_recipe({"model": "tiny-lm", "task": "causal", "quantize": "nf4"}), record, "out")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert "load_model('tiny-lm', 'causal', quantization=Quantization(form='nf4', double=True))" in code
    assert "from deltaworks.train.quantizing import Quantization" in code


def test_the_card_of_an_adapter_over_a_base_of_the_hub() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    model.config._name_or_path = "meta-llama/Llama-2-7b-hf"
    text = card_of_delta(dw.attach(model, "lora", rank=2), "ada/support")
    assert ModelCard(text).data.base_model == "meta-llama/Llama-2-7b-hf"
    assert 'model = LlamaForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")' in text
    assert "from transformers import LlamaForCausalLM" in text
