"""Every method that does something over time tells it in the shape that the record documents and the report draws."""

import json

import pytest
import torch
import zoo
from conformance import METHODS, attach, begin

import deltaworks as dw
from deltaworks.compare.pictures import is_number, pictures
from deltaworks.core.registry import Config


def with_a_procedure() -> list[str]:
    return [name for name in METHODS if dw.registry()[name].procedure is not Config.procedure]


@pytest.mark.parametrize("method", with_a_procedure())
def test_details_are_numbers_or_can_be_drawn(method: str) -> None:
    model, inputs = zoo.ZOO["bert"]()
    try:
        delta = attach(model, method)
    except dw.UserError as error:
        pytest.skip(str(error))
    begin(delta, "bert", inputs, steps=10)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3))
    delta.procedure.optimizing(optimizer)
    for _ in range(10):
        delta.procedure.loss(zoo.loss_of("bert", model, inputs)).backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    delta.procedure.end()
    details = delta.procedure.details()
    assert details == json.loads(json.dumps(details, allow_nan=False))
    assert details or not getattr(delta.procedure, "members", True), "what it does is told"
    for name, value in details.items():
        assert name.startswith(method.replace("-", "_") + "_"), "the name of the method comes first"
        assert is_number(value) or value == {} or pictures(name, value), f"{name} is of no known kind: {value}"
