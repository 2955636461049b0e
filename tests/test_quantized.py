"""Quantized bases: what QLoRA must hold, beside a plain oracle and peft; memory, merging, loading by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from conformance import begin, difference, disturb, held
from quantizing import FORMATS, quantize, quantized
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.quantized import dense_weight, entries, is_quantized, steady, storages
from deltaworks.core.replacing import dequantize
from deltaworks.train.measure import model_bytes, step_memory
from deltaworks.train.models import load_model
from deltaworks.train.quantizing import FORMS, Quantization

ROUNDED = {"int8": 3e-2}  # evaluation quantizes the inputs too
EXACT = 2e-6


def layer(form: str, out: int = 96, inner: int = 128, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Any]:
    """A plain layer and the same one quantized."""
    torch.manual_seed(0)
    plain = nn.Linear(inner, out).to(dtype)
    return plain, quantized(copy.deepcopy(plain), form)


def small(form: str, family: str = "llama") -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = zoo.ZOO[family]()
    return quantize(model, form), inputs


# ---------------------------------------------------------------------- the layer


def test_nf4_by_hand() -> None:
    """One block with the largest value 1.2: codes, bytes and values of the sheet's example."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = torch.tensor([[0.30, -0.60, 0, 1.20, -0.05, 0.75, -1.20, 0.10]])
    codes, state = quantize_4bit(w, quant_type="nf4", blocksize=64)
    assert codes.flatten().tolist() == [162, 127, 125, 8]
    expected = torch.tensor([[0.295335, -0.630088, 0, 1.2, 0, 0.675140, -1.2, 0.095496]])
    again = dequantize_4bit(codes, state)
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)
    assert torch.equal(dequantize_4bit(*quantize_4bit(again, quant_type="nf4", blocksize=64)), again)


@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_is_read_as_a_matrix(form: str) -> None:
    plain, made = layer(form)
    assert is_quantized(made)
    assert not is_quantized(plain)
    dense = dense_weight(made)
    assert dense.shape == (96, 128)
    assert entries(made.weight) == 96 * 128
    # half of the widest gap between two levels, in units of the largest value
    gap = {"int8": 2 / 254, "int8wo": 2 / 254, "int4wo": 2 / 15, "fp4": 1 / 3}.get(form, 1 - 0.6961)
    largest = plain.weight.detach().abs().max()
    assert 0 < float((dense - plain.weight.detach()).abs().max() / largest) <= 0.51 * gap + 0.001
    assert torch.equal(dense_weight(made), dense)
    x = torch.randn(5, 128)
    made.train()
    assert difference(made(x), nn.functional.linear(x, dense, plain.bias)) < EXACT
    assert torch.equal(dense_weight(made), dense), "the first forward moves int8's scales"


@pytest.mark.parametrize("form", FORMATS)
def test_lora_equals_a_plain_oracle_in_float64(form: str) -> None:
    """The output, the gradient of the input and those of A and B: W dequantized, then LoRA, all in float64."""
    _, made = layer(form)
    dense = dense_weight(made).double()
    model = nn.Sequential(made)
    delta = dw.attach(model, "lora[rank=4]", targets="0")
    disturb(delta)
    tuner: Any = delta.attached[0].tuner
    x = torch.randn(7, 128, requires_grad=True)
    seed = torch.randn(7, 96)
    model.train()
    y = model(x)
    y.backward(seed)

    A, B = (getattr(tuner, name).detach().double().requires_grad_() for name in ("A", "B"))
    x64 = x.detach().double().requires_grad_()
    oracle = x64 @ dense.t() + made.bias.double() + tuner.factors().scale * (x64 @ A.t()) @ B.t()
    oracle.backward(seed.double())
    assert difference(y, oracle) < EXACT
    for ours, theirs in ((x.grad, x64.grad), (tuner.A.grad, A.grad), (tuner.B.grad, B.grad)):
        assert ours is not None
        assert theirs is not None
        assert difference(ours, theirs) < EXACT
    assert all(p.grad is None for p in made.parameters(recurse=False))


