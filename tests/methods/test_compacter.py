"""Compacter and Compacter++: counts, the Kronecker product, and one slow tensor for the whole model."""

import pytest
import torch
import zoo
from conformance import difference, disturb, frozen_output
from toy import Toy

import deltaworks as dw
from deltaworks.methods.additive.adapters.compacter import kronecker_product


def materialised(A: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """W [in, out] = sum_i A_i (x) (s_i t_i)."""
    return sum(torch.kron(a, b) for a, b in zip(A, s @ t, strict=True))


@pytest.mark.parametrize(
    ("method", "model", "options", "expected"),
    [
        ("compacter", "t5-base", {"width": 24, "norms": True}, 161_728),
        ("compacter-plus-plus", "t5-base", {"width": 24, "norms": True}, 104_704),
        ("compacter", "t5-base", {"norms": True}, 161_728),
        ("compacter", "t5-base", {"shared": False}, 48 * (2_376 + 64)),
        *[("compacter", f"t5-{size}", {}, 304_192) for size in ("large", "3b", "11b")],
        *[("compacter-plus-plus", f"t5-{size}", {}, 152_128) for size in ("large", "3b", "11b")],
    ],
)
def test_counts(method: str, model: str, options: dict[str, object], expected: int) -> None:
    assert sum(p.numel() for p in dw.attach(zoo.real(model), method, **options).parameters()) == expected


@pytest.mark.parametrize(("method", "share"), [("compacter", 0.073), ("compacter-plus-plus", 0.047)])
def test_share_of_t5_base(method: str, share: float) -> None:
    model = zoo.real("t5-base")
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in dw.attach(model, method, norms=True).parameters())
    assert round(100 * trained / total, 3) == share


def test_hand_example() -> None:
    A = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    s, t = torch.tensor([[[1.0]], [[2.0]]]), torch.ones(2, 1, 1)  # B_1 = [1], B_2 = [2]
    assert kronecker_product(torch.eye(2), A, s, t).tolist() == [[1.0, 2.0], [2.0, 1.0]]


def test_orientation_by_hand() -> None:
    """n = 2, one non-zero A_1[0, 1]: block (0, 1) of W [4, 6] is s t, so input 0..1 feeds outputs 3..5."""
    A = torch.zeros(2, 2, 2)
    A[0, 0, 1] = 1.0
    s, t = torch.zeros(2, 2, 1), torch.zeros(2, 1, 3)
    s[0, :, 0], t[0, 0] = torch.tensor([1.0, 10.0]), torch.tensor([1.0, 2.0, 3.0])
    x = torch.tensor([1.0, 1.0, 7.0, 7.0])
    assert kronecker_product(x, A, s, t).tolist() == [0.0, 0.0, 0.0, 11.0, 22.0, 33.0]


