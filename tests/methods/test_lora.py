"""LoRA, rsLoRA, DoRA, PiSSA and LoRA+: hand-made numbers, huggingface/peft side by side, published counts."""

from typing import Any

import peft
import pytest
import torch
import transformers as hf
import zoo
from conformance import frozen_output
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.report import rank_of

KINDS = ("linear", "conv1d", "conv2d", "embedding")


def layer(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer with 24 inputs and 16 outputs, and something to put in."""
    torch.manual_seed(0)
    if kind == "conv2d":
        return nn.Conv2d(24, 16, 3, padding=1, stride=2), torch.randn(2, 24, 6, 6)
    if kind == "embedding":
        return nn.Embedding(24, 16), torch.randint(0, 24, (2, 5))
    conv1d = hf.pytorch_utils.Conv1D(16, 24)
    nn.init.normal_(conv1d.weight)
    return nn.Linear(24, 16) if kind == "linear" else conv1d, torch.randn(2, 5, 24)


def attached(kind: str, spec: str, **options: Any) -> tuple[nn.Sequential, Tensor, dw.Delta]:
    module, x = layer(kind)
    model = nn.Sequential(module)
    return model, x, dw.attach(model, spec, targets="0", **options)


@torch.no_grad()
def disturb(delta: dw.Delta, size: float = 0.3) -> None:
    torch.manual_seed(1)
    for parameter in delta.parameters():
        parameter.add_(size * torch.randn_like(parameter))


# ---------------------------------------------------------------------------- the change


def test_change_by_hand() -> None:
    """W = 0 (2 x 2), A = [1, 2], B = [3, 4]^T, alpha 2, r 1: dW = [[6, 12], [8, 16]]."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    delta = dw.attach(model, "lora[rank=1,alpha=2]", targets="0")
    tuner: Any = delta.tuners()[0]
    with torch.no_grad():
        tuner.A.copy_(torch.tensor([[1.0, 2.0]]))
        tuner.B.copy_(torch.tensor([[3.0], [4.0]]))
    assert torch.equal(model(torch.eye(2)).T, torch.tensor([[6.0, 12.0], [8.0, 16.0]]))
    delta.merge()
    assert torch.equal(model[0].weight, torch.tensor([[6.0, 12.0], [8.0, 16.0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["lora", "lora[rslora=true]", "lora[dora=true]", "lora[pissa=true]"])
def test_identity_merge_and_unmerge(spec: str, kind: str) -> None:
    module, x = layer(kind)
    base, weight = module(x).detach(), module.weight.detach().clone()  # type: ignore[operator, union-attr]
    model, _, delta = attached(kind, spec, rank=4)
    torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-4 if "pissa" in spec else 1e-5)
    disturb(delta)
    moved = model(x)
    assert (moved - base).abs().max() > 0.1
    delta.merge()
    torch.testing.assert_close(model(x), moved, rtol=1e-5, atol=1e-5 * float(moved.detach().abs().max()))
    delta.unmerge()
    assert torch.equal(model[0].weight, weight)
    torch.testing.assert_close(model(x), moved)


def test_start_of_A() -> None:
    """U(-1/sqrt(in), 1/sqrt(in)), B = 0; for an embedding A = 0 and B ~ N(0, 1)."""
    _, _, delta = attached("linear", "lora", rank=16)
    tuner: Any = delta.tuners()[0]
    assert 0.19 < float(tuner.A.detach().abs().max()) <= 24**-0.5
    assert float(tuner.A.detach().std()) == pytest.approx(24**-0.5 / 3**0.5, rel=0.1)
    assert float(tuner.B.detach().abs().max()) == 0
    _, _, delta = attached("embedding", "lora", rank=16)
    tuner = delta.tuners()[0]
    assert float(tuner.A.detach().abs().max()) == 0
    assert float(tuner.B.detach().std()) == pytest.approx(1, rel=0.2)


def test_first_gradients_are_in_B_alone() -> None:
    model, x, delta = attached("linear", "lora")
    model(x).square().sum().backward()
    tuner: Any = delta.tuners()[0]
    assert float(tuner.A.grad.abs().max()) == 0
    assert float(tuner.B.grad.abs().max()) > 0
    assert model[0].weight.grad is None


def test_rank_of_the_change() -> None:
    """At most r for LoRA, 2 r for PiSSA (the start is taken away again), all for DoRA."""
    for spec, expected in (("lora", 3), ("lora[pissa=true]", 6), ("lora[dora=true]", 16)):
        _, _, delta = attached("linear", spec, rank=3)
        disturb(delta)
        change = delta.change(delta.attached[0])
        assert change is not None
        assert rank_of(change) == expected


def test_rslora_multiplies_the_change_by_the_root_of_the_rank() -> None:
    changes = []
    for spec in ("lora[rank=9]", "lora[rank=9,rslora=true]"):
        model, x, delta = attached("linear", spec)
        base = layer("linear")[0](x)
        disturb(delta)
        changes.append(model(x) - base)
    torch.testing.assert_close(changes[1], 3 * changes[0], rtol=1e-4, atol=1e-4)


def test_alpha_follows_the_rank() -> None:
    for rank in (1, 8, 16):
        tuner: Any = attached("linear", "lora", rank=rank)[2].tuners()[0]
        assert tuner.scale == 1
    tuner = attached("linear", "lora", rank=4, alpha=32)[2].tuners()[0]
    assert tuner.scale == 8


def test_dropout_acts_on_the_input_of_A_while_training_only() -> None:
    for spec in ("lora[dropout=0.5]", "lora[dropout=0.5,dora=true]"):
        model, x, delta = attached("linear", spec)
        disturb(delta)
        assert torch.equal(model.eval()(x), model(x))
        model.train()
        torch.manual_seed(0)
        first = model(x)
        assert not torch.equal(first, model(x))
        torch.manual_seed(0)
        assert torch.equal(first, model(x))
    with pytest.raises(dw.UserError, match="dora does not go with dropout at '0', which is no linear layer"):
        attached("conv2d", "lora[dropout=0.5,dora=true]")
    with pytest.raises(dw.UserError, match="dora does not go with pissa"):
        attached("linear", "lora[pissa=true,dora=true]")
    with pytest.raises(dw.UserError, match="rank 17 is larger than '0' allows"):
        attached("linear", "lora[rank=17]")


def test_an_embedding_that_is_tied_to_the_head_can_be_adapted_alone() -> None:
    model, inputs = zoo.ZOO["qwen2"]()
    head = model(**inputs).logits
    delta = dw.attach(model, "lora", targets="embedding", rank=2, tied=False)
    disturb(delta)
    hidden = torch.randn(1, zoo.WIDTH)
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(model.lm_head(hidden), hidden @ table.T)  # type: ignore[operator]
    assert (model(**inputs).logits - head).abs().max() > 0.1
    with pytest.raises(dw.UserError, match="are one tied weight and only one of them is tuned"):
        delta.merge()


# ---------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize("kind", KINDS)
def test_dora_does_not_feel_the_size_of_the_direction(kind: str) -> None:
    """W' = m (W + sBA) / ||W + sBA|| by rows: five times the direction is the same; rows have norm |m|."""
    _, _, delta = attached(kind, "lora[dora=true]", rank=4)
    disturb(delta)
    tuner: Any = delta.tuners()[0]
    weight = torch.randn(16, tuner.A.shape[1])
    changed = tuner.weight(weight)
    assert tuner.magnitude.shape == (16,)
    torch.testing.assert_close(changed.norm(dim=1), tuner.magnitude.abs())
    with torch.no_grad():
        tuner.B.mul_(5)
    torch.testing.assert_close(tuner.weight(5 * weight), changed)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dora_fast_form_equals_the_weight_form_with_its_gradients(kind: str) -> None:
    model, x, delta = attached(kind, "lora[dora=true]", rank=4, alpha=8)
    disturb(delta)
    tuner: Any = delta.tuners()[0]
    x.requires_grad_()
    target = torch.randn(2, 5, 16)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(((y - target) ** 2).sum(), [x, tuner.A, tuner.B, tuner.magnitude]))

    module: Any = model[0]
    matrix = module.weight if kind == "linear" else module.weight.T
    fast, slow = model(x), nn.functional.linear(x, tuner.weight(matrix), module.bias)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(gradients(fast), gradients(slow), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_dora_forms_nothing_of_the_size_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    delta = dw.attach(model, "lora[dora=true,rank=2]", targets="0")
    disturb(delta)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore
        model(torch.randn(4, 256, requires_grad=True))
    weight = model[0].weight.data_ptr()
    assert max(t.numel() for t in kept if t.data_ptr() != weight) <= 4 * 256


def test_dora_in_bfloat16_starts_as_the_base() -> None:
    base = frozen_output("llama", dtype=torch.bfloat16)
    model, inputs = zoo.ZOO["llama"]()
    dw.attach(model.to(torch.bfloat16), "lora[dora=true]")
    moved = zoo.output_of("llama", model, inputs)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, base)


# ---------------------------------------------------------------------------- PiSSA and LoRA+


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_leaves_the_smaller_singular_values_to_the_base(rslora: bool) -> None:
    _, _, delta = attached("linear", "lora[pissa=true]", rank=4, alpha=2, rslora=rslora)
    tuner: Any = delta.tuners()[0]
    weight: Tensor = layer("linear")[0].weight.detach()  # type: ignore[assignment]
    values = torch.linalg.svdvals(weight)
    product = (tuner.scale * tuner.B @ tuner.A).detach()
    torch.testing.assert_close(torch.linalg.svdvals(weight - product)[:12], values[4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(product)[:4], values[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuner.A @ tuner.A.T, tuner.B.T @ tuner.B, rtol=1e-4, atol=1e-5)  # S / s in both
    A, B, scale = tuner.factors()
    assert A.shape == (8, 24)
    assert B.shape == (16, 8)
    assert float((scale * B @ A).detach().abs().max()) < 1e-6
    assert sorted(tuner.stored()) == ["A", "B"]
    with pytest.raises(dw.UserError, match="alpha must be above 0"):
        attached("linear", "lora[pissa=true]", alpha=0)


def test_two_learning_rates() -> None:
    """LoRA+: with unit gradients the first Adam steps of B and A have the ratio lambda."""
    _, _, delta = attached("linear", "lora[ratio=16]")
    tuner: Any = delta.tuners()[0]
    groups = delta.parameter_groups(1e-4)
    assert sorted(group["lr"] for group in groups) == pytest.approx([1e-4, 16e-4])
    before = tuner.A.detach().clone(), tuner.B.detach().clone()
    for parameter in delta.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(groups).step()
    moved_A, moved_B = ((now - was).detach() for now, was in zip((tuner.A, tuner.B), before, strict=True))
    torch.testing.assert_close(moved_A, torch.full_like(moved_A, -1e-4), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved_B, torch.full_like(moved_B, -16e-4), rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------- the same numbers as huggingface/peft


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_equals_peft(kind: str, options: dict[str, bool]) -> None:
    """A, B (and the magnitude) copied over from peft give its outputs."""
    module, x = layer(kind)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["0"],
        init_lora_weights=True,
        use_rslora=options.get("rslora", False),
        use_dora=options.get("dora", False),
        fan_in_fan_out=kind == "conv1d",
    )
    theirs: Any = peft.get_peft_model(nn.Sequential(module), config)  # type: ignore[arg-type]
    wrapped = theirs.base_model.model[0]
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = theirs(x)
    model = nn.Sequential(wrapped.base_layer)
    delta = dw.attach(model, "lora", rank=4, alpha=10, targets="0", **options)
    tuner: Any = delta.tuners()[0]
    base = model(x).detach()
    if kind == "embedding":
        A, B = wrapped.lora_embedding_A["default"], wrapped.lora_embedding_B["default"]
    else:
        A, B = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    with torch.no_grad():
        tuner.A.copy_(A.flatten(1))
        tuner.B.copy_(B.flatten(1))
        if "dora" in options:
            tuner.magnitude.copy_(wrapped.lora_magnitude_vector["default"].weight.flatten())
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_pissa_equals_peft() -> None:
    """The same start, and the same output after A and B moved; peft keeps the difference in the base weight."""
    module, x = layer("linear")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa")
    model, _, delta = attached("linear", "lora[pissa=true]", rank=4)
    theirs: Any = peft.get_peft_model(nn.Sequential(module), config)  # type: ignore[arg-type]
    wrapped, tuner = theirs.base_model.model[0], delta.tuners()[0]
    mine: Any = tuner
    start = wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight
    torch.testing.assert_close(mine.B @ mine.A, start, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for one, other in ((mine.A, wrapped.lora_A), (mine.B, wrapped.lora_B)):
            one.copy_(2 * other["default"].weight)
            other["default"].weight.mul_(2)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- published counts

T5_QV = "attention.q,attention.v,cross_attention.q,cross_attention.v"
QV = "attention.q,attention.v"
SIX = "attention.q,attention.k,attention.v,attention.o,mlp.up,mlp.down"


@pytest.mark.parametrize(
    ("name", "targets", "rank", "expected"),
    [
        ("roberta-base", QV, 8, 294_912),
        ("gpt3", QV, 1, 4_718_592),
        ("llama-7b", "linear", 64, 159_907_840),
        ("deberta-v3-base", SIX, 8, 1_327_104),
        ("llama-3.2-3b", QV, 32, 9_175_040),
        ("t5-large", T5_QV, 8, 2_359_296),
        ("t5-3b", T5_QV, 8, 5_898_240),
        ("t5-11b", T5_QV, 8, 20_054_016),
        ("t5-large", "linear", 8, 8_650_752),
        ("t5-3b", "linear", 8, 25_165_824),
        ("t5-11b", "linear", 8, 91_226_112),
    ],
)
def test_published_counts(name: str, targets: str, rank: int, expected: int) -> None:
    assert dw.attach(zoo.real(name), "lora", rank=rank, targets=targets).report().trainable == expected


def test_count_of_dora() -> None:
    """One magnitude for each output feature more: RoBERTa-base q, v: 24 * 768."""
    delta = dw.attach(zoo.real("roberta-base"), "lora[dora=true]", targets=QV)
    assert delta.report().trainable == 294_912 + 24 * 768