@pytest.mark.parametrize("form", ["nf4", "int8wo"])
def test_neither_the_input_nor_a_plain_weight_is_kept(form: str) -> None:
    """The base product saves nothing and the low-rank one its input: what is kept does not grow with out x in."""
    kept = []
    for out in (512, 2048):
        model = nn.Sequential(layer(form, out, 512)[1])
        delta = dw.attach(model, "lora[rank=2]", targets="0")
        x = torch.randn(4, 512, requires_grad=True)
        model.train()
        kept.append(step_memory(model, lambda m=model, x=x: m(x).sum()).saved)  # type: ignore[misc]
        delta.detach()
    assert kept[1] - kept[0] < 4 * 4 * 2048 + 4 * 2 * 2048, "outputs and B may be kept, and no weight"
    model = nn.Sequential(layer(form, 2048, 512)[1])
    dw.attach(model, "hut[rank=2]", targets="0")
    model.train()
    x = torch.randn(4, 512, requires_grad=True)
    assert step_memory(model, lambda: model(x).sum()).saved < 2048 * 512, "a weight of float32 is four times that"


def test_gradients_flow_where_no_tuner_stands_and_after_an_evaluation() -> None:
    """bitsandbytes repacks weights when they are evaluated on some processors, and has no gradient from then on."""
    model, inputs = small("nf4")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    flags = [steady(copy.deepcopy(module)) for module in model.modules()]
    delta = dw.attach(model, "lora[rank=2]", targets="attention.q@0")
    first = zoo.output_of("llama", model, inputs)
    model.train()
    zoo.loss_of("llama", model, inputs).backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    assert torch.equal(zoo.output_of("llama", model.eval(), inputs), first)
    delta.detach()
    assert [getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules()] == flags


def test_a_layer_of_any_library_is_one() -> None:
    """Codes in buffers, a kernel without a gradient, no ``dequantize``: the weight is what it makes of the identity."""

    class Packed(nn.Module):
        def __init__(self, weight: Tensor, bias: Tensor) -> None:
            super().__init__()
            self.out_features, self.in_features = weight.shape
            scale = weight.abs().amax(1, keepdim=True) / 127
            self.register_buffer("qweight", (weight / scale).round().to(torch.int8))
            self.register_buffer("scales", scale)
            self.register_buffer("bias", bias)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return nn.functional.linear(x, self.qweight * self.scales, self.bias)

    torch.manual_seed(0)
    plain = nn.Linear(12, 8)
    model = nn.Sequential(nn.Linear(6, 12), Packed(plain.weight.data, plain.bias.data), nn.Linear(8, 3))
    dense = model[1].qweight * model[1].scales  # type: ignore[operator]
    x = torch.randn(5, 6)
    for method in ("lora[rank=2]", "hut[rank=2]"):
        delta = dw.attach(model, method, targets="0,1")
        disturb(delta)
        out = model(x)
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in delta.parameters()), "also in front of the packed layer"
        cost = delta.merge()
        assert cost < 1e-6
        assert difference(model(x), out) < EXACT
        delta.unmerge()
        delta.detach()
        assert torch.equal(dense_weight(model[1]), dense)


# ---------------------------------------------------------------------- methods on models


def test_sparse_methods_choose_among_quantized_weights() -> None:
    model, inputs = small("nf4")
    delta = dw.attach(model, "fish[keep=0.01]")
    begin(delta, "llama", inputs)
    kept = delta.procedure.details()["fish_entries"]
    assert any("q_proj" in name or "up_proj" in name for name in kept), kept
    weights = sum(entries(parameter) for name, parameter in model.named_parameters() if ".deltas." not in name)
    head = model.get_submodule("lm_head").weight.numel()  # type: ignore[union-attr, operator]
    assert sum(kept.values()) == int(0.01 * (weights - head))


def test_counts_are_of_values() -> None:
    plain, _ = zoo.ZOO["llama"]()
    model, _ = small("nf4")
    assert dw.attach(model, "lora[rank=2]").report().total == dw.attach(plain, "lora[rank=2]").report().total
    assert str(dw.anatomy(model)).splitlines()[0] == str(dw.anatomy(plain)).splitlines()[0]


