"""torch.compile over a model with an adapter: no breaks in the graph, and no graph more from step to step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import deltaworks as dw

STEPS = 4
FORMS = [
    "oft[block=4]", "ia3", "houlsby[reduction=4]", "prefix-flat[length=3]", "adalora[rank=2, interval=1]",
    "lora[rank=2]+deft", "full",
]  # fmt: skip


def decoder(layers: int) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.LlamaConfig(vocab_size=40, max_position_embeddings=48, use_cache=False, **sizes)
        return hf.LlamaForCausalLM(config)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 40, (2, 10), generator=generator) for _ in range(STEPS)]


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    torch._dynamo.reset()
    counters.clear()
    return CompileCounterWithBackend("eager")


def trained(model: nn.Module, delta: dw.Delta, counter: CompileCounterWithBackend) -> tuple[list[float], list[int]]:
    """The loss of each step, and the graphs that were compiled until then."""
    model.train()
    delta.procedure.begin(dw.Run(STEPS))
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    delta.procedure.optimizing(optimizer)
    losses, graphs = [], []
    for batch in batches():
        loss = delta.procedure.loss(model(input_ids=batch, labels=batch).loss)
        loss.backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        graphs.append(counter.frame_count)
    delta.procedure.end()
    return losses, graphs


@pytest.mark.parametrize(
    "method", ["lora[rank=2]", *(pytest.param(method, marks=pytest.mark.slow) for method in FORMS)]
)
def test_compiled_blocks_train_the_same_with_one_graph_for_all(method: str, counter: CompileCounterWithBackend) -> None:
    """Nine blocks are more than the graphs that dynamo keeps of one function."""
    model = decoder(9)
    expected, _ = trained(model, dw.attach(model, method, seed=1), counter)
    model = decoder(9)
    delta = dw.attach(model, method, seed=1)
    for block in model.model.layers:
        block.compile(fullgraph=True, backend=counter)
    losses, graphs = trained(model, delta, counter)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert graphs[0] <= 2  # one where the block's input has no gradient, and one for all other blocks
    assert len(set(graphs)) == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["lora[rank=2]", "oft[block=4]", "ia3", "houlsby[reduction=4]", "prefix-flat[length=3]"]
)
def test_compiled_generation_has_a_graph_for_the_prompt_and_one_for_all_tokens(
    method: str, counter: CompileCounterWithBackend
) -> None:
    model = decoder(3).eval()
    model.generation_config.pad_token_id = 0
    delta = dw.attach(model, method)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = [model.generate(batch[:, :6], **options) for batch in batches()]
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    for batch, tokens in zip(batches(), expected, strict=True):
        assert torch.equal(model.generate(batch[:, :6], **options), tokens)
        assert counter.frame_count == 2
    assert not counters["graph_break"]
    with delta.disabled():
        model.generate(batches()[0][:, :6], **options)
    before = counter.frame_count
    model.generate(batches()[0][:, :6], **options)
    assert counter.frame_count == before  # back again is not compiled again


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora[rank=2]", "adalora[rank=2, interval=1]"])
def test_the_trainer_compiles(tmp_path: Path, method: str, counter: CompileCounterWithBackend) -> None:
    losses = {}
    for compiled in (False, True):
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path / str(compiled)), max_steps=STEPS, per_device_train_batch_size=4,
            learning_rate=1e-2, report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=True,
            save_strategy="steps", save_steps=STEPS,
            torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for batch in batches() for row in batch]
        trainer = dw.DeltaTrainer(dw.attach(decoder(2), method, seed=1), arguments, train_dataset=rows)
        trainer.train()
        losses[compiled] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        dw.load(decoder(2), tmp_path / str(compiled) / f"checkpoint-{STEPS}")
    assert losses[True] == pytest.approx(losses[False], abs=2e-3)  # as the log rounds them
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
