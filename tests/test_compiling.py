"""Blocks that are compiled by the recipe train as they do without, and never compile again from step to step."""

from contextlib import ExitStack
from shutil import which
from typing import Any

import pytest
import torch
from test_compile import batches, decoder
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from zoo import ZOO

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.train.checkpointing import checkpointed
from deltaworks.train.compiling import check_compiler, compiled
from deltaworks.train.measure import step_memory


def steps(method: str, kind: str | None, backend: Any = None) -> tuple[list[float], list[int]]:
    """The loss of each step on batches of three lengths, and the graphs until then."""
    model = decoder(9).train()
    delta = dw.attach(model, method, seed=1)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    losses, graphs = [], []
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(compiled(delta, backend))
        stack.enter_context(checkpointed(delta, kind))
        for index, batch in enumerate([*batches(), *batches()]):
            batch = batch[:, : 10 - 2 * (index % 3)]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            graphs.append(getattr(backend, "frame_count", 0))
    assert not any("forward" in module.__dict__ for module in model.modules())
    return losses, graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "block", "selective"])
@pytest.mark.parametrize("method", ["lora[rank=2]", "houlsby"])
def test_no_step_compiles_again(method: str, kind: str | None) -> None:
    torch._dynamo.reset()
    counters.clear()
    expected, _ = steps(method, None)
    losses, graphs = steps(method, kind, CompileCounterWithBackend("eager"))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert graphs[0] <= 2  # one for the block whose input asks for no gradient, and one for all others
    assert graphs[-1] == graphs[0]
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(not any(which(name) for name in ("g++", "clang++")), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("method", ["lora[rank=2]", "lora[rank=2,dora=true]", "ia3", "houlsby"])
def test_inductor_trains_the_same(method: str) -> None:
    torch._dynamo.reset()
    expected, _ = steps(method, None)
    losses, _ = steps(method, None, "inductor")
    assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_measured_blocks_are_compiled_after_that() -> None:
    torch._dynamo.reset()
    model, batch, counter = decoder(2).train(), batches()[0], CompileCounterWithBackend("eager")
    delta = dw.attach(model, "lora[rank=2]")

    def loss() -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    with compiled(delta, counter):
        measured = step_memory(model, loss)
        assert counter.frame_count == 0
        loss().backward()
    assert counter.frame_count == 2
    assert measured.saved == step_memory(model, loss).saved


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaworks.train.compiling.which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        check_compiler(torch.device("cpu"))
    delta = dw.attach(ZOO["mlp"]()[0], "lora[rank=2,targets=*]")
    with pytest.raises(UserError, match="has no blocks to compile"), compiled(delta):
        pass
