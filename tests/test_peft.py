"""Checkpoints of huggingface/peft, both ways: the same outputs on the same model, and errors that list what is wrong.

Each configuration is built by peft on a small model and given random values, written by peft and read here; then
written here and read by peft. The logits of all three agree within float rounding.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import ZOO, output_of

import deltaworks as dw
from deltaworks.store.foreign import ConversionWarning
from deltaworks.store.foreign.peft import CONFIG, WEIGHTS, described

peft = pytest.importorskip("peft")

TOLERANCE = 3e-6
"""Of the largest logit: some layers are computed in another order."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def trained(model: nn.Module, config: Any) -> nn.Module:
    """The model under peft, with random values in all that it trains."""
    with quiet():
        under = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in under.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return under.eval()


@torch.no_grad()
def logits(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The outputs at the text's own tokens: peft keeps those of virtual tokens."""
    found = output_of(name, model, {k: v for k, v in inputs.items() if k != "labels" or name == "t5"})
    if found.dim() == 2 or name == "t5":
        return found
    return found[:, -inputs["input_ids"].shape[1] :][inputs["attention_mask"] == 1]


def lora(**changes: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4} | changes)


def of(kind: str, **options: Any) -> Callable[[], Any]:
    """A configuration of another type; by default of the keys' and values' inputs."""
    return lambda: getattr(peft, f"{kind}Config")(**{"target_modules": ["q_proj", "v_proj"]} | options)


def prompt(task: str) -> Callable[[], Any]:
    return lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)


def prefix(**options: Any) -> Callable[[], Any]:
    return lambda: peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3, **options)


