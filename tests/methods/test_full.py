"""Full fine-tuning and attention tuning."""

import pytest
import torch
import zoo

import deltaworks as dw


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_parameter_is_trained_once(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    total = sum(parameter.numel() for parameter in model.parameters())
    delta = dw.attach(model, "full")
    assert sum(parameter.numel() for parameter in delta.parameters()) == total
    zoo.loss_of(name, model, inputs).backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


@pytest.mark.parametrize(
    ("name", "total"),
    [("bert-base", 109_482_240), ("t5-large", 737_668_096), ("t5-3b", 2_851_598_336), ("t5-11b", 11_307_321_344)],
)
def test_published_sizes(name: str, total: int) -> None:
    delta = dw.attach(zoo.real(name), "full")
    assert sum(parameter.numel() for parameter in delta.parameters()) == total


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "qwen2"])
def test_equals_training_the_model_itself(name: str) -> None:
    plain, inputs = zoo.ZOO[name]()
    tuned, _ = zoo.ZOO[name]()
    delta = dw.attach(tuned, "full")
    for model, parameters in ((plain, list(plain.parameters())), (tuned, delta.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            zoo.loss_of(name, model, inputs).backward()
            optimizer.step()
    expected = zoo.output_of(name, plain, inputs)
    torch.testing.assert_close(zoo.output_of(name, tuned, inputs), expected, rtol=1e-4, atol=1e-4)
    delta.merge(keep_base=False)
    torch.testing.assert_close(zoo.output_of(name, tuned, inputs), expected, rtol=1e-4, atol=1e-4)
    count = sum(parameter.numel() for parameter in tuned.parameters())
    assert count == sum(parameter.numel() for parameter in plain.parameters())  # still tied


def test_the_head_is_not_trained_twice() -> None:
    model, _ = zoo.ZOO["bert"]()
    delta = dw.attach(model, "full", also=["head"])
    total = sum(parameter.numel() for parameter in model.parameters()) // 2
    assert sum(parameter.numel() for parameter in delta.parameters()) == total
    paths = [item.place.path for item in delta.attached]
    assert len(paths) == len(set(paths))


def test_attention_tuning_trains_four_matrices_in_each_block() -> None:
    """T5-large: 24 decoder blocks, q, k, v, o of 1024 x 1024 each."""
    delta = dw.attach(zoo.real("t5-large"), "full", targets="cross_attention.[qkvo]")
    assert len(delta.parameters()) == 24 * 4
    assert sum(parameter.numel() for parameter in delta.parameters()) == 24 * 4 * 1024**2
