"""Lean autograd gives the gradients of torch's own, and keeps what it says."""

import contextlib
import io
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from conformance import attach as attached
from conformance import begin, build, disturb, supported
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.lean.linear import Low
from deltaworks.core.lean.neighbours import Activated, computed, rms_gain
from deltaworks.core.lean.remaking import ordinary
from deltaworks.core.wrapping import is_wrapped
from deltaworks.train.measure import step_memory

FAMILIES = ("gpt2", "bert", "t5-gated")


def gradients(method: str, family: str, lean: bool) -> tuple[Tensor, list[Tensor | None]]:
    """The output and the gradients of the trained tensors, all in float64."""
    model, inputs = build(family)
    delta = attached(model, method)
    begin(delta, family, inputs)
    disturb(delta)
    model.double()
    with contextlib.nullcontext() if lean else ordinary():
        output = zoo.output_of(family, model, inputs)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
        if output.requires_grad:  # a mask that grows is empty at first
            (output * weights).sum().backward()
    return output.detach(), [parameter.grad for parameter in delta.parameters()]


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pair if pair[1] == "gpt2" else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in supported()
        if pair[1] in FAMILIES
    ],
)
def test_gradients_are_those_of_torch(method: str, family: str) -> None:
    (output, lean), (expected, plain) = (gradients(method, family, lean) for lean in (True, False))
    # T5's norms compute in float32 whatever they are given, and torch's derivative of them as well
    limit = 1e-6 if family == "t5-gated" else 1e-10
    assert float((output - expected).abs().max()) < limit
    scale = max([1.0, *(float(g.abs().max()) for g in plain if g is not None)])
    for mine, theirs in zip(lean, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert float((mine - theirs).abs().max()) <= limit * scale


def llama(width: int = 128, layers: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8, num_hidden_layers=layers,
        num_attention_heads=4, vocab_size=64, **options,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).bfloat16()


def saved_over_floor(spec: str) -> float:
    """Bytes kept for the backward pass over those of the same model frozen, with gradients to the first block."""
    x = torch.randn(2, 256, 128).bfloat16().requires_grad_()

    def loss_of(model: nn.Module) -> Tensor:
        return model.model(inputs_embeds=x).last_hidden_state.float().square().mean()  # type: ignore[operator, union-attr]

    frozen, tuned = llama().requires_grad_(False), llama()
    dw.attach(tuned, spec)
    tuned.train()
    return step_memory(tuned, lambda: loss_of(tuned)).saved / step_memory(frozen, lambda: loss_of(frozen)).saved


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("lora[rank=16]", 0.75),
        ("lora[rank=16, dropout=0.05]", 0.75),
        ("lora[rank=16]+lora[rank=4]", 0.75),
        ("vera", 0.75),
        ("fourierft", 0.75),
        ("lora[rank=16, dora=true]", 0.9),
        ("boft", 1.5),
        ("transformed-lora", 1.5),
    ],
)
def test_less_is_kept_than_by_the_frozen_model(spec: str, most: float) -> None:
    assert saved_over_floor(spec) <= most


def test_a_mask_is_the_same_in_both_passes_and_scaled() -> None:
    low = Low(0, 1, 1.0, 0.25, seed=3)
    x = torch.ones(200, 50, dtype=torch.float64)
    kept = low.kept(x)
    assert kept is not None
    assert torch.equal(kept, low.kept(x))  # type: ignore[arg-type]
    dropped = low.dropped(x, kept)
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float(dropped.mean()) - 1) < 0.03


