"""BitFit: published counts, hand-computed step, what must not move."""

import pytest
import torch
import zoo
from torch import nn

import deltaworks as dw


def count(delta: dw.Delta) -> int:
    return sum(parameter.numel() for parameter in delta.parameters())


@pytest.mark.parametrize(
    ("model", "targets", "expected"),
    [("bert-base", "all", 102_912), ("bert-large", "all", 272_384), ("bert-base", "attention.q,mlp.up", 46_080)],
)
def test_counts_of_the_paper(model: str, targets: str, expected: int) -> None:
    assert count(dw.attach(zoo.real(model), "bitfit", targets=targets)) == expected


def test_the_head_is_left_out() -> None:
    model, _ = zoo.ZOO["bert"]()
    assert "classifier" not in {item.place.path for item in dw.attach(model, "bitfit").attached}


@pytest.mark.parametrize("name", ["t5-large", "t5-3b", "t5-11b", "llama-7b"])
def test_a_model_without_biases_is_an_error_that_names_the_mend(name: str) -> None:
    with pytest.raises(dw.UserError, match="add=true"):
        dw.attach(zoo.real(name), "bitfit")


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_added_biases_start_as_the_base_and_train(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    model.requires_grad_(False)
    base = zoo.output_of(name, model, inputs)
    delta = dw.attach(model, "bitfit", add=True)
    # a block of llama: q 32, k 16, v 16, o 32, gate 64, up 64, down 32
    assert count(delta) == (2 * 256 if name == "llama" else 2 * (4 * 32 + 96) + 2 * (8 * 32 + 96))
    torch.testing.assert_close(zoo.output_of(name, model, inputs), base, rtol=0, atol=1e-6)
    zoo.loss_of(name, model, inputs).backward()
    assert all(parameter.grad.abs().sum() > 0 for key, parameter in delta.named_parameters() if ".v" in key)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter += 0.1
    moved = zoo.output_of(name, model, inputs)
    delta.merge()
    torch.testing.assert_close(zoo.output_of(name, model, inputs), moved, rtol=1e-5, atol=1e-5)


def test_matrices_never_move_and_biases_of_keys_get_no_gradient() -> None:
    model, inputs = zoo.ZOO["bert"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    delta = dw.attach(model, "bitfit")
    zoo.loss_of("bert", model, inputs).backward()
    sizes = {key: float(parameter.grad.abs().max()) for key, parameter in delta.named_parameters()}
    keys = [size for key, size in sizes.items() if "self.key" in key]
    queries = [size for key, size in sizes.items() if "self.query" in key]
    assert len(keys) == len(queries) == 2
    assert max(keys) < 1e-6 < 1e-5 < min(queries)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2, weight_decay=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        zoo.loss_of("bert", model, inputs).backward()
        optimizer.step()
    delta.merge(keep_base=False)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.endswith("bias"))
    assert sum(not torch.equal(after[key], value) for key, value in before.items()) > 10


def test_without_the_biases_of_keys_nothing_changes() -> None:
    outputs = []
    for targets in ("all", "attention.[qvo],mlp,norm,pooler"):
        model, inputs = zoo.ZOO["bert"]()
        delta = dw.attach(model, "bitfit", targets=targets)
        optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            zoo.loss_of("bert", model, inputs).backward()
            optimizer.step()
        outputs.append(zoo.output_of("bert", model, inputs))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_tables_of_relative_positions_are_no_biases() -> None:
    model, _ = zoo.ZOO["t5"]()
    delta = dw.attach(model, "bitfit", add=True)
    assert not [item for item in delta.attached if "relative_attention_bias" in item.place.path]


def test_by_hand() -> None:
    """y = 2 x + b, loss (y - 1)^2 / 2 at x = 1, b = 0: gradient 1, so one step of size 0.1 gives b = -0.1."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        for layer, weight in zip(model, (2.0, 1.0), strict=True):
            layer.weight.fill_(weight)
            layer.bias.zero_()
    delta = dw.attach(model, "bitfit", targets="linear")
    (parameter,) = delta.parameters()
    ((model(torch.ones(1, 1)) - 1) ** 2 / 2).sum().backward()
    assert parameter.grad.item() == 1.0
    torch.optim.SGD([parameter], lr=0.1).step()
    assert parameter.item() == pytest.approx(-0.1)
