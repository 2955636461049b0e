"""Mix-And-Match: the composition, its counts, and the two forms of prefix attention."""

from pathlib import Path

import pytest
import torch
import zoo

import deltaworks as dw
from deltaworks.core.forms import Heads


def total(tensors: object) -> int:
    return sum(tensor.numel() for tensor in tensors)  # type: ignore[attr-defined]


def by_member(delta: dw.Delta) -> list[int]:
    stored = [(item.member, total(item.tuner.stored().values())) for item in delta.attached]
    return [sum(size for owner, size in stored if owner == member) for member in range(2)]


def test_counts() -> None:
    """BART-large: 36 attentions, 24 feed-forward layers; RoBERTa-base with l = r = 16."""
    delta = dw.attach(zoo.real("bart-large"), "mam")
    assert by_member(delta) == [2_211_840, 25_202_688]
    assert total(delta.tensors().values()) == 27_414_528
    mlp = 3 * (30 * 1024 + 1024 * 800 + 800) + 36 * 2 * 1024 * 801
    assert total(delta.parameters()) == mlp + 25_202_688
    assert by_member(dw.attach(zoo.real("roberta-base"), "mam", length=16, bottleneck=16)) == [294_912, 304_320]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart"])
@torch.no_grad()
def test_without_length_it_is_the_base_at_the_start(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    before = zoo.output_of(name, model, inputs)
    dw.attach(model, "mam", length=0)
    torch.testing.assert_close(zoo.output_of(name, model, inputs), before, atol=1e-6, rtol=0)


@torch.no_grad()
def test_it_is_the_composition() -> None:
    model, inputs = zoo.ZOO["t5"]()
    spec = "prefix[length=4,width=16]+parallel[reduction=2,scale=4,learned=false]"
    composed = dw.attach(model, spec, name="composed")
    mam = dw.attach(model, "mam", name="mam", length=4, width=16)
    for one, other in zip(composed.parameters(), mam.parameters(), strict=True):
        assert torch.equal(one, other)
        one.add_(0.01)
        other.add_(0.01)
    outputs = []
    for name in ("composed", "mam"):
        dw.switch(model, name)
        outputs.append(zoo.output_of("t5", model, inputs))
    assert torch.equal(*outputs)


def test_an_exported_adapter_gives_the_same_logits(tmp_path: Path) -> None:
    model, inputs = zoo.ZOO["bart"]()
    delta = dw.attach(model, "mam", length=4, width=16)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = zoo.output_of("bart", model, inputs)
    delta.save(tmp_path)
    again = dw.load(zoo.ZOO["bart"]()[0], tmp_path)
    torch.testing.assert_close(zoo.output_of("bart", again.model, inputs), expected, atol=1e-6, rtol=0)
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()


def attention(heads: Heads) -> torch.Tensor:
    weights = torch.softmax(heads.scaling * heads.query @ heads.key.mT, dim=-1)
    return (weights @ heads.value).transpose(1, 2)


def test_the_two_forms_of_prefix_attention_are_equal() -> None:
    """(1 - lambda) attn(q, K, V) + lambda attn(q, P_k, P_v), lambda the mass on the prefix."""
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    P_k, P_v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    heads = Heads(query, key, value, torch.randn(2, 5, 12), 0.5)
    concatenated = attention(heads.prepend(P_k, P_v))
    text = torch.logsumexp(0.5 * query @ key.mT, -1)
    prefix = torch.logsumexp(0.5 * query @ P_k.mT, -1)
    mass = torch.sigmoid(prefix - text).transpose(1, 2)[..., None]  # [batch, length, heads, 1]
    alone = attention(heads._replace(key=P_k.expand(2, -1, -1, -1), value=P_v.expand(2, -1, -1, -1)))
    torch.testing.assert_close(concatenated, (1 - mass) * attention(heads) + mass * alone, atol=1e-6, rtol=0)


def test_by_hand() -> None:
    """d_h = 1, q = 0, K = 0, V = 2, P_k = 0, P_v = 4: weights 1/2 and 1/2, output 3."""
    zero = torch.zeros(1, 1, 1, 1)
    heads = Heads(zero, zero, zero + 2, torch.zeros(1, 1, 1), 1.0)
    assert attention(heads.prepend(zero[0], zero[0] + 4)).item() == 3.0
