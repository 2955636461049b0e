"""Houlsby: counts, placement, start and the arithmetic of the adapter."""

import pytest
import torch
import transformers
import zoo
from conformance import difference, disturb, frozen_output
from toy import Toy

import deltaworks as dw


def count(model: str, **options: object) -> int:
    return sum(p.numel() for p in dw.attach(zoo.real(model), "houlsby", **options).parameters())


def test_one_adapter_of_bert_base_has_99136_parameters() -> None:
    delta = dw.attach(zoo.real("bert-base"), "houlsby", width=64)
    assert {sum(p.numel() for p in tuner.parameters()) for tuner in delta.tuners()} == {99_136}
    assert len(delta.tuners()) == 24


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("bert-base", {"width": 64}, 2_379_264),
        ("bert-base", {"width": 64, "norms": True}, 2_379_264 + 25 * 1_536),
        ("t5-base", {"width": 24}, 1_807_488),
        ("t5-base", {"reduction": 32}, 1_807_488),
        ("t5-base", {"width": 24, "norms": True}, 1_855_104),
        ("t5-large", {}, 12_687_360),
        ("t5-3b", {}, 12_687_360),
        ("t5-11b", {}, 12_687_360),
    ],
)
def test_counts(model: str, options: dict[str, object], expected: int) -> None:
    assert count(model, **options) == expected


def test_share_of_t5_base_with_norms() -> None:
    total = sum(p.numel() for p in zoo.real("t5-base").parameters())
    assert round(100 * count("t5-base", width=24, norms=True) / total, 3) == 0.832


def test_stands_after_self_attention_and_feed_forward_but_not_after_cross_attention() -> None:
    delta = dw.attach(zoo.real("t5-base"), "houlsby")
    roles = [item.place.role for item in delta.attached]
    assert (roles.count("attention"), roles.count("mlp"), len(roles)) == (24, 24, 48)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_zero_up_projection_is_the_base_and_small_weights_are_near_it(family: str) -> None:
    base = frozen_output(family)
    for init, least, most in (("identity", 0.0, 1e-6), ("truncated", 1e-9, 1e-2), ("normal", 1e-5, 1.0)):
        model, inputs = zoo.ZOO[family]()
        dw.attach(model, "houlsby", init=init)
        assert least <= difference(zoo.output_of(family, model, inputs), base) < most


def test_truncated_start_has_the_papers_spread() -> None:
    delta = dw.attach(Toy(256), "houlsby", width=128, init="truncated")
    weights = delta.tuners()[0].D.detach()
    assert weights.abs().max() <= 2e-3
    # N(0, 1) cut at 2: variance 1 - 2 * 2 phi(2) / (2 Phi(2) - 1) = 0.7737
    assert float(weights.std()) == pytest.approx(1e-3 * 0.7737**0.5, rel=0.03)


def test_normal_start_has_the_librarys_spread() -> None:
    delta = dw.attach(Toy(256), "houlsby", width=128, init="normal", activation="silu")
    assert float(delta.tuners()[0].U.detach().std()) == pytest.approx(0.02, rel=0.03)


def test_hand_example() -> None:
    delta = dw.attach(Toy(2), "houlsby", width=1, activation="relu")
    tuner = delta.tuners()[0]
    with torch.no_grad():
        tuner.D.copy_(torch.tensor([[1.0, 1.0]]))
        tuner.U.copy_(torch.tensor([[0.5], [-0.5]]))
    z = torch.tensor([2.0, 1.0])
    assert tuner.around(lambda x: z, torch.zeros(2)).tolist() == [3.5, -0.5]
    with torch.no_grad():
        tuner.b_D.fill_(-4.0)
        tuner.b_U.copy_(torch.tensor([0.25, 0.0]))
    assert tuner.around(lambda x: z, torch.zeros(2)).tolist() == [2.25, 1.0]  # f(-1) = 0: only b_U is left


def test_whole_block_against_the_formula() -> None:
    model = Toy(8).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    delta = dw.attach(model, "houlsby", width=3, targets="mlp@0", init="normal")
    (tuner,) = delta.tuners()
    stage = model.stages[0]
    seen = {}
    stage.expand.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    out = []
    stage.register_forward_hook(lambda module, args, output: out.append((args[0], output)))
    model(x)
    y = stage.norm_in(x)
    attention = torch.nn.functional.scaled_dot_product_attention(stage.wq(y), stage.wk(y), stage.wv(y))
    residual = x + stage.wo(attention)
    with delta.disabled():
        z = stage.contract(torch.nn.functional.gelu(stage.expand(seen["x"])))
    D, U = tuner.D.double(), tuner.U.double()
    expected = residual + z + torch.nn.functional.gelu(z @ D.T) @ U.T
    torch.testing.assert_close(out[0][1], expected)


def test_adapter_reads_the_output_of_the_sublayer_and_not_the_residual() -> None:
    """In BERT: a shift of the residual leaves the input of the adapter as it was."""
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "houlsby", targets="mlp@0", init="normal")
    (item,) = delta.attached
    output = model.get_submodule("bert.encoder.layer.0.output")
    seen: list[torch.Tensor] = []
    around = item.tuner.change
    item.tuner.change = lambda z: seen.append(z) or around(z)  # type: ignore[method-assign]
    results = [
        output(torch.ones(1, 4, zoo.HIDDEN), shift * torch.arange(zoo.WIDTH).expand(1, 4, -1)) for shift in (0.0, 1.0)
    ]
    assert torch.equal(seen[0], seen[1])
    assert difference(*results) > 0.1


def test_only_adapters_norms_and_head_have_gradients() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "houlsby", norms=True, also=["head"])
    zoo.loss_of("bert", model, inputs).backward()
    kinds = {item.place.kind: item for item in delta.attached}
    assert sorted(kinds) == ["linear", "norm", "sublayer"]
    assert sum(item.place.kind == "norm" for item in delta.attached) == 5
    trained = {id(p) for p in delta.parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_trained_norms_come_back_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "houlsby", norms=True, width=4)
    disturb(delta)
    moved = zoo.output_of("bert", model, inputs)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of("bert", fresh, inputs), moved)


def test_norms_inside_an_adapted_attention_come_back_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Qwen3 has norms of q and k inside the attention, so one place lies inside another one."""

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)).eval()

    model, ids = build(), torch.arange(6)[None]
    delta = dw.attach(model, "houlsby", norms=True, width=2)
    assert "model.layers.0.self_attn.q_norm" in {item.place.path for item in delta.attached}
    disturb(delta)
    moved = model(ids).logits
    delta.save(tmp_path)
    fresh = build()
    assert difference(fresh(ids).logits, moved) > 0.01
    dw.load(fresh, tmp_path)
    assert torch.equal(fresh(ids).logits, moved)


def test_width_is_the_features_divided_by_the_reduction() -> None:
    config = dw.configure("houlsby[reduction=16]")
    assert [config.bottleneck(d) for d in (384, 768, 1_000)] == [24, 48, 62]
    assert dw.configure("houlsby[width=5]").bottleneck(768) == 5
    with pytest.raises(dw.UserError, match="leaves no bottleneck of 32 features: use at most 32"):
        dw.attach(zoo.ZOO["bert"]()[0], "houlsby", reduction=33)


def test_width_of_the_residual_stream_not_of_the_heads_or_the_feed_forward_layer() -> None:
    delta = dw.attach(zoo.real("t5-11b"), "houlsby", width=2)
    assert {tuple(tuner.D.shape) for tuner in delta.tuners()} == {(2, 1024)}
