"""Norm tuning: published counts, movement in float32, folding into the next layers."""

import pytest
import torch
import zoo

import deltaworks as dw


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.2-3b", 175_104),
        ("llama-7b", 266_240),
        ("t5-large", 124_928),
        ("t5-3b", 124_928),
        ("t5-11b", 124_928),
        ("t5-base", 47_616),
        ("bert-base", 38_400),
    ],
)
def test_published_counts(name: str, expected: int) -> None:
    delta = dw.attach(zoo.real(name), "ln")
    assert sum(parameter.numel() for parameter in delta.parameters()) == expected


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "convnet"])
def test_starts_as_the_base_exactly(name: str, relative: bool) -> None:
    model, inputs = zoo.ZOO[name]()
    model.requires_grad_(False)
    base = zoo.output_of(name, model, inputs)
    dw.attach(model, "ln", relative=relative)
    assert torch.equal(zoo.output_of(name, model, inputs), base)


def trained(dtype: torch.dtype, relative: bool = False) -> tuple[torch.nn.Module, dict, dw.Delta]:
    model, inputs = zoo.ZOO["llama"]()
    model.to(dtype)
    delta = dw.attach(model, "ln", relative=relative)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-4, weight_decay=0.1))
    for _ in range(10):
        optimizer.zero_grad()
        zoo.loss_of("llama", model, inputs).backward()
        optimizer.step()
    return model, inputs, delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_small_steps_move_every_gain(dtype: torch.dtype) -> None:
    _, _, delta = trained(dtype)
    for _, parameter in delta.named_parameters():
        assert parameter.dtype == torch.float32
        assert (parameter.abs() > 1e-5).all()
        assert (parameter.abs() < 1.1e-3).all()  # ten steps of 1e-4


def test_only_norms_have_gradients() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "ln")
    zoo.loss_of("bert", model, inputs).backward()
    assert {item.place.kind for item in delta.attached} == {"norm"}
    own = {id(parameter) for parameter in delta.parameters()}
    assert all((parameter.grad is not None) == (id(parameter) in own) for parameter in model.parameters())
    assert all(not item.tuner.decays for item in delta.attached)


@pytest.mark.parametrize("relative", [False, True])
def test_the_gain_folds_into_the_columns_of_the_next_layers(relative: bool) -> None:
    model, inputs, delta = trained(torch.float32, relative)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = zoo.output_of("llama", model, inputs)
    delta.merge(keep_base=False)
    readers = {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }
    pairs = [
        (layer.get_submodule(norm), [layer.get_submodule(name) for name in names])
        for layer in model.model.layers
        for norm, names in readers.items()
    ]
    with torch.no_grad():
        for norm, linears in [*pairs, (model.model.norm, [model.lm_head])]:
            for linear in linears:
                linear.weight *= norm.weight
            norm.weight.fill_(1)
    torch.testing.assert_close(zoo.output_of("llama", model, inputs), expected, rtol=1e-5, atol=1e-5)


def test_gains_stored_as_one_plus_w() -> None:
    """Gemma multiplies by (1 + w): a change of w is a change of the gain; relative changes scale the gain."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    for relative, factor in ((False, 1.0), (True, 1.5)):
        norm = GemmaRMSNorm(2, eps=0.0)
        with torch.no_grad():
            norm.weight.fill_(0.5)  # a gain of 1.5
        model = torch.nn.Sequential(norm, torch.nn.Linear(2, 2))
        delta = dw.attach(model, "ln", relative=relative)
        (parameter,) = delta.parameters()
        with torch.no_grad():
            parameter.fill_(0.1)
        torch.testing.assert_close(norm(torch.tensor([1.0, -1.0])), (1.5 + 0.1 * factor) * torch.tensor([1.0, -1.0]))


def test_shifts_can_be_left_out() -> None:
    delta = dw.attach(zoo.real("bert-base"), "ln", shift=False)
    assert sum(parameter.numel() for parameter in delta.parameters()) == 25 * 768