def test_an_adapter_moves_between_precisions_of_one_base(tmp_path: Path) -> None:
    model, inputs = small("nf4")
    delta = dw.attach(model, "lora[rank=2]")
    disturb(delta)
    delta.save(tmp_path)
    for form in ("nf4", "int8wo"):
        other, _ = small(form)
        dw.load(other, tmp_path)
        same = difference(zoo.output_of("llama", other, inputs), zoo.output_of("llama", model, inputs))
        assert same < 1e-6 if form == "nf4" else same > 1e-3
    plain, _ = zoo.ZOO["llama"]()
    dw.load(plain, tmp_path)
    other, _ = zoo.ZOO["llama"]()
    with torch.no_grad():
        other.get_submodule("model.norm").weight.mul_(2)  # type: ignore[union-attr, operator]
        other.get_submodule("model.layers.1.input_layernorm").weight.mul_(2)  # type: ignore[union-attr, operator]
    with pytest.raises(dw.UserError, match="holds other values"):
        dw.load(quantize(other, "int8wo"), tmp_path)


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize("form", FORMATS)
def test_merging_gives_plain_layers_and_tells_what_rounding_costs(form: str) -> None:
    model, inputs = small(form)
    before = held(model)
    delta = dw.attach(model, "lora[rank=2]", targets="attention.q")
    disturb(delta)
    out = zoo.output_of("llama", model, inputs)
    assert delta.merge() < 1e-6, "float32 holds the sum"
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")._plain_class) is type  # type: ignore[union-attr]
    assert not is_quantized(model.get_submodule("model.layers.0.self_attn.q_proj"))
    assert is_quantized(model.get_submodule("model.layers.0.self_attn.k_proj"))
    assert difference(zoo.output_of("llama", model, inputs), out) < ROUNDED.get(form, EXACT)
    delta.unmerge()
    assert torch.equal(zoo.output_of("llama", model, inputs), out)
    delta.merge(keep_base=False)
    assert not any(map(is_quantized, model.modules()))
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert difference(zoo.output_of("llama", model, inputs), out) < ROUNDED.get(form, EXACT)
    again, _ = small(form)
    assert all(torch.equal(piece, before[name]) for name, piece in held(again).items())


def test_what_rounding_costs_is_the_largest_row_of_the_difference() -> None:
    model = nn.Sequential(layer("nf4", dtype=torch.bfloat16)[1], nn.LayerNorm(96).bfloat16())
    delta = dw.attach(model, "lora[rank=2]", targets="0")
    disturb(delta)
    A, B, scale = delta.tuners()[0].factors()
    exact = dense_weight(model[0]).float() + scale * B @ A
    expected = torch.linalg.vector_norm(exact - exact.bfloat16().float(), dim=1).max()
    assert delta.merge() == pytest.approx(expected.item(), rel=1e-4)
    assert model[0].weight.dtype == torch.bfloat16


def test_quantized_again_only_when_asked() -> None:
    model, inputs = small("nf4")
    delta = dw.attach(model, "lora[rank=2]")
    disturb(delta)
    out = zoo.output_of("llama", model, inputs)
    cost = delta.merge(requantize=True)
    rounded = zoo.output_of("llama", model, inputs)
    assert all(is_quantized(item.tuner.place and model.get_submodule(item.place.path)) for item in delta.attached)
    assert cost > 0.05
    assert difference(rounded, out) > 1e-2
    delta.unmerge()
    assert torch.equal(zoo.output_of("llama", model, inputs), out)
    delta.merge(requantize=True, keep_base=False)
    assert torch.equal(zoo.output_of("llama", model, inputs), rounded)
    assert all(map(is_quantized, (model.get_submodule(f"model.layers.0.mlp.{n}_proj") for n in ("up", "gate", "down"))))


def test_what_cannot_be_quantized_again_is_refused() -> None:
    model, inputs = small("int8wo")
    delta = dw.attach(model, "lora[rank=2]")
    disturb(delta)
    out = zoo.output_of("llama", model, inputs)
    with pytest.raises(dw.UserError, match=r"does not tell how it was quantized.*merge into a dequantized copy"):
        delta.merge(requantize=True)
    assert torch.equal(zoo.output_of("llama", model, inputs), out)


# ---------------------------------------------------------------------- loaded by name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with sizes that every format takes, and its tokenizer."""
    from test_models import write_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 40}
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)).save_pretrained(folder)
    write_tokenizer(folder, unk_token="[UNK]", eos_token="</s>")
    return folder


def loaded(folder: Path, form: str, double: bool = True, dtype: str = "float32") -> Any:
    return load_model(folder, "causal", labels=None, dtype=dtype, quantization=Quantization(form, double)).model


IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("form", FORMS)
def test_loading_by_name_quantizes_the_linears_of_the_blocks(folder: Path, form: str) -> None:
    model = loaded(folder, form)
    plain = load_model(folder, "causal", labels=None).model
    linears = {name for name, module in model.named_modules() if is_quantized(module)}
    assert linears == {place.path for place in dw.anatomy(plain).select("linear")}
    off = difference(model(IDS).logits, plain(IDS).logits)
    assert 1e-4 < off < (0.1 if "int8" in form else 1)
    dequantize(model)
    out = model(IDS).logits
    assert not hasattr(model.config, "quantization_config")
    assert difference(loaded(folder, form)(IDS).logits, out) < ROUNDED.get(form, EXACT)


def test_a_model_that_comes_quantized(folder: Path, tmp_path: Path) -> None:
    """What was saved quantized is loaded so, tuned, merged and saved as a plain model."""
    first = loaded(folder, "nf4")
    first.save_pretrained(tmp_path / "nf4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "nf4" / name).write_bytes((folder / name).read_bytes())
    model: Any = load_model(tmp_path / "nf4", "causal", labels=None).model
    assert torch.equal(model(IDS).logits, first(IDS).logits)
    with pytest.raises(dw.UserError, match="comes quantized: leave quantize=int8 out"):
        loaded(tmp_path / "nf4", "int8")
    delta = dw.attach(model, "lora[rank=2]")
    disturb(delta)
    out = model(IDS).logits
    delta.merge(keep_base=False)
    model.save_pretrained(tmp_path / "plain")
    again = load_model_without_tokenizer(tmp_path / "plain")
    assert not any(map(is_quantized, again.modules()))
    assert difference(again(IDS).logits, out) < EXACT


def load_model_without_tokenizer(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("form", ["nf4", "int8", "int8wo"])
def test_quantized_again_is_saved_and_loaded_as_quantized(folder: Path, tmp_path: Path, form: str) -> None:
    model = loaded(folder, form)
    delta = dw.attach(model, "lora[rank=2]")
    disturb(delta)
    delta.merge(requantize=True, keep_base=False)
    out = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = load_model_without_tokenizer(tmp_path)
    for module in again.modules():
        steady(module)
    assert any(map(is_quantized, again.modules()))
    assert difference(again(IDS).logits, out) < EXACT


@pytest.mark.parametrize(
    ("source", "form", "message"),
    [
        ("tiny-vit", "nf4", "which 'tiny-vit' is not"),
        ("tiny_models:plain", "nf4", "for models that are loaded from files"),
        ("folder", "nf5", "quantize: input should be 'nf4'"),
    ],
)
def test_mistakes(source: str, form: str, message: str) -> None:
    from deltaworks.train.recipe import parse_recipe

    def run() -> None:
        recipe = parse_recipe({"model": source, "quantize": form})
        load_model(source, "images", labels=["a", "b"], quantization=recipe.quantization)

    with pytest.raises(dw.UserError, match=message):
        run()


# ---------------------------------------------------------------------- beside peft


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_peft_on_the_same_model(folder: Path, form: str) -> None:
    """The same LoRA on the same quantized model: outputs and gradients."""
    peft = pytest.importorskip("peft")
    model = loaded(folder, form)
    delta = dw.attach(model, "lora[rank=4,alpha=8]", targets="attention.q,attention.v")
    disturb(delta)
    other = loaded(folder, form)
    other = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for item in delta.attached:
        twin = other.base_model.model.get_submodule(item.place.path)
        for name, side in (("A", twin.lora_A), ("B", twin.lora_B)):
            side["default"].weight.data.copy_(getattr(item.tuner, name).data)
    for each in (model, other):
        each.train()
        each(IDS, labels=IDS).loss.backward()
        each.eval()
    assert difference(model(IDS).logits, other(IDS).logits) < EXACT
    for item in delta.attached:
        twin = other.base_model.model.get_submodule(item.place.path)
        for name, side in (("A", twin.lora_A), ("B", twin.lora_B)):
            assert difference(getattr(item.tuner, name).grad, side["default"].weight.grad) < 1e-5


# ---------------------------------------------------------------------- bytes


def test_bytes_of_a_large_weight() -> None:
    """4096 x 4096 with double quantization: codes, codes of scales, scales of these, an offset, two tables."""
    from bitsandbytes import nn as bnb

    wide = bnb.Linear4bit(4096, 4096, bias=False, quant_type="nf4", compress_statistics=True)
    wide.weight = bnb.Params4bit(torch.randn(4096, 4096, dtype=torch.bfloat16), quant_type="nf4", module=wide)
    wide.to("cpu")
    sizes = [piece.numel() * piece.element_size() for piece in storages(wide)]
    assert sum(sizes) == 8_388_608 + 262_144 + 4 * 1024 + 4 + 4 * 16 + 4 * 256
    assert 8 * sum(sizes) / 4096**2 == pytest.approx(4.127, abs=1e-3)
    assert model_bytes(wide) == sum(sizes)


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_has_the_bytes_of_the_loaded_model(folder: Path, form: str) -> None:
    from deltaworks.advise.estimate import estimate

    for double in (True, False) if form in ("nf4", "fp4") else (True,):
        options: dict[str, Any] = {"batch": 2, "length": 8, "dtype": "bfloat16", "hardware": "rtx-4090"}
        found = estimate(str(folder), "lora", quantize=form, double_quantization=double, **options)
        model = loaded(folder, form, double, "bfloat16")
        assert found.weight_bytes == model_bytes(model)
        assert found.parameters == sum(map(entries, model.parameters()))


@pytest.mark.parametrize("method", ["lora[rank=2]", "hut[rank=2]"])
def test_a_plan_keeps_what_the_loaded_model_keeps(folder: Path, method: str) -> None:
    """Saved activations: products of form 1 keep their input, those of form 2 are made again."""
    from deltaworks.advise.estimate import estimate
    from deltaworks.advise.rehearsal import loss_of

    found = estimate(str(folder), method, batch=2, length=12, quantize="nf4", hardware=None)
    model = loaded(folder, "nf4").train()
    dw.attach(model, method)
    batch = {"input_ids": IDS.expand(2, -1), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    saved = step_memory(model, lambda: loss_of(model, batch)).saved
    assert found.activation_bytes == pytest.approx(saved, rel=0.02)


def test_hooks_of_accelerate_stand_behind_the_tuners() -> None:
    """A model on several devices has them on every layer, in place of its forward."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, inputs = small("nf4")
    plain = zoo.output_of("llama", model, inputs)
    expected = {}
    for hooked in (False, True):
        if hooked:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        forwards = [module.__dict__.get("forward") for module in model.modules()]
        for method in ("lora[rank=2]", "hut[rank=2]"):
            delta = dw.attach(model, method)
            disturb(delta)
            out = zoo.output_of("llama", model, inputs)
            assert difference(out, expected.setdefault(method, out)) == 0
            assert difference(out, plain) > 1e-3
            delta.detach()
        assert [module.__dict__.get("forward") for module in model.modules()] == forwards
        assert torch.equal(zoo.output_of("llama", model, inputs), plain)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int8wo"])
@pytest.mark.parametrize("method", ["lora[rank=2]", "hut[rank=2]"])
def test_compiles_as_one_graph(method: str, form: str) -> None:
    model, inputs = small(form)
    disturb(dw.attach(model, method))
    expected = zoo.output_of("llama", model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(zoo.output_of("llama", compiled, inputs), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_tunes_and_merges(tmp_path: Path, form: str) -> None:
    from deltaworks.train.recipe import parse_recipe
    from deltaworks.train.tune import merge, tune

    settings = {
        "model": "tiny-lm", "data": "stdlib-text", "method": "lora[rank=4]", "quantize": form, "limit": 16,
        "test_limit": 4, "steps": 2, "batch_size": 4, "max_length": 32, "forgetting": "none", "ranks": False,
    }  # fmt: skip
    record = tune(parse_recipe(settings | {"out": str(tmp_path / "run")}))
    assert record.dtypes["base"] == form
    assert record.model.parameters == 5_999_872
    assert record.peak_memory_bytes is not None
    assert merge(tmp_path / "run", tmp_path / "merged") < (2.0 if form == "int8" else 1e-3)
    again = load_model(tmp_path / "merged", "causal", labels=None).model
    assert not any(map(is_quantized, again.modules()))
    if form == "nf4":
        assert merge(tmp_path / "run", tmp_path / "codes", requantize=True) > 1e-3
        again = load_model(tmp_path / "codes", "causal", labels=None).model
        assert any(map(is_quantized, again.modules()))
