"""Files of diffusers, both ways: what one library computes after loading the other's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from beyond import BEYOND, output_of
from conformance import difference, disturb
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import deltaworks as dw
from deltaworks.store.foreign import ConversionWarning

FILE = "pytorch_lora_weights.safetensors"
PART = {"unet": "unet", "sd3": "transformer", "flux": "transformer"}
CLOSE = 2e-6  # relative; one rounding of float32 in each of a few layers


def fresh(family: str) -> tuple[Any, dict[str, Any]]:
    return BEYOND[family]()


@torch.no_grad()
def computed(family: str, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return output_of(family, model, inputs)


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("unet", "lora", {"rank": 4}),
        ("unet", "lora", {"rank": 2, "targets": "linear,conv,modulation", "dora": True}),
        ("unet", "lora[rank=2,targets=cross_attention]+lora[rank=3,alpha=7,targets=conv]", {}),
        ("unet", "lokr", {"targets": "attention"}),
        ("sd3", "lora", {"rank": 4, "rslora": True, "targets": "attention,modulation"}),
        ("sd3", "lora", {"rank": 4, "alpha": 3.0}),
        ("flux", "adalora", {}),
    ],
)
def test_diffusers_computes_what_we_saved(family: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = fresh(family)
    delta = dw.attach(model, method, **options)
    disturb(delta)
    expected = computed(family, model, inputs)
    delta.save(tmp_path, format="diffusers")
    theirs, _ = fresh(family)
    theirs.load_lora_adapter(tmp_path, prefix=PART[family], use_safetensors=True)
    assert difference(computed(family, theirs, inputs), expected) < CLOSE
    ours, _ = fresh(family)
    dw.load(ours, tmp_path)
    assert difference(computed(family, ours, inputs), expected) < CLOSE


@pytest.mark.parametrize("family", PART)
def test_we_compute_what_diffusers_saved(family: str, tmp_path: Path) -> None:
    theirs, inputs = fresh(family)
    targets = ["to_q", "to_k", "to_out.0", "proj_out"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"to_k": 2})
    theirs.add_adapter(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    expected = computed(family, theirs, inputs)
    theirs.save_lora_adapter(tmp_path / "model")  # no part in its names
    layers = peft.get_peft_model_state_dict(theirs)
    pipeline = {"unet": diffusers.StableDiffusionPipeline}.get(family, diffusers.StableDiffusion3Pipeline)
    part = PART[family]
    metadata = {f"{part}_lora_adapter_metadata": theirs.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(tmp_path / "pipeline", **{f"{part}_lora_layers": layers}, **metadata)
    for folder in ("model", "pipeline"):
        ours, _ = fresh(family)
        dw.load(ours, tmp_path / folder)
        assert difference(computed(family, ours, inputs), expected) < CLOSE


def test_a_pipeline_reads_two_parts_from_one_file(tmp_path: Path) -> None:
    import transformers as hf

    def text_encoder() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return hf.CLIPTextModel(hf.CLIPTextConfig(**sizes, vocab_size=64, eos_token_id=2)).eval()

    unet, inputs = fresh("unet")
    text, tokens = text_encoder(), torch.arange(3, 13)[None]
    for model in (unet, text):
        delta = dw.attach(model, "lora", rank=4)
        disturb(delta)
        delta.save(tmp_path, format="diffusers")
    with torch.no_grad():
        expected = computed("unet", unet, inputs), text(tokens).last_hidden_state
    own, _ = fresh("unet")
    parts = {"vae": None, "tokenizer": None, "scheduler": diffusers.DDIMScheduler(), "safety_checker": None}
    parts |= {"feature_extractor": None, "requires_safety_checker": False}
    pipe = diffusers.StableDiffusionPipeline(unet=own, text_encoder=text_encoder(), **parts)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert difference(computed("unet", pipe.unet, inputs), expected[0]) < CLOSE
        assert difference(pipe.text_encoder(tokens).last_hidden_state, expected[1]) < CLOSE
    again, _ = fresh("unet")
    with pytest.warns(ConversionWarning, match="also holds adapters of text_encoder"):
        dw.load(again, tmp_path)
    assert difference(computed("unet", again, inputs), expected[0]) < CLOSE


def test_a_file_by_the_old_names_without_a_configuration(tmp_path: Path) -> None:
    model, inputs = fresh("unet")
    delta = dw.attach(model, "lora", rank=4, alpha=4.0, targets="attention")
    disturb(delta)
    expected = computed("unet", model, inputs)
    delta.save(tmp_path, format="diffusers")
    old = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    tensors = load_file(tmp_path / FILE)
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / FILE)
    theirs, ours = fresh("unet")[0], fresh("unet")[0]
    theirs.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    dw.load(ours, tmp_path)
    assert difference(computed("unet", theirs, inputs), expected) < CLOSE
    assert difference(computed("unet", ours, inputs), expected) < CLOSE


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model, _ = fresh("unet")
    with pytest.raises(dw.UserError, match="computes something that no weight can hold"):
        dw.attach(model, "houlsby", width=4).save(tmp_path, format="diffusers")
    dw.switch(model, None)
    with pytest.raises(dw.UserError, match="trained in full: leave also= and bitfit out"):
        dw.attach(model, "lora", name="head", also="head").save(tmp_path, format="diffusers")
    assert not (tmp_path / FILE).exists()
    delta = dw.attach(model, "lora", name="plain")
    delta.save(tmp_path, format="diffusers")
    with safe_open(tmp_path / FILE, "pt") as file:
        assert "unet.r" in file.metadata()["lora_adapter_metadata"]
    with pytest.raises(dw.UserError, match="holds adapters of unet, not of the transformer"):
        dw.load(fresh("sd3")[0], tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = next(iter(tensors))
    save_file(tensors | {key.replace("attn1", "attn7"): tensors[key].clone()}, tmp_path / FILE)
    with pytest.raises(dw.UserError, match=r"without a place: .*attn7"):
        dw.load(fresh("unet")[0], tmp_path)
    with pytest.raises(dw.UserError, match="diffusers loads no adapter into a DiTTransformer2DModel"):
        dw.attach(fresh("dit")[0], "lora").save(tmp_path / "other", format="diffusers")
