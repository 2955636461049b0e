"""TRL's trainers with an adapter: the mixin alone, no second model, any method and its procedure."""

import gc
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.train.reference import Reference

STEPS = 4
WORDS = ["<pad>", "<eos>", *"abcdefghijklmnop"]


class DeltaSFT(dw.DeltaTrainerMixin, SFTTrainer):
    """The one line that a user writes."""


class DeltaDPO(dw.DeltaTrainerMixin, DPOTrainer):
    """The one line that a user writes."""


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def decoder() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes))


def sentences() -> Dataset:
    return Dataset.from_list([{"prompt": "a b", "completion": " ".join("cdefgh"[: 2 + k % 5])} for k in range(12)])


def pairs() -> Dataset:
    rows = [{"prompt": "a b", "chosen": " c d e"[: 2 + 2 * (k % 3)], "rejected": " p o n"[:4]} for k in range(12)]
    return Dataset.from_list(rows)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "max_length": 16, "bf16": False,
    }  # fmt: skip
    return {**fixed, **more}


def sft(folder: Path, method: str, model: nn.Module | None = None, **more: Any) -> DeltaSFT:
    delta = dw.attach(model or decoder(), method, seed=1)
    return DeltaSFT(
        delta, args=SFTConfig(**options(folder, **more)), train_dataset=sentences(), processing_class=tokenizer()
    )


def dpo(folder: Path, method: str, model: nn.Module | None = None, **more: Any) -> DeltaDPO:
    delta = dw.attach(model or decoder(), method, seed=1)
    return DeltaDPO(
        delta, args=DPOConfig(**options(folder, **more)), train_dataset=pairs(), processing_class=tokenizer()
    )


def losses(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def values_of(delta: dw.Delta) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in delta.named_parameters()}


def test_sft_trains_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    trainer = sft(tmp_path, "lora[rank=2]", save_strategy="steps", save_steps=STEPS)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    folder = tmp_path / f"checkpoint-{STEPS}"
    names = {path.name.split("-")[0] for path in folder.iterdir()}
    own, theirs = {"adapter.json", "adapter"}, {"adapter_config.json", "adapter_model.safetensors"}
    assert names == own | theirs | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    model, tokens = decoder(), torch.arange(2, 12)[None]
    dw.load(model, folder)
    foreign = peft.PeftModel.from_pretrained(decoder(), str(folder))
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(model.eval()(input_ids=tokens).logits, expected)
        torch.testing.assert_close(foreign.eval()(input_ids=tokens).logits, expected)