CAUSAL, CLASSES = "CAUSAL_LM", "SEQ_CLS"
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama", lora(task_type=CAUSAL)),
    "lora-scaled": ("llama", lora(lora_alpha=12, target_modules="all-linear", task_type=CAUSAL)),
    "lora-rslora": ("llama", lora(use_rslora=True, lora_alpha=12)),
    "lora-dora": ("llama", lora(use_dora=True, target_modules=r".*\.(q_proj|down_proj)")),
    "lora-patterns": (
        "llama",
        lora(
            target_modules="all-linear",
            use_rslora=True,
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            alpha_pattern={"v_proj": 3, "layers.0.self_attn.k_proj": 5},
        ),
    ),
    "lora-wide": ("llama", lora(r=40, lora_alpha=20, use_rslora=True, rank_pattern={"v_proj": 20})),
    "lora-layers": ("llama", lora(layers_to_transform=[1], layers_pattern="layers", exclude_modules=["v_proj"])),
    "lora-pissa": ("llama", lora(init_lora_weights="pissa", lora_alpha=8)),
    "lora-embedding": ("llama", lora(target_modules=["embed_tokens", "lm_head", "q_proj"], task_type=CAUSAL)),
    "lora-embedding-dora": ("gpt2", lora(target_modules=["wte", "c_attn"], use_dora=True, task_type=CAUSAL)),
    "lora-tied": ("qwen2", lora(target_modules=["embed_tokens"], ensure_weight_tying=True, task_type=CAUSAL)),
    "lora-untied": ("qwen2", lora(target_modules=["embed_tokens", "lm_head"], task_type=CAUSAL)),
    "lora-saved-tied": ("qwen2", lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "lora-saved-untied": ("qwen2", lora(modules_to_save=["lm_head"])),
    "lora-tokens": ("llama", lora(trainable_token_indices=[9, 4, 7], task_type=CAUSAL)),
    "lora-tokens-tied": ("qwen2", lora(trainable_token_indices={"embed_tokens": [4, 7, 9]}, task_type=CAUSAL)),
    "lora-conv1d": ("gpt2", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type=CAUSAL)),
    "lora-conv2d": ("convnet", lora(target_modules=["stem", "conv1", "head"])),
    "lora-conv2d-dora": ("convnet", lora(target_modules=["stem", "conv1"], use_dora=True)),
    "lora-classifier": ("bert", lora(target_modules=["query", "value"], task_type=CLASSES)),
    "lora-saved": ("bert", lora(target_modules=["query"], modules_to_save=["classifier", "pooler"])),
    "lora-saved-head": ("roberta", lora(target_modules=["query"], task_type=CLASSES)),
    "lora-bias-own": ("bert", lora(target_modules=["query", "dense"], bias="lora_only")),
    "lora-bias-all": ("bert", lora(target_modules=["query", "value"], bias="all", task_type=CLASSES)),
    "lora-t5": ("t5", lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
    "adalora": ("llama", of("AdaLora", target_r=3, init_r=5, lora_alpha=12, total_step=10)),
    "adalora-conv1d": ("gpt2", of("AdaLora", target_modules=["c_attn"], total_step=10, task_type=CAUSAL)),
    "loha": ("llama", of("LoHa", r=4, alpha=6, rank_pattern={"v_proj": 2})),
    "loha-conv2d": ("convnet", of("LoHa", r=4, target_modules=["stem", "conv1"])),
    "lokr": ("llama", of("LoKr", r=2, alpha=6, target_modules=["q_proj", "up_proj"])),
    "lokr-both": ("llama", of("LoKr", r=1, alpha=3, decompose_both=True, decompose_factor=4)),
    "lokr-whole": ("llama", of("LoKr", r=64, alpha=16, alpha_pattern={"v_proj": 8})),
    "lokr-whole-conv2d": ("convnet", of("LoKr", r=64, target_modules=["conv1"], use_effective_conv2d=True)),
    "lokr-conv2d": ("convnet", of("LoKr", r=2, alpha=6, target_modules=["stem", "conv1"])),
    "vera": ("llama", of("Vera", r=8, target_modules=["q_proj", "down_proj"], projection_prng_key=5)),
    "vera-conv1d": ("gpt2", of("Vera", r=8, target_modules=["c_attn"], save_projection=False, bias="vera_only")),
    "oft": ("llama", of("OFT", oft_block_size=8)),
    "oft-exact": ("bert", of("OFT", r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["key"])),
    "oft-shared": ("llama", of("OFT", oft_block_size=8, block_share=True, coft=True, eps=1e-2)),
    "boft": ("bert", of("BOFT", boft_block_size=8, target_modules=["query", "output.dense"], bias="boft_only")),
    "hra": ("llama", of("HRA", r=4)),
    "hra-orthogonal": ("llama", of("HRA", r=4, apply_GS=True)),
    "hra-conv2d": ("convnet", of("HRA", r=4, target_modules=["conv1"])),
    "fourierft": ("llama", of("FourierFT", n_frequency=40, n_frequency_pattern={"v_proj": 20})),
    "fourierft-conv1d": ("gpt2", of("FourierFT", n_frequency=40, target_modules=["c_attn"], random_loc_seed=3)),
    "miss": ("llama", of("Miss", r=8)),
    "miss-mini": ("llama", of("Miss", r=8, mini_r=4, init_weights="mini")),
    "miss-bat": ("llama", of("Miss", r=8, init_weights="bat")),
    "ia3": ("llama", of("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3-others": ("bert", of("IA3", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])),
    "ia3-conv1d": ("gpt2", of("IA3", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ln": ("llama", of("LNTuning", target_modules=["input_layernorm", "norm"], task_type=CAUSAL)),
    "ln-shifts": ("bert", of("LNTuning", target_modules=["LayerNorm"], task_type=CLASSES)),
    "prompt": ("llama", prompt(CAUSAL)),
    "prompt-absolute": ("gpt2", prompt(CAUSAL)),
    "prompt-classifier": ("bert", prompt(CLASSES)),
    "prompt-t5": ("t5", prompt("SEQ_2_SEQ_LM")),
    "p-tuning": (
        "llama",
        lambda: peft.PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=3, encoder_hidden_size=16),
    ),
    "prefix": ("llama", prefix()),
    "prefix-absolute": ("gpt2", prefix()),
    "prefix-projected": ("qwen2", prefix(prefix_projection=True, encoder_hidden_size=16)),
    "lora-vit": ("vit", lora(target_modules="all-linear", modules_to_save=["classifier"])),
}


SAID = ("lora-wide",)
"""Cases that a conversion has something to say of."""


def agree(one: Tensor, other: Tensor) -> None:
    scale = float(one.abs().max())
    assert float((one - other).abs().max()) <= TOLERANCE * max(scale, 1.0)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_pefts_both_ways(case: str, tmp_path: Path) -> None:
    name, configured = CASES[case]
    model, inputs = ZOO[name]()
    theirs = trained(model, configured())
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits(name, theirs, inputs)
    assert float((wanted - logits(name, model, inputs)).abs().max()) > 1e-2  # the adapter does something

    ours = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if case in SAID else "error", ConversionWarning)
        delta = dw.load(ours, tmp_path / "theirs")
        agree(wanted, logits(name, ours, inputs))
        delta.save(tmp_path / "ours", format="peft")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert not [str(one.message) for one in said if "missing" in str(one.message)]
    agree(wanted, logits(name, again, inputs))


NAMING_NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank_pattern": {"zzz": 3}}, "rank_pattern: 'zzz' names no adapted module"),
    "rank-elsewhere": ({"rank_pattern": {"k_proj": 3}}, "rank_pattern: 'k_proj' names no adapted module"),
    "alpha": ({"alpha_pattern": {"zzz": 3}}, "alpha_pattern: 'zzz' names no adapted module"),
    "excluded": ({"exclude_modules": ["v_projj"]}, "exclude_modules: 'v_projj' names no module .* 'v_proj'"),
    "excluded-by-expression": ({"exclude_modules": "zzz"}, "exclude_modules='zzz' names no module"),
    "layers": ({"layers_to_transform": [0, 99]}, "no target lies in a layer 99: those that have one are 0, 1"),
    "layer": ({"layers_to_transform": 99}, "no target lies in a layer 99"),
    "layers-pattern": ({"layers_to_transform": [0], "layers_pattern": "h"}, "no target lies in a layer 0: .* none"),
}


