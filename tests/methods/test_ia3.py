"""(IA)^3: counts, the hand-computed merge, and one set of vectors for each row of a batch."""

import pytest
import torch
import transformers as hf
import zoo

import deltaworks as dw

FAMILIES = ("llama", "qwen2", "gpt2", "bert", "t5", "t5-gated", "bart", "vit", "plain")


def spread(delta: dw.Delta, seed: int = 0) -> None:
    """Values in [0.5, 1.5)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in dw.attach(model, "ia3").parameters())


@pytest.mark.parametrize(("name", "expected"), [("t5-large", 344_064), ("t5-3b", 1_376_256), ("t5-11b", 5_505_024)])
def test_counts(name: str, expected: int) -> None:
    assert count(zoo.real(name)) == expected


@pytest.mark.parametrize(
    ("width", "hidden", "heads", "expected"), [(2048, 5120, 32, 540_672), (4096, 10240, 64, 1_081_344)]
)
def test_counts_of_t0(width: int, hidden: int, heads: int, expected: int) -> None:
    """T0-3B and T0-11B: T5 v1.1 with 24 + 24 layers and heads of width 64."""
    with torch.device("meta"):
        config = hf.T5Config(
            d_model=width, d_ff=hidden, d_kv=64, num_heads=heads, num_layers=24, feed_forward_proj="gated-gelu"
        )
        model = hf.T5ForConditionalGeneration(config)
    assert count(model) == expected


def test_grouped_queries_give_vectors_of_the_key_width() -> None:
    delta = dw.attach(zoo.real("llama3-8b"), "ia3")
    assert sum(parameter.numel() for parameter in delta.parameters()) == 32 * (1024 + 1024 + 14336)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_identity_merge_and_unmerge(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    before = zoo.output_of(name, model, inputs)
    delta = dw.attach(model, "ia3")
    assert torch.equal(zoo.output_of(name, model, inputs), before)
    spread(delta)
    tuned = zoo.output_of(name, model, inputs)
    assert (tuned - before).abs().max() > 1e-2
    delta.merge()
    torch.testing.assert_close(zoo.output_of(name, model, inputs), tuned, atol=1e-5, rtol=1e-5)
    delta.detach()
    assert torch.equal(zoo.output_of(name, model, inputs), before)


def test_fused_projections_are_scaled_in_their_part() -> None:
    model, _ = zoo.ZOO["gpt2"]()
    delta = dw.attach(model, "ia3")
    weight = model.transformer.h[0].attn.c_attn.weight.clone()  # [in, out]
    spread(delta)
    delta.merge()
    merged = model.transformer.h[0].attn.c_attn.weight
    k, v = (item.tuner.scale for item in delta.attached[:2])
    assert torch.equal(merged[:, :32], weight[:, :32])
    torch.testing.assert_close(merged[:, 32:], weight[:, 32:] * torch.cat([k, v]))


@torch.no_grad()
def test_two_tasks_in_one_batch_equal_two_passes() -> None:
    model, inputs = zoo.ZOO["llama"]()
    inputs.pop("labels")
    first, second = dw.attach(model, "ia3", name="first"), dw.attach(model, "ia3", name="second")
    spread(first, 1)
    spread(second, 2)
    alone = []
    for name in ("first", "second", None):
        dw.switch(model, name)
        alone.append(model(**inputs).logits)
    with dw.rows(model, ["first", "second", None]):
        mixed = model(**inputs).logits
    for row in range(3):
        torch.testing.assert_close(mixed[row], alone[row][row], atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@torch.no_grad()
def test_zero_values_and_zero_keys() -> None:
    """l_v = 0: only the output bias is left; l_k = 0: the mean of the values."""
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "ia3", targets="attention.k,attention.v")
    attention = model.bert.encoder.layer[0].attention.self
    key, value = (item.tuner.scale for item in delta.attached[:2])
    hidden = torch.randn(2, 5, zoo.WIDTH)
    key.zero_()
    values = attention.value(hidden)
    torch.testing.assert_close(attention(hidden)[0], values.mean(1, keepdim=True).expand_as(values))
    value.zero_()
    assert attention(hidden)[0].abs().max() == 0
    assert attention.value(hidden).abs().max() == 0


@torch.no_grad()
def test_by_hand() -> None:
    """Rows of W_v and columns of W_2: diag(l) W and W diag(l)."""
    model, _ = zoo.ZOO["plain"]()
    delta = dw.attach(model, "ia3", targets="attention.v,mlp.down")
    rows, columns = (item.tuner for item in delta.attached[:2])
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for tuner in (rows, columns):
        tuner.scale = torch.nn.Parameter(torch.tensor([2.0, 0.5]))
    assert rows.weight(W).tolist() == [[2, 4], [1.5, 2]]
    assert rows.bias(torch.tensor([1.0, 1.0])).tolist() == [2, 0.5]
    assert columns.weight(W).tolist() == [[2, 1], [6, 2]]
    assert columns.bias(torch.tensor([1.0, 1.0])).tolist() == [1, 1]
    x = torch.tensor([[1.0, -1.0]])
    assert torch.equal(rows.around(lambda x: x @ W.T, x), x @ rows.weight(W).T)
    assert torch.equal(columns.around(lambda x: x @ W.T, x), x @ columns.weight(W).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_moves_the_vectors_also_on_a_bfloat16_base(dtype: torch.dtype) -> None:
    """A bfloat16 vector at one would not move by 1e-3: the spacing there is 0.0039."""
    model, inputs = zoo.ZOO["llama"]()
    delta = dw.attach(model.to(dtype), "ia3")
    groups = delta.parameter_groups(1e-3, weight_decay=0.1)
    assert {group["weight_decay"] for group in groups} == {0.0}
    optimizer = torch.optim.AdamW(groups)
    zoo.loss_of("llama", model, inputs).backward()
    optimizer.step()
    moved = torch.cat([parameter.detach() - 1 for parameter in delta.parameters()]).abs()
    assert moved.max() < 1.1e-3
    assert (moved > 0.9e-3).float().mean() > 0.9