def parameters_alive() -> list[nn.Parameter]:
    """All parameters with values that anything in this process holds."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is nn.Parameter]


def test_dpo_compares_with_the_disabled_adapter_and_holds_no_second_model(tmp_path: Path) -> None:
    base = decoder()
    kept = parameters_alive()  # held, so that no id is given away again
    before, size = {id(p) for p in kept}, sum(p.numel() for p in base.parameters())
    trainer = dpo(tmp_path, "lora[rank=2]", base, max_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    first = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.train()
    own = sum(p.numel() for p in trainer.delta.parameters())
    made = {p.untyped_storage().data_ptr(): p.numel() for p in parameters_alive() if id(p) not in before}
    assert sum(made.values()) == own < size / 4
    del kept
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)  # -log sigmoid(0): the policy is the reference
    assert losses(trainer)[-1] < losses(trainer)[0]
    with torch.no_grad():
        margins = [e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e]
        for one, other in zip(first, trainer.compute_ref_log_probs(trainer.ref_model, batch), strict=True):
            assert torch.equal(one, other)  # after training, too
    assert margins[0] == 0.0
    assert margins[-1] > 0.01
    # the same with a real second model
    delta, settings = dw.attach(decoder(), "lora[rank=2]", seed=1), DPOConfig(**options(tmp_path, max_steps=2))
    twin = DPOTrainer(delta.model, decoder(), settings, train_dataset=pairs(), processing_class=tokenizer())
    twin.train()
    assert losses(twin) == pytest.approx(losses(trainer), abs=1e-6)
    expected = values_of(delta)
    for name, value in values_of(trainer.delta).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_the_reference_is_the_model_in_evaluation_mode() -> None:
    model = decoder()
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
    delta = dw.attach(model, "ia3")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3)
    model.train()
    reference = Reference(delta)
    assert not list(reference.parameters())
    assert reference.config is model.config
    with torch.no_grad():
        assert torch.equal(reference(input_ids=tokens).logits, expected)
        assert not torch.equal(model(input_ids=tokens).logits, expected)
    assert all(module.training for module in model.modules())


METHODS = [
    "adalora[rank=2, interval=1]", "lora[rank=2]+deft", "id3[keep=0.05]", "prefix-flat[length=3]", "ia3",
    "oft[block=4]", "prompt[length=2]", "lisa[layers=1]", "diff-pruning",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize("method", METHODS)
def test_any_method_and_its_procedure_work(tmp_path: Path, method: str, make: Any) -> None:
    trainer = make(tmp_path, method, max_steps=8, learning_rate=2e-2)
    calls: list[str] = []
    procedure = trainer.delta.procedure
    for name in ("begin", "gradients", "stepped", "end"):
        original = getattr(procedure, name)
        setattr(procedure, name, lambda *a, n=name, o=original: (calls.append(n), o(*a))[1])
    start = values_of(trainer.delta)
    trainer.train()
    assert calls == ["begin", *["gradients", "stepped"] * 8, "end"]
    ends = values_of(trainer.delta)
    assert any(name not in start or not torch.equal(start[name], value) for name, value in ends.items())
    assert min(losses(trainer)[4:]) < losses(trainer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora[rank=2, dropout=0.1]", "adalora[rank=2, interval=1]"])
@pytest.mark.parametrize("make", [sft, dpo])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, method: str, make: Any) -> None:
    whole = make(tmp_path / "whole", method, max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    rest = make(tmp_path / "rest", method, max_steps=6)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = values_of(whole.delta)
    for name, value in values_of(rest.delta).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpointing_train_the_same(tmp_path: Path, make: Any, reentrant: bool) -> None:
    plain = make(tmp_path / "plain", "lora[rank=2]", gradient_checkpointing=False)
    plain.train()
    kind = {"use_reentrant": reentrant}
    lean = make(tmp_path / "lean", "lora[rank=2]", gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    lean.train()
    assert losses(lean) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [SFTTrainer, DPOTrainer])
def test_losses_are_those_of_peft(tmp_path: Path, make: Any) -> None:
    ours = (sft if make is SFTTrainer else dpo)(tmp_path, "lora[rank=2, alpha=4, targets=attention.q]")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings, data = (SFTConfig, sentences()) if make is SFTTrainer else (DPOConfig, pairs())
    theirs = make(
        decoder(), args=settings(**options(tmp_path)), train_dataset=data, processing_class=tokenizer(),
        peft_config=config,
    )  # fmt: skip
    down = {name.split(".lora_A")[0][-len("layers.0.self_attn.q_proj"):]: parameter
            for name, parameter in theirs.model.named_parameters() if "lora_A.default" in name}  # fmt: skip
    with torch.no_grad():
        for item in ours.delta.attached:
            A, _, _ = item.tuner.factors()
            A.copy_(down[item.place.path[-len("layers.0.self_attn.q_proj") :]])
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)


@pytest.mark.slow
def test_reference_values_can_be_computed_before(tmp_path: Path) -> None:
    live = dpo(tmp_path / "live", "lora[rank=2]")
    live.train()
    early = dpo(tmp_path / "early", "lora[rank=2]", precompute_ref_log_probs=True)
    early.train()
    assert losses(early) == pytest.approx(losses(live), abs=1e-5)


def test_a_quantized_base_trains_float32_masters(tmp_path: Path) -> None:
    """TRL casts what is trained on a quantized base to bfloat16."""
    model = decoder()
    model.is_loaded_in_4bit = True
    delta = dw.attach(model, "lora[rank=2]")
    before = values_of(delta)
    trainer = DeltaSFT(
        delta, args=SFTConfig(**options(tmp_path)), train_dataset=sentences(), processing_class=tokenizer()
    )
    for name, parameter in trainer.delta.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to do for peft_config: leave it out"):
        DeltaSFT(dw.attach(decoder(), "lora"), peft_config=peft.LoraConfig())
    with pytest.raises(UserError, match="sync_ref_model updates a second model"):
        dpo(tmp_path, "lora[rank=2]", sync_ref_model=True)
    with pytest.raises(UserError, match="DeltaSFT multiplies by the weight of 'lm_head' itself"):
        sft(tmp_path, "nera[targets=head]")


@pytest.mark.slow
@pytest.mark.parametrize("make", [SFTTrainer, DPOTrainer])
def test_the_output_layer_trains_though_its_weight_is_read_from_outside(tmp_path: Path, make: Any) -> None:
    """TRL multiplies by ``lm_head.weight`` in tiles, without calling the layer."""
    ours = (sft if make is SFTTrainer else dpo)(tmp_path, "full[targets='linear,head']", learning_rate=1e-3)
    settings, data = (SFTConfig, sentences()) if make is SFTTrainer else (DPOConfig, pairs())
    theirs, more = decoder(), {} if make is SFTTrainer else {"ref_model": decoder()}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("proj" in name or "lm_head" in name)
    trainer = make(
        theirs, args=settings(**options(tmp_path, learning_rate=1e-3)), train_dataset=data,
        processing_class=tokenizer(), **more,
    )  # fmt: skip
    start = theirs.lm_head.weight.detach().clone()
    ours.train()
    trainer.train()
    assert losses(ours) == pytest.approx(losses(trainer), abs=1e-5)
    ours.delta.merge()
    assert not torch.allclose(theirs.lm_head.weight, start, atol=1e-4)
    torch.testing.assert_close(ours.model.lm_head.weight, theirs.lm_head.weight, rtol=1e-4, atol=1e-5)
