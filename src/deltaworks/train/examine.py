"""What is measured of a trained adapter: its test score, inference, counts, ranks and error of merging."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.delta import Delta
from deltaworks.store.checkpoint import load
from deltaworks.store.records import Score
from deltaworks.train import measure
from deltaworks.train.fitting import Tell
from deltaworks.train.recording import counts_of, ranks_are_quick, ranks_of
from deltaworks.train.stage import Stage

DIGITS = 6  # of the score of a single example: a record stays small


def examine(stage: Stage, folder: Path, tell: Tell) -> dict[str, Any]:
    """The saved adapter on the test split and on other text, and its counts, ranks and error of merging, as fields."""
    tell({"event": "test"})
    delta = load(stage.model, folder)
    output_of(stage)  # the first pass allocates and compiles: it is not timed
    started = time.perf_counter()
    outcome = stage.evaluate(stage.test)
    seconds = time.perf_counter() - started
    if stage.recipe.score is not None:
        outcome |= stage.written(stage.test)
    found = delta.report(ranks=stage.recipe.ranks and ranks_are_quick(delta))
    tokens = sum(len(example.get("input_ids", ())) for example in stage.test)
    fields = {
        "test": score_of(outcome),
        "inference_samples_per_second": per_second(len(stage.test), seconds),
        "inference_tokens_per_second": per_second(tokens, seconds),
        "counts": counts_of(delta, found, stage.loaded.head, measure.folder_bytes(folder)),
        "sites": len({item.place.path for item in delta.attached if item.member < len(delta.members)}),
        "rank": ranks_of(found),
        **forgetting(stage, delta),
        "merge_error": measure.merge_error(delta, lambda: output_of(stage)),
    }
    delta.detach()
    return fields


def forgetting(stage: Stage, delta: Delta) -> dict[str, Any]:
    """How much the loss on the text that is watched is higher with the adapter than without it."""
    if stage.probe is None:
        return {}
    after = stage.evaluate(stage.probe.examples)["loss"]
    with delta.disabled():
        before = stage.evaluate(stage.probe.examples)["loss"]
    return {"forgetting": after - before, "forgetting_text": stage.probe.name}


def score_of(outcome: dict[str, Any]) -> Score:
    """The outcome of ``Task.evaluate`` as a record holds it; without a score where the loss is not finite."""
    score = outcome["score"] if math.isfinite(outcome["loss"]) else None
    if "correct" in outcome:
        return Score(metric=outcome["metric"], score=score, correct="".join(map(str, outcome["correct"])))
    values = [round(value, DIGITS) for value in outcome["values"]]
    return Score(metric=outcome["metric"], score=score, values=values, weights=outcome["weights"])


def output_of(stage: Stage) -> Tensor:
    """The logits of a few test examples, without gradient; the model is in evaluation mode."""
    batch = {key: value.to(stage.device) for key, value in stage.task.collate(stage.test[:8]).items()}
    if stage.task.name != "seq2seq":  # there the decoder's input is made from the labels
        batch.pop("labels", None)
    with torch.no_grad(), stage.arithmetic():
        output = stage.model(**batch)
    return output if isinstance(output, Tensor) else output.logits


def per_second(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None