@pytest.mark.parametrize(
    ("order", "rank", "inner", "outer"), [(4, 1, 24, 8), (2, 3, 8, 12), (3, 2, 6, 27), (1, 2, 5, 4)]
)
def test_product_equals_the_materialised_kronecker_sum(order: int, rank: int, inner: int, outer: int) -> None:
    torch.manual_seed(order)
    A = torch.randn(order, order, order)
    s, t = torch.randn(order, inner // order, rank), torch.randn(order, rank, outer // order)
    W = materialised(A, s, t)
    assert W.shape == (inner, outer)
    for shape in ((inner,), (7, inner), (2, 3, inner)):
        x = torch.randn(shape)
        assert difference(kronecker_product(x, A, s, t), x @ W) < 1e-5
        # stored as [out, in], both factors are transposed
        stored = sum(torch.kron(a.T, (u @ v).T) for a, u, v in zip(A, s, t, strict=True))
        assert difference(kronecker_product(x, A, s, t), torch.nn.functional.linear(x, stored)) < 1e-5


def test_rank_is_at_most_the_product_of_the_factors_ranks() -> None:
    torch.manual_seed(0)
    A, s, t = torch.randn(2, 2, 2), torch.randn(2, 16, 1), torch.randn(2, 1, 20)
    A[0, 1] = A[0, 0]  # rank 1
    ranks = [int(torch.linalg.matrix_rank(torch.kron(a, u @ v))) for a, u, v in zip(A, s, t, strict=True)]
    assert ranks == [1, 2]
    A = torch.randn(2, 2, 2)
    assert int(torch.linalg.matrix_rank(materialised(A, s, t))) == 4  # n * n * R, where W is 32 x 40


def test_adapter_against_the_formula() -> None:
    delta = dw.attach(Toy(16), "compacter", width=8, rank=2)
    disturb(delta, size=0.5)
    tuner = delta.tuners()[1]
    z = torch.randn(3, 16)
    D = materialised(tuner.A, tuner.down_s, tuner.down_t)
    U = materialised(tuner.A, tuner.up_s, tuner.up_t)
    inner = torch.nn.functional.gelu(z @ D + tuner.down_b, approximate="tanh")
    torch.testing.assert_close(tuner.around(lambda x: z, None), z + inner @ U + tuner.up_b)


def test_all_adapters_hold_one_slow_tensor_and_all_feed_its_gradient() -> None:
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "compacter", width=8)
    tuners = delta.tuners()
    assert len(tuners) == 4
    assert {id(tuner.A) for tuner in tuners} == {id(tuners[0].A)}
    disturb(delta, size=0.3)
    zoo.loss_of("bert", model, inputs).backward()
    assert float(tuners[0].A.grad.abs().sum()) > 0
    for tuner in tuners:
        tuners[0].A.grad = None
        tuner.around(lambda z: z, torch.randn(2, zoo.WIDTH)).sum().backward()
        assert float(tuners[0].A.grad.abs().sum()) > 0
    unshared = dw.attach(zoo.ZOO["bert"]()[0], "compacter", width=8, shared=False).tuners()
    assert len({id(tuner.A) for tuner in unshared}) == 4


def test_two_compacters_in_one_composition_keep_their_own_slow_tensor() -> None:
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "compacter[width=8, targets=attention]+compacter[width=8, order=2, targets=mlp]")
    assert {tuple(tuner.A.shape) for tuner in delta.tuners()} == {(4, 4, 4), (2, 2, 2)}


def test_a_file_holds_the_slow_tensor_once(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "compacter", width=8)
    disturb(delta)
    moved = zoo.output_of("bert", model, inputs)
    assert sum(name.endswith(".A") for name in delta.tensors()) == 1
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO["bert"]()
    loaded = dw.load(fresh, tmp_path)
    assert len({id(tuner.A) for tuner in loaded.tuners()}) == 1
    assert torch.equal(zoo.output_of("bert", fresh, inputs), moved)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 6}, "order=4 does not divide the bottleneck 6"),
        ({"order": 3, "width": 6}, "order=3 does not divide the width 32"),
        ({}, "order=4 does not divide the bottleneck 1"),
    ],
)
def test_sizes_that_the_order_does_not_divide_are_errors(options: dict[str, int], sentence: str) -> None:
    model, _ = zoo.ZOO["bert"]()
    with pytest.raises(dw.UserError, match=sentence):
        dw.attach(model, "compacter", **options)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_starts_within_a_hundred_thousandth_of_the_base(family: str) -> None:
    model, inputs = zoo.ZOO[family]()
    dw.attach(model, "compacter", width=8)
    assert difference(zoo.output_of(family, model, inputs), frozen_output(family)) < 1e-5


def test_start_has_the_published_spreads() -> None:
    delta = dw.attach(Toy(256), "compacter", order=16, width=64)
    tuner = delta.tuners()[0]
    assert float(tuner.A.detach().std()) == pytest.approx(1e-4, rel=0.05)
    assert tuner.down_s.shape == (16, 16, 1)
    bound = 2**0.5 * (6 / 17) ** 0.5  # Xavier-uniform with gain sqrt 2 on [16, 1]
    assert 0.97 * bound < float(tuner.down_s.detach().abs().max()) <= bound
    assert float(tuner.down_b.detach().abs().max()) == float(tuner.up_b.detach().abs().max()) == 0.0
    (own, *_) = dw.attach(Toy(256), "compacter", order=16, width=64, shared=False).tuners()
    assert float(own.A.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_compacter_plus_plus_stands_after_the_feed_forward_layer_only() -> None:
    roles = {
        method: {item.place.role for item in dw.attach(zoo.real("t5-base"), method).attached}
        for method in ("compacter", "compacter-plus-plus")
    }
    assert roles == {"compacter": {"attention", "mlp"}, "compacter-plus-plus": {"mlp"}}
