"""Models beyond text: what anatomy finds in them, and that a method of each form holds on every one of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from beyond import BEYOND, loss_of, output_of
from conformance import difference, disturb

import deltaworks as dw
from deltaworks.core.anatomy import anatomy
from deltaworks.listing import print_anatomy

# one of each form: factors, a weight (through its own kernel, and formed), a scale of features, around a sub-layer
METHODS = {
    "lora": {"rank": 2},
    "lora[dora=true]": {"rank": 2},
    "oft": {"block": 4},
    "ia3": {},
    "houlsby": {"width": 4},
}


def roles(name: str) -> Counter[str]:
    kinds = ("linear", "conv2d", "embedding", "norm", "parameters")
    return Counter(place.role for place in anatomy(BEYOND[name]()[0]).places if place.kind in kinds)


QKVO = ("attention.q", "attention.k", "attention.v", "attention.o")
CROSS = tuple("cross_" + role for role in QKVO)
MLP = ("mlp.up", "mlp.down")


def each(count: int, *roles: str) -> dict[str, int]:
    return dict.fromkeys(roles, count)


ROLES: dict[str, dict[str, int]] = {
    "segformer": each(4, *QKVO, *MLP, "norm.attention", "norm.mlp")
    | each(2, "embedding.patch", "norm.embedding")  # of each stage
    | {"conv": 6, "norm.other": 3, "norm.final": 1, "head": 5},
    "sam": each(4, *QKVO, *CROSS, *MLP, "norm.attention", "norm.mlp", "norm.cross_attention")
    | {"attention.qkv": 2, "embedding.patch": 3, "embedding.token": 8, "embedding.position": 2}
    | {"conv": 3, "norm.other": 2, "norm.embedding": 2, "norm.final": 2, "head": 19, "other": 5},
    "unet": each(4, *QKVO, *CROSS, "norm.attention", "norm.cross_attention", "norm.mlp")
    | each(4, "mlp.gate_up", "mlp.gate", "mlp.up", "mlp.down")
    | {"conv": 32, "norm.other": 20, "modulation": 8, "embedding.projection": 2, "norm.final": 1, "head": 1},
    "dit": each(2, *QKVO, *MLP, "modulation", "embedding.token", "head")
    | {"embedding.patch": 1, "embedding.projection": 4},
    "sd3": each(4, *QKVO[:3])
    | each(3, *QKVO[3:], *MLP)  # the text leaves the last block early
    | {"modulation": 5, "embedding.patch": 1, "embedding.projection": 5, "head": 1},
    "flux": each(3, *QKVO[:3], *MLP)
    | {"attention.o": 2}  # the last block has one output projection for both
    | {"modulation": 4, "norm.other": 6, "embedding.projection": 6, "head": 1},
}


@pytest.mark.parametrize("family", ROLES)
def test_roles(family: str) -> None:
    assert roles(family) == ROLES[family]


def test_halves_of_a_gated_unit() -> None:
    """Up comes first in diffusers: the output is linear in the first half of the features alone."""
    unet, _ = BEYOND["unet"]()
    (up,) = anatomy(unet).select("mid_block:mlp.up@0")
    assert (up.path.rpartition("blocks.0.")[2], up.part) == ("ff.net.0.proj", (0, 128))
    layer, whole = unet.get_submodule(up.path), unet.get_submodule(up.path.rpartition(".")[0])
    x = torch.randn(5, 32)
    before = whole(x)
    with torch.no_grad():
        layer.weight[: up.part[1]] *= 2
        layer.bias[: up.part[1]] *= 2
    torch.testing.assert_close(whole(x), 2 * before)


@pytest.mark.parametrize("family", ["unet", "sd3", "flux", "segformer", "sam"])
def test_groups_read_the_same_input(family: str) -> None:
    model, inputs = BEYOND[family]()
    groups = [group for group in anatomy(model).groups() if not group[0].role.startswith("cross")]
    seen: dict[str, torch.Tensor] = {}
    for place in (place for group in groups for place in group):
        keep = lambda _, given, path=place.path: seen.__setitem__(path, given[0])  # noqa: E731
        model.get_submodule(place.path).register_forward_pre_hook(keep)
    output_of(family, model, inputs)
    # the keys of these two are reduced, or have positions added, before they are projected
    apart = {"segformer": 2, "sam": 1}.get(family, 0)
    assert sum(len({id(seen[place.path]) for place in group}) > 1 for group in groups) == apart
    if family == "sd3":
        assert [len(group) for group in groups] == [3, 3, 3, 3]


def test_adapters_of_a_pyramid_have_the_width_of_their_stage() -> None:
    for family, widths in (("segformer", {16, 32}), ("unet", {16, 32}), ("mask2former", {8, 16, 32, 64})):
        delta = dw.attach(BEYOND[family]()[0], "houlsby", width=4)
        assert {tuner.D.shape[1] for tuner in delta.tuners()} == widths


def test_a_block_has_a_sublayer_for_each_stream() -> None:
    def exits(family: str, stack: str = "") -> list[tuple[str, str]]:
        found = anatomy(BEYOND[family]()[0])
        places = [p for p in found.select("all", {"sublayer"}) if p.block == 0 and p.stack == stack]
        return [(place.role, place.path.partition(".0.")[2]) for place in places]

    assert exits("sd3") == [("attention", "attn"), ("mlp", "ff"), ("mlp", "ff_context")]
    assert exits("sam", "decoder") == [
        ("attention", "self_attn"),
        ("cross_attention", "cross_attn_token_to_image"),
        ("mlp", "mlp"),
        ("cross_attention", "cross_attn_image_to_token"),
    ]
    assert exits("flux", "single_transformer_blocks") == [("mlp", "proj_out")]


def test_convolutions_and_modulations_are_targets() -> None:
    unet, inputs = BEYOND["unet"]()
    base = output_of("unet", unet, inputs)
    delta = dw.attach(unet, "lora", rank=2, targets="conv,modulation")
    assert Counter(item.place.kind for item in delta.attached) == {"conv2d": 32, "linear": 8}
    disturb(delta)
    moved = output_of("unet", unet, inputs)
    assert difference(moved, base) > 1e-3
    delta.merge()
    assert difference(output_of("unet", unet, inputs), moved) < 2e-5


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[pytest.mark.slow] * ("dora" in method)) for method in METHODS]
)
@pytest.mark.parametrize("family", BEYOND)
def test_a_method_lives_its_life(family: str, method: str, tmp_path: Path) -> None:
    """Attached it is the base; it learns; merged, saved and loaded it computes the same; detached, nothing is left."""
    model, inputs = BEYOND[family]()
    with torch.no_grad():
        base = output_of(family, model, inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    delta = dw.attach(model, method, **METHODS[method])
    assert difference(output_of(family, model, inputs), base) < 1e-5
    first = loss_of(family, model, inputs)
    first.backward()
    gradients = [parameter.grad for parameter in delta.parameters()]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    torch.optim.AdamW(delta.parameter_groups(1e-3)).step()
    assert float(loss_of(family, model, inputs)) < float(first)
    disturb(delta, size=0.05)
    with torch.no_grad():
        moved = output_of(family, model, inputs)
        assert difference(moved, base) > 1e-4
        delta.save(tmp_path)
        fresh, _ = BEYOND[family]()
        dw.load(fresh, tmp_path)
        assert difference(output_of(family, fresh, inputs), moved) < 1e-6
        if not delta.limit("merge"):
            delta.merge()
            assert difference(output_of(family, model, inputs), moved) < 2e-5
            delta.unmerge()
        delta.detach()
        assert torch.equal(output_of(family, model, inputs), base)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_command_shows_any_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the configuration alone, also where no task here trains the family."""
    for family, line in (
        ("unet", r"attn2 +Attention +cross_attention"),
        ("siglip", r"vision_model\b.* trunk"),
        ("sam", r"cross_attn_image_to_token +SamAttention +cross_attention"),
    ):
        model = BEYOND[family]()[0]
        folder = tmp_path / family
        if family == "unet":
            model.save_config(folder)
        else:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
        print_anatomy(str(folder), None)
        assert re.search(line, capsys.readouterr().out)
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    (tmp_path / "pipe" / "unet" / "config.json").write_text("{}")
    with pytest.raises(dw.UserError, match="several models: name one of unet"):
        print_anatomy(str(tmp_path / "pipe"), None)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet9DModel"}')
    with pytest.raises(dw.UserError, match="is a UNet9DModel, which the installed diffusers has not"):
        print_anatomy(str(tmp_path / "unet"), None)


@pytest.mark.parametrize("family", ["unet", "sd3", "segformer", "sam"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs = BEYOND[family]()
        delta = dw.attach(model, "lora[rank=2]+houlsby[width=4]")
        disturb(delta)
        if checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        elif checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # of the dropout
        loss_of(family, model.train(), inputs).backward()
        gradients.append([parameter.grad for parameter in delta.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_compiles_as_one_graph(family: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs = BEYOND[family]()
    disturb(dw.attach(model, "lora[rank=2]+houlsby[width=4]"))
    expected = output_of(family, model, inputs).detach()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        assert difference(output_of(family, compiled, inputs).detach(), expected) < 1e-5
    assert counter.frame_count == 1


def test_a_table_that_is_called_without_an_argument() -> None:
    """Swin asks for its position bias so, which is trained in full."""
    model, inputs = BEYOND["mask2former"]()
    base = output_of("mask2former", model, inputs).detach()
    delta = dw.attach(model, "full", targets="re:.*relative_position_bias")
    assert difference(output_of("mask2former", model, inputs), base) < 1e-6
    disturb(delta)
    moved = output_of("mask2former", model, inputs)
    moved.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    delta.merge()
    assert difference(output_of("mask2former", model, inputs), moved) < 2e-5
