"""The loss of a frozen head in chunks is the plain loss, with less memory, and only where it is the model's own."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_decoders import causal
from torch import Tensor, nn
from zoo import ZOO

import deltaworks as dw
from deltaworks.train import losses
from deltaworks.train.losses import IGNORED, frozen_head, summed_cross_entropy
from deltaworks.train.measure import step_memory
from deltaworks.train.tasks import training_loss

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 5 * 8 * 50)  # five rows of 50 words in float64


def naive(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(states, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def problem(dtype: torch.dtype, biased: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(23, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(50, generator=generator, dtype=torch.float64).to(dtype) if biased else None
    labels = torch.randint(50, (23,), generator=generator)
    labels[::3] = IGNORED
    return states, weight, bias, labels


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients_are_those_of_autograd(dtype: torch.dtype, tolerance: float, biased: bool) -> None:
    states, weight, bias, labels = problem(dtype, biased)
    ours, plain = summed_cross_entropy(states, weight, bias, labels), naive(states, weight, bias, labels)
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=0)
    mine, theirs = (torch.autograd.grad(loss / 7, states)[0] for loss in (ours, plain))
    assert mine.dtype == dtype
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert not mine[::3].any()


def test_under_autocast_the_product_is_in_its_dtype() -> None:
    states, weight, bias, labels = problem(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = summed_cross_entropy(states, weight, bias, labels), naive(states, weight, bias, labels)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    assert not torch.isclose(ours, naive(states, weight, bias, labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, states)[0] for loss in (ours, plain)), rtol=1e-2, atol=1e-2)


def test_nothing_is_computed_for_ignored_labels_and_a_chunk_at_a_time_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, words, chunk = 256, 2048, 16
    states, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(words, 8)
    labels = torch.randint(words, (tokens,))
    head = nn.Linear(8, words, bias=False)
    plain = step_memory(head, lambda: naive(states, weight, None, labels)).peak
    monkeypatch.setattr(losses, "CHUNK", 4 * words * chunk)
    chunked = step_memory(head, lambda: summed_cross_entropy(states, weight, None, labels)).peak
    assert plain >= 3 * 4 * tokens * words
    assert chunked <= 0.05 * plain
    seen: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    labels[:100] = IGNORED
    summed_cross_entropy(states, weight, None, labels)
    assert sum(seen) == tokens - 100


def decoder(config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(config)

    return build


def compared(model: nn.Module, **options: Any) -> tuple[bool, float, float]:
    """Whether the head was taken over, and how far loss and gradients are from the model's own."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (3, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **options}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, logits = [], torch.empty(0)
    for loss_of in (lambda: model(**batch), lambda: leanly(model, batch)):
        output = loss_of()
        found.append((output.loss.detach(), torch.autograd.grad(output.loss, parameters, allow_unused=True)))
        logits = output.logits
    (a, one), (b, other) = found
    pairs = [(x, y) for x, y in zip(one, other, strict=True) if x is not None]
    return logits.stride(-1) == 0, float((a - b).abs()), max(float((x - y).abs().max()) for x, y in pairs)


def leanly(model: nn.Module, batch: dict[str, Any]) -> Any:
    with frozen_head(model):
        return model(**batch)


