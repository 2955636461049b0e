"""What `deltaworks plan` predicts, beside what a run really takes: every method on models of several sizes.

    python benchmarks/plan.py run                     # into results/plan.json; half an hour of one core; resumes
    python benchmarks/plan.py run --models bert-mini --methods lora,fish
    python benchmarks/plan.py predict                 # what was measured, with the estimator as it is now
    python benchmarks/plan.py table                   # results/plan.md

Each run is a process of its own, forked after the imports: a model with random weights is built from the configuration,
the method attached, calibrated and trained for three steps. The peak is the growth of the resident memory of the
process without the pages of libraries, as the kernel counts it (VmHWM, RssFile), from before the model was built;
freed memory goes back at once (M_MMAP_THRESHOLD), so that the allocator's caching is no part of it. Times are
processor time of one thread.
"""

import ctypes
import gc
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import typer

from deltaworks.advise.bodies import fresh_head
from deltaworks.advise.estimate import estimate
from deltaworks.advise.rehearsal import BATCHES, STEPS, loss_of
from deltaworks.core.delta import attach
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Replacement
from deltaworks.core.procedure import Run
from deltaworks.core.registry import registry
from deltaworks.store.records import versions
from deltaworks.train import models
from deltaworks.train.measure import hardware

RESULTS = Path(__file__).parent / "results"
BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
LLAMA = {"model_type": "llama", "vocab_size": 16000, "architectures": ["LlamaForCausalLM"]}
T5 = {"model_type": "t5", "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def bert(layers: int, width: int) -> dict[str, Any]:
    """The sizes of google/bert_uncased_L-*_H-*."""
    heads = {"num_hidden_layers": layers, "num_attention_heads": width // 64}
    return BERT | heads | {"hidden_size": width, "intermediate_size": 4 * width}


MODELS: dict[str, dict[str, Any]] = {
    "bert-mini": bert(4, 256),
    "bert-small": bert(4, 512),
    "llama-small": LLAMA | {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "t5-mini": T5 | {
        "d_model": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 6,
        "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 0, "pad_token_id": 0,
    },
}  # fmt: skip
SHAPES = ((2, 128), (8, 48))  # rows and tokens
Row = dict[str, Any]
LIMIT = 300  # seconds for one run
KEPT_SMALL = -3  # mallopt's M_MMAP_THRESHOLD: larger blocks are mapped one by one, and unmapped when they are freed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def resident(field: str) -> int:
    """A field of this process's status, such as VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def anonymous_peak() -> int:
    """The most that was resident of this process's own memory: without the pages of libraries, which only grow."""
    return resident("VmHWM") - resident("RssFile")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def real_model(folder: Path) -> tuple[Any, str]:
    """A model with random weights for the task that `plan` takes, and that task."""
    config = transformers.AutoConfig.from_pretrained(folder)
    task = {"bert": "classification", "llama": "causal", "t5": "seq2seq"}[config.model_type]
    config.use_cache = False
    return getattr(transformers, models.AUTO_CLASSES[task]).from_config(config).train(), task


def real_batch(task: str, config: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, config.vocab_size, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "classification":
        types = {"token_type_ids": torch.zeros_like(ids)} if getattr(config, "type_vocab_size", 0) > 1 else {}
        return batch | types | {"labels": torch.arange(rows) % 2}
    return batch | {"labels": torch.randint(3, config.vocab_size, (rows, length))}


class Batches:
    def __init__(self, make: Callable[[], dict[str, torch.Tensor]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(BATCHES):
            yield self.make()


def real_run(folder: Path, method: str, rows: int, length: int) -> dict[str, Any]:
    """A run with real values: its counts, its peak in bytes and the processor time of a step in seconds."""
    gc.collect()
    before = resident("RssAnon")
    torch.manual_seed(0)
    model, task = real_model(folder)
    head = fresh_head(model) if task == "classification" else []
    gc.collect()
    reset_peak()
    delta = attach(model, method, also=head)
    peaks, seconds = {"attaching": anonymous_peak() - before}, []
    reset_peak()
    batches, single = (Batches(lambda n=n: real_batch(task, model.config, n, length)) for n in (rows, 1))
    delta.procedure.begin(Run(STEPS, batches, loss_of, single))
    peaks["calibration"] = anonymous_peak() - before
    reset_peak()
    fresh = [i.tuner for i in delta.attached if isinstance(i.tuner, Replacement) and i.place.path in head]
    of_head = {id(parameter) for tuner in fresh for parameter in tuner.parameters()}
    trainable = sum(p.numel() for p in delta.parameters() if id(p) not in of_head)
    batch = real_batch(task, model.config, rows, length)
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3), fused=True)
    delta.procedure.optimizing(optimizer)
    for _ in range(STEPS):
        started = time.process_time()
        loss = delta.procedure.loss(loss_of(model, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(delta.parameters(), 1.0)
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
    peaks["training"] = anonymous_peak() - before
    delta.procedure.end()
    stored = sum(t.numel() * t.element_size() for t in delta.tensors().values())
    return {"trainable": trainable, "stored_bytes": stored, "peaks": peaks, "step_seconds": min(seconds[1:])}


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The work in a process of its own."""
    source, target = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(LIMIT)
        try:
            found = work()
        except Exception as error:  # a run that fails is a row
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(target, json.dumps(found).encode())
        os._exit(0)
    os.close(target)
    with os.fdopen(source, "rb") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process was killed"}


@app.command()
def run(models: str = ",".join(MODELS), methods: str = "", out: Path = RESULTS / "plan.json") -> None:
    """Predict and measure; what lies in the file already is left out."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(KEPT_SMALL, 1 << 16)
    rows = {key_of(row): row for row in read(out)}
    for name in models.split(","):
        with config_of(name) as folder:
            for batch, length in SHAPES:
                real_run(folder, "lora", batch, length)  # so that the children find code and buffers of libraries
                for method in methods.split(",") if methods else registry():
                    row: Row = {"model": name, "batch": batch, "length": length, "method": method}
                    if key_of(row) not in rows:
                        row |= predicted(folder, method, batch, length)
                        if "refused" not in row:
                            row["measured"] = apart(partial(real_run, folder, method, batch, length))
                        rows[key_of(row)] = row
                        write(out, list(rows.values()))
                        print(line(row), flush=True)


@app.command()
def predict(out: Path = RESULTS / "plan.json") -> None:
    """Predict again what was measured."""
    torch.set_num_threads(1)
    rows = read(out)
    for name in dict.fromkeys(row["model"] for row in rows):
        with config_of(name) as folder:
            for row in rows:
                if row["model"] == name:
                    row |= predicted(folder, row["method"], row["batch"], row["length"])
    write(out, rows)


def key_of(row: Row) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["length"], row["method"]


def read(file: Path) -> list[Row]:
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def write(file: Path, rows: list[Row]) -> None:
    machine = f"{hardware(torch.device('cpu'))}, {platform.system()}, one thread"
    file.write_text(json.dumps({"machine": machine, "versions": versions(), "rows": rows}, indent=1))


@contextmanager
def config_of(name: str) -> Iterator[Path]:
    """A folder with the configuration of a model, and nothing else."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MODELS[name]))
        yield folder


def predicted(folder: Path, method: str, batch: int, length: int) -> Row:
    started = time.process_time()
    try:
        found = estimate(str(folder), method, batch=batch, length=length)
    except UserError as error:
        return {"refused": str(error)}
    return {
        "trainable": found.trainable, "stored_bytes": found.stored_bytes, "peak_bytes": found.peak_bytes,
        "peak_phase": found.peak_phase, "flops": found.flops, "step_seconds": found.step_seconds,
        "estimate_seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


def failure(row: Row) -> str:
    """Why there is nothing to compare; empty where there is."""
    return row.get("refused", "") or row["measured"].get("error", "")


@app.command()
def table() -> None:
    """Write results/plan.md."""
    stored = json.loads((RESULTS / "plan.json").read_text())
    rows = [row for row in stored["rows"] if not failure(row)]
    failed = [row for row in stored["rows"] if failure(row)]
    for row in rows:
        row["real"] = max(row["measured"]["peaks"].values())
        row["off"] = row["peak_bytes"] / row["real"] - 1
        row["slower"] = row["step_seconds"] / row["measured"]["step_seconds"]
    (RESULTS / "plan.md").write_text("\n".join([*summary(rows, failed, stored["machine"]), "", *details(rows)]) + "\n")


def summary(rows: list[Row], failed: list[Row], machine: str) -> Iterator[str]:
    """How good the estimate was."""
    errors = [abs(row["off"]) for row in rows]
    worst = max(rows, key=lambda row: abs(row["off"]))
    count = len({row["method"] for row in rows})
    yield "# Predicted and real"
    yield ""
    yield f"Machine: {machine}. Made by [benchmarks/plan.py](../plan.py), which says how."
    yield ""
    yield (
        f"{len(rows)} runs of {count} methods. Peak memory: median error {100 * statistics.median(errors):.1f} %, "
        f"nine in ten within {100 * sorted(errors)[int(0.9 * len(errors))]:.1f} %, worst {100 * max(errors):.1f} % "
        f"({worst['method']} on {worst['model']})."
    )
    for what, name in (("trainable", "Trained values"), ("stored_bytes", "Stored bytes")):
        ratios: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row[what] != row["measured"][what]:
                ratios[row["method"]].append(row[what] / row["measured"][what])
        exact = len(rows) - sum(map(len, ratios.values()))
        others = ", ".join(f"{method} ({min(own):.2f} to {max(own):.2f})" for method, own in sorted(ratios.items()))
        yield f"{name}: exact in {exact} of {len(rows)}; else predicted over real, where values choose: {others}."
    times = sorted(row["slower"] for row in rows)
    off = statistics.median(max(ratio, 1 / ratio) for ratio in times)
    yield (
        f"Time of a step: predicted over real, median {statistics.median(times):.2f}, from {times[0]:.2f} to "
        f"{times[-1]:.2f}; half of the predictions are off by more than a factor of {off:.2f}."
    )
    seconds = [row["estimate_seconds"] for row in rows]
    yield f"An estimate took {statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s at most."
    yield ""
    yield "| model | batch | runs | median error | worst | time, median ratio |"
    yield "|---|---|---|---|---|---|"
    for model, batch, length in dict.fromkeys((row["model"], row["batch"], row["length"]) for row in rows):
        own = [row for row in rows if (row["model"], row["batch"], row["length"]) == (model, batch, length)]
        errors = [100 * abs(row["off"]) for row in own]
        ratio = statistics.median(row["slower"] for row in own)
        yield (
            f"| {model} | {batch} x {length} | {len(own)} | {statistics.median(errors):.1f} % | {max(errors):.1f} % | "
            f"{ratio:.2f} |"
        )
    for row in failed:
        yield f"\nNot run: {row['method']} on {row['model']}: {failure(row)}"


def details(rows: list[Row]) -> Iterator[str]:
    """Each method on each model: predicted peak in MB and its error, for both batches."""
    keys = list(dict.fromkeys((row["model"], row["batch"], row["length"]) for row in rows))
    found = {(row["method"], row["model"], row["batch"], row["length"]): row for row in rows}
    yield "Predicted peak in MB, and its error:"
    yield ""
    yield "| method | " + " | ".join(f"{model} {batch} x {length}" for model, batch, length in keys) + " |"
    yield "|---" * (len(keys) + 1) + "|"
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [found.get((method, *key)) for key in keys]
        shown = [f"{c['peak_bytes'] / 1e6:.0f} ({100 * c['off']:+.1f} %)" if c else "-" for c in cells]
        yield f"| {method} | " + " | ".join(shown) + " |"


def line(row: Row) -> str:
    name = f"{row['model']:12} {row['batch']:3} x {row['length']:<4} {row['method']:20}"
    if failure(row):
        return f"{name} {failure(row)}"
    real = row["measured"]
    peak = max(real["peaks"].values())
    phase = max(real["peaks"], key=lambda phase: real["peaks"][phase])
    exact = row["trainable"] == real["trainable"], row["stored_bytes"] == real["stored_bytes"]
    return (
        f"{name} {row['peak_bytes'] / 1e6:8.1f} {peak / 1e6:8.1f} MB {100 * (row['peak_bytes'] / peak - 1):+6.1f} % "
        f"{row['peak_phase']:12}{phase:12}{exact!s:16} {row['step_seconds']:6.2f} {real['step_seconds']:6.2f} s"
    )


if __name__ == "__main__":
    app()