def test_gradients_through_dropout_are_those_of_its_mask() -> None:
    """Finite differences with the random numbers set back see the same mask."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    delta = dw.attach(model, "lora", rank=2, dropout=0.5, targets="0")
    disturb(delta)
    delta.model.double().train()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return model(x)

    assert torch.autograd.gradcheck(f, (x,))
    A, B = list(delta.parameters())

    def of_factors(a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(7)
        names = {id(p): n for n, p in model.named_parameters()}
        return torch.func.functional_call(model, {names[id(A)]: a, names[id(B)]: b}, (x,))

    assert torch.autograd.gradcheck(of_factors, (A, B))


@pytest.mark.parametrize("bias", [False, True])
def test_features_of_zeros_have_a_gain_that_learns(bias: bool) -> None:
    """Rows of a weight that are 0, as pruning leaves them: their magnitude is 0."""
    found = []
    for lean in (True, False):
        model = llama(mlp_bias=bias)
        if bias:
            nn.init.ones_(model.get_submodule("model.layers.1.mlp.gate_proj").bias)  # type: ignore[arg-type]
        gate = model.get_submodule("model.layers.1.mlp.gate_proj")
        with torch.no_grad():
            gate.weight[:3] = 0  # type: ignore[index, operator]
        delta = dw.attach(model.double(), "lora[dora=true]", targets="mlp.gate")
        disturb(delta)
        with torch.no_grad():
            dict(delta.model.named_parameters())["model.layers.1.mlp.gate_proj.deltas.default.0.magnitude"][:3] = 0
        with contextlib.nullcontext() if lean else ordinary():
            model(torch.arange(20)[None]).logits.square().mean().backward()
        found.append([parameter.grad for parameter in delta.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    magnitudes = found[0][-1]
    assert magnitudes.dim() == 1
    assert bool((magnitudes[:3] != 0).all())


@pytest.mark.parametrize("spec", ["lora[rank=4,dropout=0.3]", "lora[rank=4,dropout=0.3,dora=true]"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_is_computed_again_has_its_masks_again(spec: str, reentrant: bool) -> None:
    found = []
    for again in (True, False):
        model, inputs = build("gpt2")
        delta = dw.attach(model, spec)
        disturb(delta)
        for module in model.double().train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
        torch.manual_seed(3)
        loss = zoo.output_of("gpt2", model, inputs).square().mean()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in delta.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", ["lora[rank=2]", "lora[rank=2,dora=true]", "oft[block=4]", "ia3"])
def test_outputs_may_be_written_over(spec: str) -> None:
    found = []
    for lean in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)).double()
        delta = dw.attach(model, spec, targets=["0", "2"])
        disturb(delta)
        with contextlib.nullcontext() if lean else ordinary():
            model(torch.randn(2, 3, 8, dtype=torch.float64)).square().sum().backward()
        found.append([parameter.grad for parameter in delta.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["lora[rank=2]", "lora[rank=2,dora=true]", "oft[block=4]"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batches_have_gradients_of_zero(spec: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    delta = dw.attach(model, spec, targets=["0", "2"])
    x = torch.zeros(shape, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in delta.parameters())


@pytest.mark.parametrize("spec", ["lora[rank=2]", "lora[rank=2,dora=true]", "hut[rank=2]", "loha", "ln"])
@pytest.mark.parametrize("change", ["merge", "detach", "step"])
def test_what_changed_between_the_passes_is_told(spec: str, change: str) -> None:
    model, inputs = build("gpt2")
    delta = dw.attach(model, spec)
    disturb(delta)
    loss = zoo.loss_of("gpt2", model, inputs)
    if change == "step":
        with torch.no_grad():
            torch._foreach_add_(list(delta.parameters()), 0.1)
    else:
        getattr(delta, change)()
    with pytest.raises((dw.UserError, RuntimeError), match=r"parameters were changed|modified by an inplace operation"):
        loss.backward()


def look(module: nn.Module, args: Any, output: Tensor) -> None:
    assert bool(output.isfinite().all())


def test_watched_activations_lose_no_gradient() -> None:
    for family, path in (("gpt2", "mlp.act"), ("llama", "mlp.act_fn")):
        found = []
        for watched in (True, False):
            model, inputs = build(family)
            delta = dw.attach(model, "lora")
            disturb(delta)
            for name, module in model.named_modules():
                if watched and name.endswith(path):
                    module.register_forward_hook(torch.no_grad()(look))
            zoo.loss_of(family, model, inputs).backward()
            found.append([parameter.grad for parameter in delta.parameters()])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)


class FlaggedNorm(nn.Module):
    """A norm by the root mean square, with or without one more in its weight."""

    def __init__(self, width: int, plus: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.plus = nn.Parameter(torch.ones(width)), 1e-6, plus

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight + float(self.plus))


def test_norms_are_told_by_what_they_compute() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with torch.device("meta"):
        assert rms_gain(LlamaRMSNorm(8)) == 0.0
        assert rms_gain(GemmaRMSNorm(8)) == 1.0
        assert rms_gain(nn.BatchNorm1d(8)) is None
        assert rms_gain(nn.GroupNorm(2, 8)) is None
        assert [rms_gain(FlaggedNorm(8, plus)) for plus in (False, True, False)] == [0.0, 1.0, 0.0]


def test_an_activation_waits_for_a_product() -> None:
    x, up = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    waiting = Activated.of(x, nn.functional.silu)
    assert waiting.shape == (3, 4)
    product = waiting * up
    assert type(product) is Tensor
    assert type(product.grad_fn).__name__ == "_GatedBackward"
    assert torch.equal(product, nn.functional.silu(x) * up)
    assert torch.equal(torch.cat([waiting, up]), torch.cat([nn.functional.silu(x), up]))
    assert torch.equal(up * Activated.of(x, nn.functional.silu), product)
    assert torch.equal((waiting + 1).detach(), nn.functional.silu(x) + 1)


def test_arguments_keep_their_classes() -> None:
    x = torch.ones(2, requires_grad=True)
    waiting, output = Activated.of(x, torch.relu), hf.modeling_outputs.BaseModelOutput(last_hidden_state=x)
    found = computed({"states": output, "pair": (waiting, 1)})
    assert found["states"] is output
    assert type(found["pair"][0]) is Tensor


def test_neighbours_are_lean_while_an_adapter_is_there() -> None:
    model = llama()
    delta = dw.attach(model, "lora", targets="attention.q")
    mlp = model.model.layers[0].mlp  # type: ignore[union-attr, index]
    assert is_wrapped(mlp.act_fn)
    delta.detach()
    assert not any(is_wrapped(module) for module in model.modules())


def test_tensors_are_saved_and_copied_as_any_other() -> None:
    model, inputs = build("llama")
    dw.attach(model, "lora")
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert hidden._origin is not None
    file = io.BytesIO()
    torch.save(hidden, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False), hidden)


def test_the_gradient_of_a_base_weight_is_not_lost() -> None:
    model, inputs = build("gpt2")
    dw.attach(model, "lora")
    weight = model.transformer.h[1].mlp.c_fc.weight  # type: ignore[union-attr, index]
    weight.requires_grad_(True)
    zoo.loss_of("gpt2", model, inputs).backward()
    assert float(weight.grad.abs().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lora", "lora[dora=true]", "oft", "fourierft[frequencies=200]", "houlsby"])
def test_200_steps_end_at_the_same_loss(spec: str) -> None:
    ends = []
    for lean in (True, False):
        model, inputs = build("llama")
        delta = dw.attach(model, spec)
        optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3))
        with contextlib.nullcontext() if lean else ordinary():
            for _ in range(200):
                loss = zoo.loss_of("llama", model, inputs)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(float(loss.detach()))
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
