"""Head only."""

import pytest
import torch
import zoo

import deltaworks as dw


@pytest.mark.parametrize(("name", "expected"), [("bert", 32 * 4 + 4), ("llama", 32 * 64), ("vit", 32 * 4 + 4)])
def test_only_the_head_is_trained(name: str, expected: int) -> None:
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "head")
    assert sum(parameter.numel() for parameter in delta.parameters()) == expected
    zoo.loss_of(name, model, inputs).backward()
    assert {item.place.role for item in delta.attached} == {"head"}
    assert sum(parameter.grad is not None for parameter in model.parameters()) == len(delta.parameters())


def test_the_pooler_can_be_trained_too() -> None:
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "head", targets="head,pooler")
    assert sum(parameter.numel() for parameter in delta.parameters()) == 132 + 32 * 32 + 32


def test_not_trained_twice() -> None:
    model, _ = zoo.ZOO["bert"]()
    assert len(dw.attach(model, "head", also="head").attached) == 1


def test_a_model_without_head_is_an_error() -> None:
    with pytest.raises(dw.UserError, match="no output head"):
        dw.attach(zoo.real("bert-base"), "head")


def test_equals_training_the_layer_itself() -> None:
    outputs = []
    for tuned in (False, True):
        model, inputs = zoo.ZOO["bert"]()
        parameters = dw.attach(model, "head").parameters() if tuned else list(model.classifier.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            model.zero_grad()
            zoo.loss_of("bert", model, inputs).backward()
            optimizer.step()
        outputs.append(zoo.output_of("bert", model, inputs))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
