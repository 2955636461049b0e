"""Every method on the same models and data, at a budget near LoRA's of rank 8 where it has one, and what a step costs.

    python benchmarks/methods.py score banking77 DATA             # an encoder that classifies; hours on two cores
    python benchmarks/methods.py score e2e_nlg DATA --model DIR   # a decoder that writes
    python benchmarks/methods.py cost DATA                        # saved activations and step time beside LoRA's
    python benchmarks/methods.py table                            # results/methods.md from what the others wrote

DATA holds the folders banking77 and e2e_nlg, each with train.jsonl.gz and test.jsonl.gz. Every method tries its own
three learning rates (``tried`` in its configuration; three times that on the narrow decoder, where every method wants
more), chosen between on validation rows. Runs resume.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from deltaworks.compare.protocols import Protocol
from deltaworks.compare.run import compare
from deltaworks.compare.wording import show_bytes, show_count
from deltaworks.core.procedure import Run
from deltaworks.core.registry import configure, registry
from deltaworks.store.records import Record, read_records
from deltaworks.train import measure
from deltaworks.train.fitting import parameter_groups
from deltaworks.train.recipe import Recipe
from deltaworks.train.stage import Batches, Stage, prepare

RESULTS = Path(__file__).parent / "results"
ENCODER: dict[str, Any] = {
    "model": "minilm", "limit_per_class": 20, "test_limit": 1000, "steps": 64, "batch_size": 32, "head_rate": 3e-2,
    "max_length": 48, "group_by_length": True, "curve_points": 2, "ranks": False, "threads": 1, "tried": True,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "limit": 1500, "test_limit": 300, "steps": 100, "batch_size": 8, "group_by_length": True, "curve_points": 2,
    "ranks": False, "threads": 1, "tried": True, "factors": [3.0],
}  # fmt: skip

# (encoder of width 384, decoder of width 64): options that bring the trained values near those of LoRA, rank 8;
# None where there is nothing to tune
SIZES: dict[str, tuple[str, str | None]] = {
    "bat": ("rank=16", "rank=4"),
    "bitfit": ("", None),
    "compacter": ("", "reduction=4"),
    "compacter-plus-plus": ("", "reduction=4"),
    "diff-pruning": ("keep=0.0146", "keep=0.18"),
    "fish": ("keep=0.0146", "keep=0.18"),
    "fourierft": ("frequencies=9216", ""),
    "houlsby": ("width=36", "width=34"),
    "hra": ("rank=16", "rank=16"),
    "id3": ("keep=0.0146", "keep=0.18"),
    "loha": ("rank=4", "rank=4"),
    "lora-fa": ("rank=16", "rank=16"),
    "lora-xs": ("rank=96", "rank=32"),
    "lorta": ("rank=64", "rank=64"),
    "lst": ("", "reduction=4"),
    "miss": ("rank=16", "rank=16"),
    "nera": ("rank=2, knots=4", "rank=2, knots=4"),
    "paca": ("rank=16", "rank=16"),
    "parallel": ("width=71", "width=70"),
    "pfeiffer": ("width=71", "width=70"),
    "prefix-flat": ("length=72", "length=144"),
    "s2ft": ("heads=0.16, channels=0.06", "heads=0.25, channels=0.25"),
    "sam": ("keep=0.0146, burn_in=20", "keep=0.18, burn_in=20"),
    "snella": ("rank=8", "rank=8"),
    "sparse-adapter": ("adapter='houlsby[init=normal, width=59]'", "adapter='houlsby[init=normal, width=56]'"),
    "spt": ("keep=0.0146", "keep=0.18"),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False)]


def specs(decoder: bool, names: str) -> tuple[str, ...]:
    """The methods with their options, those without a size at their defaults."""
    sizes = {name: SIZES.get(name, ("", ""))[decoder] for name in (names.split(",") if names else registry())}
    return tuple(f"{name}[{size}]" if size else name for name, size in sizes.items() if size is not None)


@app.command()
def score(
    name: str, data: Folder, model: Path | None = None, methods: str = "", seeds: int = 1, workers: int = 2,
    out: Path = Path("runs/methods"),
) -> None:  # fmt: skip
    """Train and test every method on one data set, and keep the scores in results/NAME.json."""
    decoder = model is not None
    base = DECODER | {"model": str(model)} if decoder else ENCODER
    rows = {"data": str(data / name / "train.jsonl.gz"), "test": str(data / name / "test.jsonl.gz")}
    protocol = Protocol(
        name=name, methods=specs(decoder, methods), seeds=tuple(range(seeds)), workers=workers, settings=base | rows
    )
    compare(protocol, out / name)
    write(name, [summary(runs) for runs in by_method(read_records(out / name / "records"), base)])


def by_method(records: list[Record], base: dict[str, Any]) -> Iterator[list[Record]]:
    """The runs of each method as it is configured now: its other seeds, but no rates or sizes of the past."""
    found = defaultdict(list)
    recipe = Recipe(**base)
    for record in records:
        config = configure(record.method)
        tried = recipe.tried_rates(config)
        if str(config) == record.method and [trial.rate for trial in record.learning_rates] == tried:
            found[record.method].append(record)
    yield from found.values()


def summary(runs: list[Record]) -> dict[str, Any]:
    tests = {run.seed: run.test for run in sorted(runs, key=lambda run: run.seed) if run.test is not None}
    scores = {seed: found.score for seed, found in tests.items() if found.score is not None}
    first = runs[0]
    return {
        "method": first.method,
        "family": first.family,
        "metric": first.test.metric if first.test else "",
        "scores": scores,
        "score": statistics.fmean(scores.values()) if scores else None,
        "test_rows": first.data.sizes["test"],
        "trials": {trial.rate: trial.score for trial in first.learning_rates},
        "rate": first.learning_rate,
        "trainable": first.counts.trainable,
        "stored_bytes": first.counts.stored_bytes,
        "status": first.status,
        "hardware": first.hardware,
    }


@app.command()
def cost(data: Folder, methods: str = "", repeats: int = 7) -> None:
    """Saved activations of a training step, and its time over LoRA's, alternating step by step in one process."""
    rows = {"data": str(data / "banking77" / "train.jsonl.gz"), "test": str(data / "banking77" / "test.jsonl.gz")}
    recipe = Recipe(**ENCODER | rows)
    beside = Steps(prepare(recipe))
    for spec in specs(False, methods):
        own = Steps(prepare(recipe.model_copy(update={"method": spec}), beside.stage.data))
        pairs = [(own.seconds(), beside.seconds()) for _ in range(repeats)][2:]
        ratio = statistics.median(one / other for one, other in pairs)
        print(f"{spec:40} {show_bytes(own.saved):>10} {ratio:6.2f}", flush=True)
        write("cost", [{"method": spec, "saved_bytes": own.saved, "step_over_lora": round(ratio, 3)}])


