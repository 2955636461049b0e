"""What tiny-lm learns of Python's documentation: perplexity on held-out docstrings before and after, by method.

    python benchmarks/tiny_lm.py            # results/tiny_lm.json and .md; minutes on one core

Every method trains at its own learning rate, with the rows and their order the same.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from deltaworks.compare.wording import show_bytes, show_count
from deltaworks.store.checkpoint import load
from deltaworks.train import measure
from deltaworks.train.data import python_version
from deltaworks.train.recipe import Recipe
from deltaworks.train.search import choose, search
from deltaworks.train.stage import Stage, prepare, read_data

RESULTS = Path(__file__).parent / "results" / "tiny_lm"
METHODS = ("full", "lora", "houlsby", "pfeiffer", "ia3", "prefix", "prompt")
RECIPE = Recipe(
    model="tiny-lm", data="stdlib-text", limit=2000, test_limit=300, max_length=256, steps=150, batch_size=8,
    group_by_length=True, curve_points=1, threads=1,
)  # fmt: skip


def adapted(method: str, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """The scores on the test rows before and after training, and what the adapter takes."""
    stage = prepare(recipe.model_copy(update={"method": method}), read_data(recipe))
    before = stage.evaluate(stage.test)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        best = choose(search(stage, folder, lambda event: None))
        delta = load(stage.model, folder)
        return {
            "method": method,
            "rate": best.rate,
            "trainable": sum(parameter.numel() for parameter in delta.parameters()),
            "stored_bytes": measure.folder_bytes(folder),
            "examples": best.examples,
            "tokens": tokens(stage),
            "before": scores(before),
            "after": scores(stage.evaluate(stage.test)),
            "hardware": measure.hardware(stage.device),
        }


def tokens(stage: Stage) -> int:
    """Of the training batches, without padding."""
    return sum(len(example["input_ids"]) for examples in stage.batches() for example in examples)


def scores(outcome: dict[str, Any]) -> dict[str, float]:
    return {key: round(outcome[key], 4) for key in ("perplexity", "loss", "score")}


def main() -> None:
    rows = []
    for method in METHODS:
        rows.append(adapted(method))
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    before = first["before"]
    lines = [
        "# tiny-lm learns Python's documentation",
        "",
        f"Made by `benchmarks/tiny_lm.py` on {first['hardware']}, with the docstrings of {python_version()}:",
        f"{RECIPE.steps} steps of {RECIPE.batch_size} docstrings ({first['tokens']:,} tokens), one seed; "
        f"{RECIPE.test_limit} other docstrings are the test.",
        "Each method at its own learning rate, which was found on other models and data.",
        "",
        "| method | test perplexity | token accuracy | trained | stored | rate |",
        "|---|---|---|---|---|---|",
        f"| tiny-lm as it is | {before['perplexity']:.1f} | {100 * before['score']:.1f} % | | | |",
    ]
    for row in sorted(rows, key=lambda row: row["after"]["perplexity"]):
        cells = [
            f"`{row['method']}`",
            f"{row['after']['perplexity']:.1f}",
            f"{100 * row['after']['score']:.1f} %",
            show_count(row["trainable"]),
            show_bytes(row["stored_bytes"]),
            f"{row['rate']:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