EXACT = {
    "llama": ZOO["llama"],
    "gpt2": ZOO["gpt2"],
    "mixtral with its router's loss": decoder(
        hf.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    ),
    "mamba, whose logits are made float": decoder(
        hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "tied": decoder(hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
}
OTHER = {
    "gemma2 caps its logits": decoder(hf.Gemma2Config(**SIZES, head_dim=8)),
    "granite scales its logits": decoder(hf.GraniteConfig(**SIZES, logits_scaling=8.0)),
    "cohere scales its logits": decoder(hf.CohereConfig(**SIZES)),
    "t5 does not shift": ZOO["t5"],
    "bert does not shift": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
}


@pytest.mark.parametrize("name", [*EXACT, *OTHER])
def test_models_lose_what_they_lost(name: str) -> None:
    model: Any = (EXACT | OTHER)[name]()
    model = model[0] if isinstance(model, tuple) else model
    dw.attach(model, "lora[rank=2,targets=linear]")
    for options in ({}, {"num_items_in_batch": torch.tensor(17)}) if name in EXACT else ({},):
        taken, loss, gradients = compared(model.eval(), **options)
        assert taken == (name in EXACT)
        assert loss <= 1e-6
        assert gradients <= 1e-5
    assert "forward" not in model.get_output_embeddings().__dict__
    assert "_loss_function" not in model.__dict__


def test_a_head_that_is_trained_acted_on_or_watched_is_left_to_the_model() -> None:
    model = causal()
    delta = dw.attach(model, "lora[rank=2,targets=linear]", also=["head"])
    assert not compared(model)[0]
    with delta.disabled():  # nothing acts on it
        assert leanly(model, one()).logits.stride(-1) == 0
    delta.detach()
    delta = dw.attach(model, "ba-lora[rank=2]")  # which compares logits
    assert not compared(model)[0]
    delta.detach()
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    assert compared(model)[0]
    hook = model.register_forward_hook(lambda *_: None)
    assert not compared(model)[0]
    hook.remove()
    model.get_output_embeddings().weight.requires_grad_(True)
    assert not compared(model)[0]


def one() -> dict[str, Any]:
    ids = torch.randint(3, 30, (1, 6))
    return {"input_ids": ids, "labels": ids}


def test_logits_are_whole_where_no_gradients_are_recorded() -> None:
    model = causal()
    dw.attach(model, "lora[rank=2]")
    with torch.no_grad():
        assert leanly(model, one()).logits.stride(-1) == 1


@pytest.mark.parametrize("labels", [{}, {"labels": 1, "ignore_index": 7}])
def test_logits_that_are_no_logits_are_not_given_to_anyone_else(labels: dict[str, int]) -> None:
    model = causal()
    dw.attach(model, "lora[rank=2]")
    batch = one()
    given = {key: batch["labels"] if key == "labels" else value for key, value in labels.items()}
    with pytest.raises(dw.UserError, match="give it labels"):
        leanly(model, {"input_ids": batch["input_ids"], **given})


def test_the_training_loop_holds_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**SIZES, "vocab_size": 4096, "num_hidden_layers": 1}
    model = decoder(hf.LlamaConfig(**sizes))()
    dw.attach(model, "lora[rank=2]")
    ids = torch.randint(3, 4096, (4, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    monkeypatch.setattr(losses, "CHUNK", 4 * 4096 * 8)
    lean = step_memory(model, lambda: training_loss(model, batch, F.cross_entropy))
    plain = step_memory(model, lambda: model(**batch).loss)
    logits = 4 * ids.numel() * 4096
    assert plain.saved - lean.saved >= 0.95 * logits
    assert plain.peak - lean.peak >= 2 * logits


def test_the_trainer_takes_it_and_counts_labels_over_accumulated_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    data = []
    for length in (4, 9, 5, 12, 7, 3, 12, 6):
        ids = torch.randint(3, 40, (12,), generator=generator)
        data.append({"input_ids": ids, "labels": ids.where(torch.arange(12) < length, IGNORED)})
    found: list[Any] = []
    for calls in ([], None):
        if calls is None:
            monkeypatch.setattr("deltaworks.train.trainer.frozen_head", lambda model: nullcontext())
        else:
            summed = losses.summed_cross_entropy
            monkeypatch.setattr(losses, "summed_cross_entropy", lambda *each: calls.append(1) or summed(*each))  # noqa: B023
        delta = dw.attach(causal(), "lora[rank=2]")
        arguments = hf.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-2, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
        )  # fmt: skip
        trainer = dw.DeltaTrainer(delta, arguments, train_dataset=data, eval_dataset=data[:2])
        trainer.train()
        assert trainer.predict(data[:2]).predictions.shape == (2, 12, 40)  # logits, where they are asked for
        assert calls is None or len(calls) == 1 + 4  # once to try it
        losses_seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses_seen, [parameter.detach() for parameter in delta.parameters()]))
    (one, values), (other, wanted) = found
    assert one == pytest.approx(other, abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values, wanted, strict=True))