class Steps:
    """Training steps of one method, one at a time, on one batch."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.delta = stage, stage.attach()
        self.batch = next(iter(Batches(stage)))
        stage.model.train()
        few, singles = (list(islice(Batches(stage, one_by_one), 4)) for one_by_one in (False, True))
        self.delta.procedure.begin(Run(stage.steps, few, stage.loss, singles))  # enough to choose something
        self.saved = measure.step_memory(stage.model, self.loss).saved
        self.optimizer = torch.optim.AdamW(parameter_groups(stage, self.delta, 1e-4), fused=True)
        self.delta.procedure.optimizing(self.optimizer)

    def loss(self) -> Any:
        return self.stage.loss(self.stage.model, self.batch)

    def seconds(self) -> float:
        started = time.perf_counter()
        self.delta.procedure.loss(self.loss()).backward()
        self.delta.procedure.gradients()
        self.optimizer.step()
        self.delta.procedure.stepped()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Keep rows in results/NAME.json, in place of those of the same methods that are there."""
    path = RESULTS / f"{name}.json"
    kept = {row["method"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    kept |= {row["method"]: row for row in rows}
    path.write_text(json.dumps([kept[key] for key in sorted(kept)], indent=1) + "\n")


@app.command()
def table() -> None:
    """Join what the other commands wrote into results/methods.md."""
    found = {
        name: {configure(row["method"]).name: row for row in json.loads((RESULTS / f"{name}.json").read_text())}
        for name in ("banking77", "e2e_nlg", "cost")
    }
    encoder, decoder, costs = found.values()
    order = sorted(encoder, key=lambda name: -(encoder[name]["score"] or 0))
    hardware = sorted({row["hardware"] for row in (*encoder.values(), *decoder.values())})
    lines = [
        "# All methods side by side",
        "",
        f"Made by `benchmarks/methods.py` on {'; '.join(hardware)}.",
        f"banking77: {setting(ENCODER, encoder)}, 20 training rows per class.",
        f"e2e_nlg: {setting(DECODER, decoder)}, 1,500 training rows.",
        "Each method tried three learning rates, chosen between on validation rows (on e2e_nlg three times those on",
        "banking77); one seed unless a spread is given, so two points on banking77 tell nothing. Sizes are near LoRA's",
        "of rank 8 where a method has one. Step time is over that of LoRA, alternating in one process. An empty cell",
        "was not run: BitFit finds no biases in that decoder.",
        "",
        "| method | banking77 accuracy | rate | trainable | stored | saved activations | step time / LoRA "
        "| e2e_nlg token accuracy | rate | trainable |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in order:
        one, two, price = encoder[name], decoder.get(name), costs.get(name)
        cells = [
            f"`{one['method']}`",
            shown(one),
            f"{one['rate']:g}",
            show_count(one["trainable"]),
            show_bytes(one["stored_bytes"]),
            show_bytes(price["saved_bytes"]) if price else "",
            f"{price['step_over_lora']:.2f}" if price else "",
            shown(two),
            f"{two['rate']:g}" if two else "",
            show_count(two["trainable"]) if two else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    (RESULTS / "methods.md").write_text("\n".join(lines) + "\n")


def setting(recipe: dict[str, Any], rows: dict[str, Any]) -> str:
    """The schedule and the test rows, in words."""
    tested = max(row["test_rows"] for row in rows.values())
    return f"{recipe['steps']} steps of {recipe['batch_size']}, {tested:,} test rows"


def shown(row: dict[str, Any] | None) -> str:
    """A score in per cent, with the spread over its seeds where there are several."""
    if row is None or row["score"] is None:
        return "" if row is None else row["status"]
    scores = list(row["scores"].values())
    spread = f" ± {100 * statistics.stdev(scores):.1f} ({len(scores)} seeds)" if len(scores) > 1 else ""
    return f"{100 * row['score']:.1f} %{spread}"


if __name__ == "__main__":
    app()
