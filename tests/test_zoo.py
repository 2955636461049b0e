"""The test models themselves: sizes as published, losses that can be learned, the same values every time."""

import pytest
import torch
from torch import nn
from zoo import BATCH, REAL, ZOO, loss_of, output_of, real

# parameters, tied ones once
PUBLISHED = {
    "roberta-base": 124_645_632,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "deberta-v3-base": 183_831_552,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "bart-large": 406_291_456,
    "llama-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama-3.2-3b": 3_212_749_824,
    "gpt2-medium": 354_823_168,
    # 96 (12 d^2 + 13 d) + (50257 + 2048) d + 2 d with d = 12288; the paper rounds it to 174,600M
    "gpt3": 174_604_259_328,
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", REAL)
def test_real_shapes_have_the_published_size(name: str) -> None:
    model = real(name)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} <= {"meta"}
    assert size(model) == PUBLISHED[name]


@pytest.mark.parametrize("name", ZOO)
def test_members_are_small_and_repeat_themselves(name: str) -> None:
    state = torch.random.get_rng_state()
    model, inputs = ZOO[name]()
    assert torch.equal(torch.random.get_rng_state(), state), "building a member must leave the generator alone"
    assert not model.training
    assert size(model) < 80_000
    again, same = ZOO[name]()
    assert inputs.keys() == same.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    with torch.no_grad():
        first, second = output_of(name, model, inputs), output_of(name, again.train(), same)
    assert len(first) == (2 * BATCH if name == "clip" else BATCH)
    assert first.isfinite().all()
    if name != "convnet":  # its batch norms differ in training
        torch.testing.assert_close(first, second)  # no dropout anywhere


@pytest.mark.parametrize("name", ZOO)
def test_outputs_depend_on_the_inputs(name: str) -> None:
    """Rows of the output differ clearly, so that an error in a few weights cannot hide."""
    model, inputs = ZOO[name]()
    with torch.no_grad():
        output = output_of(name, model, inputs)
    assert (output[0] - output[1]).abs().max() > 0.05


@pytest.mark.parametrize("name", ZOO)
def test_loss_reaches_every_parameter_and_falls(name: str) -> None:
    model, inputs = ZOO[name]()
    before = loss_of(name, model, inputs)
    assert before.shape == ()
    before.backward()
    silent = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not silent
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(name, model, inputs).backward()
        optimizer.step()
    assert loss_of(name, model, inputs) < 0.8 * before
