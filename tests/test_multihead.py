"""torch's MultiheadAttention: parts of its fused projection, and weights that are read without a call."""

from pathlib import Path

import pytest
import torch
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw

WIDTH = 16


class Encoder(nn.Module):
    """torch's own encoder. Shapes: x [batch, length, 16], mask [batch, length] true where padded -> [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask)).sum(1)


def build() -> tuple[Encoder, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Encoder()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model.eval(), torch.randn(2, 5, WIDTH)


def test_linear_includes_the_attention() -> None:
    model, _ = build()
    places = dw.anatomy(model).select("linear")
    assert [(place.name, place.role) for place in places if place.block == 0] == [
        ("encoder.layers.0.self_attn.in_proj_weight", "attention.qkv"),
        ("encoder.layers.0.self_attn.out_proj", "attention.o"),
        ("encoder.layers.0.linear1", "mlp.up"),
        ("encoder.layers.0.linear2", "mlp.down"),
    ]
    parts = dw.anatomy(model).select("attention.[qkv]@1")
    assert [place.part for place in parts] == [(0, 16), (16, 32), (32, 48)]


@pytest.mark.parametrize("targets", ["attention.q,attention.v", "attention.o", "attention", "linear"])
def test_parts_of_the_fused_projection(targets: str, tmp_path: Path) -> None:
    model, x = build()
    base = model(x)
    delta = dw.attach(model, "lora", targets=targets, rank=2)
    disturb(delta, size=0.3)
    plain, _ = build()
    with torch.no_grad():
        for item in delta.attached:
            tuner, place = item.tuner, item.place
            weight = plain.get_submodule(place.path)._parameters[place.parameter]
            assert weight is not None
            weight[slice(*place.part) if place.part else slice(None)] += tuner.B @ tuner.A  # type: ignore[operator]
    moved = model(x)
    assert difference(moved, plain(x)) < 1e-5
    assert difference(moved, base) > 0.01
    moved.sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in delta.parameters())  # type: ignore[union-attr]
    delta.merge()
    assert difference(model(x), moved) < 1e-5
    delta.unmerge()
    delta.save(tmp_path)
    delta.detach()
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert torch.equal(model(x), base)
    dw.load(model, tmp_path)
    assert difference(model(x), moved) < 1e-6


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "ia3"])
def test_torchs_fast_path_does_not_pass_the_adapter_by(method: str) -> None:
    """In evaluation torch's layer takes its parts' weights itself, by nested tensors where rows are padded."""
    model, x = build()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        base = model(x, mask)
    delta = dw.attach(model, method)
    disturb(delta, size=0.3)
    model.train()
    moved = model(x, mask)
    model.eval()
    assert difference(moved, base) > 0.01
    assert difference(model(x, mask), moved) < 1e-5
    with torch.no_grad():
        assert difference(model(x, mask), moved) < 1e-5
        delta.detach()
        assert torch.equal(model(x, mask), base)


def test_a_full_projection_moves_its_output() -> None:
    model, x = build()
    base = model(x)
    delta = dw.attach(model, "full", targets="attention.o")
    assert {name.rpartition(".")[2] for name, _ in delta.named_parameters()} == {"weight", "bias"}
    disturb(delta)
    assert difference(model(x), base) > 0.01


def test_keys_and_values_of_other_widths() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, memory)
            return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross_attn = nn.MultiheadAttention(WIDTH, 4, kdim=8, vdim=12, batch_first=True)
            self.fc1 = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.fc1(x + self.cross_attn(x, memory[..., :8], memory)[0])

    torch.manual_seed(0)
    model = Reader().eval()
    x, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 7, 12)
    delta = dw.attach(model, "lora", targets="cross_attention.k", rank=2)
    assert next(name for name, _ in delta.named_parameters()) == "blocks.0.cross_attn.k_proj_weight.A"
    disturb(delta)
    moved = model(x, memory)
    delta.merge()
    assert difference(model(x, memory), moved) < 1e-5
