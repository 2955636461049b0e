"""Pfeiffer: counts, one adapter in each block, and the frozen norm used twice."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from conformance import difference, disturb, frozen_output

import deltaworks as dw


def count(model: str, **options: object) -> int:
    return sum(p.numel() for p in dw.attach(zoo.real(model), "pfeiffer", **options).parameters())


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("t5-large", {}, 6_343_680),
        ("t5-3b", {}, 6_343_680),
        ("t5-11b", {}, 6_343_680),
        ("t5-base", {"width": 24}, 903_744),
        ("t5-base", {"width": 24, "also": "norm"}, 951_360),
    ],
)
def test_counts(model: str, options: dict[str, object], expected: int) -> None:
    assert count(model, **options) == expected


def test_share_of_t5_base_with_norms() -> None:
    total = sum(p.numel() for p in zoo.real("t5-base").parameters())
    assert round(100 * count("t5-base", width=24, also="norm") / total, 3) == 0.427


@pytest.mark.parametrize(
    ("model", "blocks"), [("bert-large", 24), ("t5-base", 24), ("bart-large", 24), ("llama-7b", 32)]
)
def test_one_adapter_in_each_block_and_none_in_attention(model: str, blocks: int) -> None:
    delta = dw.attach(zoo.real(model), "pfeiffer")
    assert len(delta.attached) == blocks
    assert len({(item.place.stack, item.place.block) for item in delta.attached}) == blocks
    assert all(item.place.role in ("mlp", "norm.mlp") for item in delta.attached)


@pytest.mark.parametrize("family", ["bert", "roberta", "bart", "t5", "llama"])
def test_zero_up_projection_is_the_base(family: str) -> None:
    model, inputs = zoo.ZOO[family]()
    dw.attach(model, "pfeiffer")
    assert difference(zoo.output_of(family, model, inputs), frozen_output(family)) < 1e-6


def test_normal_start_is_the_librarys() -> None:
    delta = dw.attach(zoo.ZOO["bert"]()[0], "pfeiffer", width=64, init="normal")
    assert float(delta.tuners()[0].D.detach().std()) == pytest.approx(0.02, rel=0.1)
    with pytest.raises(dw.UserError, match="init='truncated' is unknown"):
        dw.configure("pfeiffer", init="truncated")


def post_norm() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """A BERT with a disturbed adapter in its first block; the output module and the tuner of that block."""
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "pfeiffer", targets="mlp@0", width=4)
    disturb(delta, size=0.3)
    return model, model.get_submodule("bert.encoder.layer.0.output"), delta.tuners()[0]


def test_post_norm_block_against_the_formula() -> None:
    _, output, tuner = post_norm()
    hidden, x = torch.randn(2, 3, zoo.HIDDEN), torch.randn(2, 3, zoo.WIDTH)
    norm = output.LayerNorm

    def frozen(v: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(v, (zoo.WIDTH,), norm.weight, norm.bias, norm.eps)

    v = output.dense(hidden) + x
    a = F.relu(frozen(v) @ tuner.D.T + tuner.b_D) @ tuner.U.T + tuner.b_U
    torch.testing.assert_close(output(hidden, x), frozen(a + v))
    once = frozen(F.relu(v @ tuner.D.T + tuner.b_D) @ tuner.U.T + tuner.b_U + v)
    assert difference(once, frozen(a + v)) > 0.01, "reading v without its norm must differ"


def test_post_norm_adapter_does_not_feel_a_shift_or_a_scale_of_the_residual_sum() -> None:
    _, output, tuner = post_norm()
    seen: list[torch.Tensor] = []
    change = tuner.change
    tuner.change = lambda h: seen.append(change(h)) or seen[-1]
    v = torch.randn(2, 3, zoo.WIDTH)
    for moved in (v, v + 5.0, 3.0 * v):
        output.LayerNorm(moved)
    assert difference(seen[1], seen[0]) < 1e-4
    assert difference(seen[2], seen[0]) < 1e-4


def test_pre_norm_adapter_reads_the_output_of_the_feed_forward_layer() -> None:
    model, _ = zoo.ZOO["llama"]()
    delta = dw.attach(model, "pfeiffer", targets="mlp@0", width=4)
    disturb(delta, size=0.3)
    (tuner,) = delta.tuners()
    mlp, x = model.get_submodule("model.layers.0.mlp"), torch.randn(2, 3, zoo.WIDTH)
    z = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    expected = z + F.relu(z @ tuner.D.T + tuner.b_D) @ tuner.U.T + tuner.b_U
    torch.testing.assert_close(mlp(x), expected)


def test_frozen_norm_gets_no_gradient() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "pfeiffer")
    disturb(delta)
    zoo.loss_of("bert", model, inputs).backward()
    norm = model.get_submodule("bert.encoder.layer.0.output.LayerNorm")
    assert norm.weight.grad is None
    assert norm.bias.grad is None
    assert all(float(p.grad.abs().sum()) > 0 for p in delta.parameters())


def test_norms_trained_beside_it_come_back_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """In a post-norm block the adapter and the trained norm stand at one place."""
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "pfeiffer", also="norm")
    disturb(delta)
    moved = zoo.output_of("bert", model, inputs)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of("bert", fresh, inputs), moved)