@pytest.mark.parametrize("case", NAMING_NOTHING)
def test_what_names_nothing_is_an_error_of_a_fresh_configuration(case: str) -> None:
    changes, message = NAMING_NOTHING[case]
    with pytest.raises(dw.UserError, match=message):
        dw.attach(ZOO["llama"]()[0], lora(**changes)())


def test_a_checkpoint_may_say_what_names_nothing(tmp_path: Path) -> None:
    """Its tensors say where it stands."""
    model, inputs = ZOO["llama"]()
    leftover = {"rank_pattern": {"zzz": 3}, "exclude_modules": ["zzz"], "layers_to_transform": [0, 99]}
    theirs = trained(model, lora(**leftover)())
    with quiet():
        theirs.save_pretrained(tmp_path)
    wanted = logits("llama", theirs, inputs)
    dw.load(model, tmp_path)
    agree(wanted, logits("llama", model, inputs))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rank", [4, 40])
def test_a_checkpoint_holds_real_numbers(dtype: torch.dtype, rank: int, tmp_path: Path) -> None:
    model, inputs = ZOO["llama"]()
    with quiet():
        trained(model, lora(r=rank)()).save_pretrained(tmp_path)
    save_file({k: v.to(dtype) for k, v in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    with quiet():
        if dtype.is_floating_point:  # rounded, but read as peft does
            wanted = logits("llama", peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval(), inputs)
            dw.load(model, tmp_path)
            agree(wanted, logits("llama", model, inputs))
            return
        with pytest.raises(dw.UserError, match="not of real floating-point numbers"):
            dw.load(model, tmp_path)


MALFORMED: dict[str, tuple[Any, str]] = {
    "r": (None, "r is a whole number"),
    "lora_alpha": ("four", "lora_alpha is a number"),
    "target_modules": (5, "target_modules is a regular expression or a list of names"),
    "rank_pattern": ([1], "rank_pattern is names, each with a whole number"),
    "alpha_pattern": ({"(": 2}, "alpha_pattern: '\\(' is no regular expression"),
    "layers_to_transform": ("one", "layers_to_transform is a whole number or a list of them"),
    "layers_pattern": (["("], "layers_pattern: '\\(' is no regular expression"),
    "exclude_modules": ("(", "exclude_modules: '\\(' is no regular expression"),
    "modules_to_save": ([3], "modules_to_save is a list of names"),
    "trainable_token_indices": (["a"], "trainable_token_indices is a list of whole numbers, or one for each name"),
    "bias": ("weird", "bias is 'none', 'all' or '..._only'"),
}


@pytest.mark.parametrize("field", MALFORMED)
def test_malformed_fields_are_named(field: str, tmp_path: Path) -> None:
    value, message = MALFORMED[field]
    data = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, field: value}
    (tmp_path / CONFIG).write_text(json.dumps(data))
    save_file({}, tmp_path / WEIGHTS)
    model = ZOO["llama"]()[0]
    for read in (lambda: dw.attach(model, data), lambda: dw.load(model, tmp_path), lambda: described(tmp_path)):
        with pytest.raises(dw.UserError, match=message):
            read()


def test_expressions_that_are_none_are_named() -> None:
    with pytest.raises(dw.UserError, match="target_modules: '\\(q' is no regular expression"):
        dw.attach(ZOO["llama"]()[0], lora(target_modules="(q")())


class Grouped(nn.Module):
    """Shapes: [batch, 4, 8, 8] to [batch, 8, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", ["lora[rank=4, targets=conv]", "lora[rank=2, dora=true, targets=conv]"])
def test_lora_of_grouped_convolutions_is_refused_both_ways(spec: str, tmp_path: Path) -> None:
    """Theirs sees the channels of all groups, ours is a change of the weight."""
    with pytest.raises(dw.UserError, match="'conv', a convolution of 2 groups"):
        dw.attach(Grouped(), spec).save(tmp_path, format="peft")
    assert not list(tmp_path.iterdir())
    with quiet():
        trained(Grouped(), lora(target_modules=["conv"])()).save_pretrained(tmp_path)
    with pytest.raises(dw.UserError, match="'conv', a convolution of 2 groups"):
        dw.load(Grouped(), tmp_path)


def test_schedules_of_adalora_are_kept_both_ways(tmp_path: Path) -> None:
    schedule = {"tinit": 3, "tfinal": 5, "deltaT": 2, "beta1": 0.8, "beta2": 0.8}
    config = peft.AdaLoraConfig(target_modules=["q_proj"], target_r=3, init_r=5, total_step=20, **schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        delta = dw.attach(ZOO["llama"]()[0], config)
        delta.save(tmp_path, format="peft")
    made: Any = delta.config
    assert (made.warmup, made.final, made.interval, made.beta) == (3, 5, 2, 0.8)
    written = peft.PeftConfig.from_pretrained(tmp_path)
    assert {name: getattr(written, name) for name in schedule} == schedule
    assert "warmup" not in "".join(
        said_by(lambda: dw.attach(ZOO["llama"]()[0], "adalora").save(tmp_path, format="peft"))
    )
    spec = "adalora[warmup=0.2]"
    assert "warmup=0.2" in "".join(said_by(lambda: dw.attach(ZOO["llama"]()[0], spec).save(tmp_path, format="peft")))


def said_by(act: Callable[[], Any]) -> list[str]:
    """What conversions say in it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        act()
    return [str(one.message) for one in said if issubclass(one.category, ConversionWarning)]


STARTED: dict[str, tuple[Callable[[], Any], str]] = {
    "beta2": (of("AdaLora", total_step=10, beta2=0.5), "beta2=0.5 acts in training alone"),
    "prefix": (prefix(prefix_projection=True, encoder_hidden_size=16), "prefix_projection=True acts in training alone"),
    "prompt": (
        lambda: peft.PromptTuningConfig(
            task_type=CAUSAL,
            num_virtual_tokens=3,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="sort",
            tokenizer_name_or_path="none",
        ),
        "prompt_tuning_init='TEXT' acts in training alone",
    ),
}


@pytest.mark.parametrize("case", STARTED)
def test_starts_that_differ_are_said(case: str) -> None:
    configured, message = STARTED[case]
    assert message in said_by(lambda: dw.attach(ZOO["llama"]()[0], configured()))[0]


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_factors_of_kernels_are_refused_by_their_option(kind: str, tmp_path: Path) -> None:
    config = of(kind, r=1, target_modules=["conv1"], use_effective_conv2d=True)()
    with pytest.raises(dw.UserError, match="use_effective_conv2d=True at 'blocks"):
        dw.attach(ZOO["convnet"]()[0], config)
    with quiet():
        trained(ZOO["convnet"]()[0], config).save_pretrained(tmp_path)
    with pytest.raises(dw.UserError, match="use_effective_conv2d=True at 'blocks"):
        dw.load(ZOO["convnet"]()[0], tmp_path)


def test_weights_that_are_tied_and_were_trained_apart_ask_for_an_untied_model(tmp_path: Path) -> None:
    model, inputs = ZOO["qwen2"]()
    apart = trained(model, lora(modules_to_save=["embed_tokens", "lm_head"])())
    wanted = logits("qwen2", apart, inputs)
    with quiet():
        apart.save_pretrained(tmp_path / "apart")
    with pytest.raises(dw.UserError, match=r"lm_head.weight' .* untie them first, by .* tie_word_embeddings=False"):
        dw.load(copy.deepcopy(model), tmp_path / "apart")
    untied: Any = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    dw.load(untied, tmp_path / "apart")
    agree(wanted, logits("qwen2", untied, inputs))

    tensors = load_file(tmp_path / "apart" / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "apart" / WEIGHTS)
    dw.load(model, tmp_path / "apart")
    with quiet():
        together = peft.PeftModel.from_pretrained(ZOO["qwen2"]()[0], tmp_path / "apart").eval()
    agree(logits("qwen2", together, inputs), logits("qwen2", model, inputs))


def test_a_model_with_layers_of_peft_is_refused() -> None:
    theirs: Any = peft.get_peft_model(ZOO["llama"]()[0], lora()())
    for model in (theirs, theirs.get_base_model()):
        with pytest.raises(dw.UserError, match=r"holds layers of peft: give what its unload\(\)"):
            dw.attach(model, "lora")
    dw.attach(theirs.unload(), "lora")


def test_ia3_takes_the_modules_that_peft_takes() -> None:
    model, other = ZOO["llama"]()[0], ZOO["llama"]()[0]
    with quiet():
        theirs = peft.get_peft_model(other, peft.IA3Config())
    ours = dw.attach(model, peft.IA3Config())
    placed = {f"base_model.model.{item.place.path}": item.tuner for item in ours.attached}
    scaled: dict[str, Any] = {name: m for name, m in theirs.named_modules() if hasattr(m, "is_feedforward")}
    assert {name: m.is_feedforward for name, m in scaled.items()} == {n: bool(t.columns) for n, t in placed.items()}
    with pytest.raises(dw.UserError, match="IA3 needs target_modules"):
        dw.attach(ZOO["convnet"]()[0], peft.IA3Config())
