"""The estimator: what it says of small models, beside what their training really holds."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from deltaworks.advise.estimate import Estimate, estimate
from deltaworks.advise.hardware import Hardware, find_hardware, here
from deltaworks.advise.kernels import Kernels
from deltaworks.advise.phantom import Phantom
from deltaworks.advise.plan import as_json, verdict
from deltaworks.advise.rehearsal import BATCHES, STEPS, loss_of
from deltaworks.advise.values import GOLDEN, Chosen, Normal, spread
from deltaworks.core.delta import Delta, attach
from deltaworks.core.errors import UserError
from deltaworks.core.procedure import Run
from deltaworks.train.checkpointing import checkpointed
from deltaworks.train.measure import _LiveBytes, model_bytes, optimizer_bytes, step_memory

BERT = {
    "model_type": "bert", "vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 200, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
ROWS, LENGTH = 4, 32


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    """A machine of round numbers, so that none is measured."""
    rates = {"float32": 1e12, "bfloat16": 2e12, "float16": 2e12}
    found = Hardware("round", "cpu", 10**9, 1e11, rates, 1.0, 1e-6, "made up")
    monkeypatch.setattr("deltaworks.advise.hardware.here", lambda again: found)
    return found


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return written(tmp_path / "bert", BERT)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return written(tmp_path / "llama", LLAMA)


def written(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def plan(model: str, method: str = "lora", **options: Any) -> Estimate:
    return estimate(model, method, batch=ROWS, length=LENGTH, **options)


def real(folder: str) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """The same model with values, a batch for it, and its fresh head."""
    config = hf.AutoConfig.from_pretrained(folder)
    config.use_cache = False
    ids = torch.randint(3, 200, (ROWS, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type == "llama":
        return hf.AutoModelForCausalLM.from_config(config).train(), batch | {"labels": ids}, []
    model = hf.AutoModelForSequenceClassification.from_config(config).train()
    return model, batch | {"token_type_ids": 0 * ids, "labels": torch.arange(ROWS) % 2}, ["classifier"]


def trained(folder: str, method: str) -> tuple[Delta, torch.optim.Optimizer, int]:
    """The run that is rehearsed, with values: the adapter, its optimizer and the peak of all bytes that lived."""
    model, batch, head = real(folder)
    single = {key: value[:1] for key, value in batch.items()}
    with _LiveBytes() as counter:
        delta = attach(model, method, also=head)
        delta.procedure.begin(Run(STEPS, [batch] * BATCHES, loss_of, [single] * BATCHES))
        optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3), fused=True)
        delta.procedure.optimizing(optimizer)
        for _ in range(STEPS):
            loss = delta.procedure.loss(loss_of(model, batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(delta.parameters(), 1.0)
            delta.procedure.gradients()
            del loss
            optimizer.step()
            delta.procedure.stepped()
            optimizer.zero_grad()
        delta.procedure.end()
    base = sum(p.numel() * 4 for name, p in real(folder)[0].named_parameters())
    return delta, optimizer, base + counter.peak


# ---------------------------------------------------------------------- against real runs


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["lora", "full", "gps", "prefix-flat+parallel", "adalora"])
def test_a_rehearsal_holds_what_the_run_holds(method: str, family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    found = plan(folder, method)
    delta, optimizer, peak = trained(folder, method)
    assert found.trainable + found.head == sum(parameter.numel() for parameter in delta.parameters())
    assert found.optimizer_bytes == optimizer_bytes(optimizer) - 4 * len(optimizer.state)  # without counts of steps
    assert found.peak_bytes == pytest.approx(peak, rel=0.02)
    if method != "adalora":  # whose triplets are of matrices of different sizes
        assert found.stored_bytes == sum(t.numel() * t.element_size() for t in delta.tensors().values())


@pytest.mark.parametrize("again", [None, "block", "selective"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_saved_activations_are_those_of_a_real_pass(
    family: str, again: str | None, request: pytest.FixtureRequest
) -> None:
    """BERT's attention has dropout, so that the CPU takes the plain products; Llama's takes the fused kernel."""
    folder = request.getfixturevalue(family)
    model, batch, head = real(folder)
    delta = attach(model, "lora", also=head)
    own = {id(p) for p in model.parameters()}
    assert own
    found = plan(folder, checkpointing=again)
    with checkpointed(delta, again):
        saved = step_memory(model, lambda: loss_of(model, batch)).saved
    assert found.activation_bytes == pytest.approx(saved, rel=0.02)  # the last tokens of rows predict nothing


def test_scratch_memory_of_kernels_counts(bert: str) -> None:
    """The largest of N float32 scores: the processor sorts N pairs of value and position, 16 bytes each."""
    found, entries = plan(bert, "fish"), sum(p.numel() for p in real(bert)[0].bert.parameters())
    assert found.peak_phase == "calibration"
    assert found.trainable == int(0.005 * entries)
    assert found.peak_bytes > found.weight_bytes + (4 + 4 + 16) * entries  # of each tensor, all in one, pairs


def test_sizes_in_closed_form(llama: str) -> None:
    found = plan(llama, "lora[rank=4]")
    layer = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)  # in + out of q, o; k, v; gate, up, down
    assert found.trainable == 2 * 4 * layer
    assert found.stored_bytes == found.trained_bytes == found.gradient_bytes == 4 * found.trainable
    assert found.optimizer_bytes == 8 * found.trainable
    model = real(llama)[0]
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.weight_bytes == model_bytes(model)
    assert plan(llama, dtype="bfloat16").weight_bytes == pytest.approx(found.weight_bytes / 2, rel=0.01)


def test_floating_point_operations_in_closed_form(llama: str) -> None:
    tokens = ROWS * LENGTH
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 200
    attention = 2 * 2 * 2 * ROWS * LENGTH * LENGTH * 64  # two products in two layers
    assert plan(llama, "full").inference_flops == 2 * tokens * linear + attention
    training = plan(llama, "full").flops  # two gradients of each product, and the fused attention's scores once more
    assert training == pytest.approx(3 * 2 * tokens * linear + 3.5 * attention, rel=1e-6)


def test_checkpointing_trades_arithmetic_for_memory(llama: str) -> None:
    plain, half, again = (plan(llama, checkpointing=kind) for kind in (None, "selective", "block"))
    assert again.activation_bytes < 0.6 * plain.activation_bytes
    assert again.activation_bytes < half.activation_bytes < plain.activation_bytes
    assert again.peak_bytes <= half.peak_bytes <= plain.peak_bytes
    assert 1.2 < again.flops / plain.flops < 1.6
    assert again.flops - half.flops == pytest.approx(half.flops - plain.flops, rel=0.2)
    away = plan(llama, checkpointing="offload", hardware="rtx-4090")
    there = plan(llama, checkpointing="block", hardware="rtx-4090")
    hidden = 4 * ROWS * LENGTH * 64  # the input of the second block; that of the first asks for no gradient
    assert there.activation_bytes - away.activation_bytes == hidden


def test_kernels_of_an_accelerator_save_other_tensors(bert: str) -> None:
    """Masks of dropout are bytes there, and attention keeps no scores."""
    assert plan(bert, hardware="h100").activation_bytes < 0.8 * plan(bert).activation_bytes


# ---------------------------------------------------------------------- quantized bases


SIDES = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]


def test_quantized_layers(llama: str) -> None:
    """Codes and scales beside the plain weights of two blocks; an offset and two tables for each with nf4."""
    linear, rows = (2 * sum(count) for count in (map(math.prod, SIDES), (out for out, _ in SIDES)))
    scales = 2 * sum(4 * -(-out * inner // 64 // 256) + 4 + 4 * 16 + 4 * 256 for out, inner in SIDES)
    sizes = {"nf4": linear // 2 + linear // 64 + scales, "int8": linear + 4 * rows}
    whole = plan(llama, dtype="bfloat16")
    for form, size in sizes.items():
        found = plan(llama, dtype="bfloat16", quantize=form)
        assert whole.weight_bytes - found.weight_bytes == 2 * linear - size
        assert found.parameters == whole.parameters
        assert found.trainable == whole.trainable
        assert found.activation_bytes <= whole.activation_bytes
        assert found.peak_bytes < whole.peak_bytes
    single = plan(llama, dtype="bfloat16", quantize="nf4", double_quantization=False)
    assert whole.weight_bytes - single.weight_bytes == 2 * linear - linear // 2 - 4 * linear // 64 - 14 * 4 * 16


def test_gradients_of_a_quantized_base_need_it_whole(llama: str) -> None:
    """Scores are measured on plain layers, which stand there with the codes for a while."""
    whole, found = (plan(llama, "fish", quantize=form) for form in (None, "nf4"))
    assert found.trainable == whole.trainable
    assert found.peak_phase == "calibration"
    assert found.peak_bytes > whole.weight_bytes + found.weight_bytes


# ---------------------------------------------------------------------- without values


def test_what_is_chosen_is_spread_evenly_and_adds_up() -> None:
    chosen = Chosen(10, 64)
    assert sum(chosen.within(start, start + 16) for start in range(0, 64, 16)) == 10
    assert chosen.within(0, 32) == 5
    assert torch.histc(spread(100), bins=10, min=0, max=1).tolist() == pytest.approx([10] * 10, abs=1)
    assert Normal(0.02).below(0.02) == pytest.approx(0.6827, abs=1e-4)


def test_questions_to_values_are_answered() -> None:
    with Phantom() as phantom:
        scores = torch.empty(100, device="meta")
        least = scores.topk(7).values.min()
        assert len((scores > least).nonzero()) == 7
        assert len((scores == least).nonzero()) == 0
        mask = torch.zeros_like(scores).index_fill(0, torch.empty(30, dtype=torch.long, device="meta"), 1.0)
        assert [len(part.nonzero()) for part in mask.split([50, 50])] == [15, 15]
        assert scores[scores > 0].shape == (100,)
        assert bool((scores > 0).all())
        assert float(scores.sum()) == GOLDEN
        assert phantom.peak >= 100 * 4


def test_bytes_live_as_long_as_tensors() -> None:
    with Phantom() as phantom:
        first = torch.empty(1000, device="meta")
        second = first + 1
        assert phantom.now == 8000
        del first
        assert phantom.now == 4000
        second.view(10, 100)
        assert phantom.turn() == 8000
        assert phantom.peak == 4000


def test_the_kernel_of_the_processor_is_asked_for() -> None:
    """Dropout has no fused kernel there: the scores [1, 2, 8, 8] are made."""
    q = torch.empty(1, 2, 8, 4, device="meta")
    for dropout, largest in ((0.0, 2 * 8 * 4), (0.5, 2 * 8 * 8)):
        phantom = Phantom()
        with Kernels("cpu", phantom), phantom:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=dropout)
        assert (phantom.peak >= 2 * 4 * 2 * 8 * 8) == (largest == 2 * 8 * 8)


# ---------------------------------------------------------------------- hardware


def test_a_roofline_takes_what_is_longer(machine: Hardware) -> None:
    operations = [(10**12, 10), (10, 10**11)]  # a second of arithmetic, a second of data
    assert machine.seconds(operations, "float32") == pytest.approx(2.0, rel=1e-5)
    assert machine.seconds(operations, "bfloat16") == pytest.approx(1.5, rel=1e-5)
    assert find_hardware("RTX 4090").memory == 24 * 10**9
    h100 = find_hardware("h100")
    assert h100.seconds([(989 * 10**12, 0)], "bfloat16") == pytest.approx(2.0, rel=1e-3)  # half of the peak rate


def test_this_machine_is_measured_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("deltaworks.advise.hardware.PATIENCE", 0.01)
    first = here("cpu")
    assert first.rates["float32"] > 1e8
    assert first.bandwidth > 1e7
    monkeypatch.setattr("deltaworks.advise.hardware.measured", None)  # not called again
    assert here("cpu") == first
    file = tmp_path / "deltaworks" / "hardware.json"
    with pytest.raises(TypeError):
        here("cpu", again=True)
    ((key, entry),) = json.loads(file.read_text()).items()
    file.write_text(json.dumps({key: entry | {"when": entry["when"] - 25 * 3600}}))
    with pytest.raises(TypeError):
        here("cpu")
    file.write_text("broken")
    with pytest.raises(TypeError):
        here("cpu")


def test_another_number_of_threads_is_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = replace(find_hardware("h100"), name="this one")
    monkeypatch.setattr("deltaworks.advise.hardware.measured", lambda device, name: found)
    for threads in (1, 2):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert here("cpu") == found
    assert len(json.loads((tmp_path / "deltaworks" / "hardware.json").read_text())) == 2


# ---------------------------------------------------------------------- what it says


def test_it_says_whether_it_fits(bert: str) -> None:
    found = plan(bert)
    assert found.fits
    assert verdict(found).startswith("fits in 1.00 GB (round)")
    values = json.loads(as_json(found))
    assert values["fits"] is True
    assert values["peak_bytes"] == found.peak_bytes > found.weight_bytes + found.activation_bytes
    large = estimate(bert, "lora", batch=100_000, length=64, hardware="rtx-3060")
    assert not large.fits
    assert verdict(large).startswith("does not fit in 12.0 GB (rtx-3060)")
    assert "--quantize nf4, --checkpointing block or a smaller --batch or --length" in verdict(large)


def test_on_the_command_line(llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from deltaworks import cli

    words = ["plan", llama, "--method", "lora[rank=4]", "--batch", "4", "--length", "32", "--dtype", "bf16"]
    for extra in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["deltaworks", *words, *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        if not extra:
            assert "trainable          8.19 K" in shown
            assert "Fits in 1.00 GB (round)" in shown
    assert json.loads(shown)["trainable"] == plan(llama, "lora[rank=4]").trainable == 8192


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--checkpointing"], "block"),
        (["--checkpointing", "--labels", "3"], "block"),
        (["--checkpointing", "selective"], "selective"),
        (["--labels", "3"], None),
    ],
)
def test_checkpointing_may_stand_alone(
    words: list[str], kind: str | None, llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deltaworks import cli

    monkeypatch.setattr("sys.argv", ["deltaworks", "plan", llama, "--length", "32", "--json", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["checkpointing"] == kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "minlm"}, "did you mean 'minilm'"),
        ({"model": "no/such/folder"}, "does not exist|cannot be reached|could not be loaded"),
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"hardware": "h1000"}, "did you mean 'h100'"),
        ({"length": 65}, "has 64 positions, so no input is 65 tokens long"),
        ({"batch": 0}, "batch=0"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"quantize": "nf3"}, "did you mean 'nf4'"),
        ({"task": "seq2seq"}, "cannot do the task 'seq2seq'; it can do classification"),
        ({"method": "lora[rank=100]"}, "rank 100 is larger"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str, bert: str) -> None:
    given = {"model": bert, "method": "lora", "batch": 2, "length": 16} | options
    with pytest.raises(UserError, match=message):
        estimate(given.pop("model"), given.pop("method"), **given)


def test_a_configuration_file_will_do(bert: str, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps(BERT))
    assert plan(str(file)).peak_bytes == plan(bert).peak_bytes
    file.write_text("{")
    with pytest.raises(UserError, match="is no configuration of a model"):
        plan(str(file))


@pytest.mark.parametrize(("family", "task"), [("llama", "causal"), ("t5", "seq2seq"), ("bert", "classification")])
def test_what_a_bare_configuration_does_not_say(family: str, task: str, tmp_path: Path) -> None:
    """Neither a task nor the tokens that a tokenizer would give."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    shape = {"d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "vocab_size": 64} if family == "t5" else small
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": family, "num_hidden_layers": 2, "num_layers": 2, **shape}))
    assert plan(str(file)).task == task
    if family == "t5":  # which counts the ends of sentences
        with pytest.raises(UserError, match="the task classification decides by values"):
            plan(str(file), task="classification")
    else:
        assert plan(str(file), task="classification").peak_bytes > 0


def test_pictures() -> None:
    found = plan("tiny-vit")
    assert (found.task, found.head) == ("images", 64 * 2 + 2)


# ---------------------------------------------------------------------- against the kernel's own count


@pytest.mark.slow
def test_peaks_of_processes(tmp_path: Path) -> None:
    """The benchmark, on its smallest model."""
    script, out = Path(__file__).parents[1] / "benchmarks" / "plan.py", tmp_path / "plan.json"
    methods = ["lora", "full", "fish", "diff-pruning"]
    command = [sys.executable, str(script), "run", "--models", "bert-mini", "--methods", ",".join(methods)]
    subprocess.run([*command, "--out", str(out)], check=True)
    rows = json.loads(out.read_text())["rows"]
    assert sorted({row["method"] for row in rows}) == sorted(methods)
    for row in rows:
        assert row["trainable"] == row["measured"]["trainable"]
        assert row["stored_bytes"] == row["measured"]["stored_bytes"]
        assert row["peak_bytes"] == pytest.approx(max(row["measured"]["peaks"].values()), rel=0.08)
