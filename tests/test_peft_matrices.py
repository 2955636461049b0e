"""peft's checkpoints of matrices inside modules, both ways: experts, routers and MultiheadAttention."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conformance import difference, disturb
from safetensors.torch import load_file, save_file
from test_experts import FAMILIES, build, logits
from torch import Tensor, nn

import deltaworks as dw

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Attending(nn.Module):
    """Shapes: [batch, length, 16] in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x)[0])


def attending() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attending().eval()


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
Case = tuple[Callable[[], Any], Callable[[Any], Tensor], dict[str, Any]]
CASES: dict[str, Case] = {
    name: (
        lambda name=name: build(name),
        logits,
        {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH},
    )
    for name in FAMILIES
}
CASES["one of one layer"] = (
    lambda: build("mixtral"),
    logits,
    {
        "r": 2,
        "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"],
        "target_modules": [],
        "use_rslora": True,
    },
)
CASES["patterns and routers"] = (
    lambda: build("mixtral"),
    logits,
    {
        "r": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight"],
        "rank_pattern": {"experts.down_proj": 3},
        "alpha_pattern": {"experts.down_proj": 7},
    },
)
CASES["attention"] = (attending, lambda m: m(X), {"r": 2, "lora_alpha": 3, "target_modules": ["attn", "out"]})


def theirs(case: Case, folder: Path) -> Tensor:
    """Save an adapter of peft that has moved from its start; returns the output of its model."""
    make, output, options = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank_pattern is compared with modules alone, but does act
        model = peft.get_peft_model(make(), peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return output(model).detach()


@pytest.mark.parametrize("name", CASES)
def test_read_and_written(name: str, tmp_path: Path) -> None:
    make, output, options = CASES[name]
    expected = theirs(CASES[name], tmp_path / "theirs")
    model = make()
    base = output(model)
    delta = dw.load(model, tmp_path / "theirs")
    assert difference(output(model), expected) < 2e-6
    assert difference(expected, base) > 0.05
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "theirs" / "adapter_model.safetensors").values())
    assert sum(parameter.numel() for parameter in delta.parameters()) == count

    delta.save(tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert difference(output(again), expected) < 2e-6
    delta.merge()
    assert difference(output(model), expected) < 5e-6
    delta.unmerge()
    delta.detach()
    assert torch.equal(output(model), base)

    attached = dw.attach(model, peft.LoraConfig(**options))
    assert sum(parameter.numel() for parameter in attached.parameters()) == count


def test_some_experts_and_halves_are_written_with_zeros_beside(tmp_path: Path) -> None:
    """Experts that are not adapted and the other half of a fused projection do not move."""
    model = build("mixtral")
    delta = dw.attach(model, "lora", rank=2, targets=["mlp.experts.up", "experts.2.down_proj@1", "attention.q"])
    disturb(delta)
    expected = logits(model)
    delta.save(tmp_path, format="peft")
    again = peft.PeftModel.from_pretrained(build("mixtral"), str(tmp_path)).eval()
    assert difference(logits(again), expected) < 2e-6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    nested = stored["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].view(32, 2, 4)
    assert [bool(nested[..., expert].any()) for expert in range(4)] == [False, False, True, False]


def test_other_methods_on_experts_become_lora(tmp_path: Path) -> None:
    model = build("mixtral")
    delta = dw.attach(model, "oft", targets="experts", block=8)
    disturb(delta, size=0.02)
    expected = logits(model)
    with pytest.warns(UserWarning, match="rank 32 holds all but"):
        delta.save(tmp_path, format="peft", rank=32)
    again = peft.PeftModel.from_pretrained(build("mixtral"), str(tmp_path)).eval()
    assert difference(logits(again), expected) < 1e-4
    with pytest.raises(dw.UserError, match="is no low-rank change"):
        delta.save(tmp_path, format="peft")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    theirs(CASES["mixtral"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    model = build("mixtral")
    for wrong, words in (
        ({key: tensors[key][:-1].contiguous()}, r"is \[7, 32\], not of 4 experts x rank 2"),
        ({key: None}, "misses .*base_layer.lora_A.weight', of gate_up_proj of 4 experts"),
    ):
        save_file({name: value for name, value in (tensors | wrong).items() if value is not None}, file)
        with pytest.raises(dw.UserError, match=words):
            dw.load(model, tmp_path)
        assert not [module for module in model.modules() if "_board" in module.__dict__]
    with pytest.raises(dw.UserError, match=r"target_parameters: 'experts.middle' names no matrix here"):
        dw.attach(model, peft.LoraConfig(target_modules=[], target_parameters=["experts.middle"]))


@pytest.mark.parametrize("rank", [None, 2])
def test_vllm_has_no_names_for_experts(rank: int | None, tmp_path: Path) -> None:
    delta = dw.attach(build("mixtral"), "lora[rank=2, targets=experts]")
    with pytest.raises(dw.UserError, match=r"vLLM has no names for experts, and .* merge instead"):
        delta.save(tmp_path, format="vllm", rank=rank)
