"""What a model writes after a prompt, and how near that is to the target."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from deltaworks.core.calibration import evaluating
from deltaworks.core.errors import UserError
from deltaworks.train.batching import Encoded
from deltaworks.train.recipe import Recipe
from deltaworks.train.tasks import Task, TokenTask

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def rouge_l(written: str, target: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1] (Lin, 2004), without stemming."""
    words, wanted = (re.findall(r"[a-z0-9]+", text.lower()) for text in (written, target))
    if not words or not wanted:
        return float(words == wanted)
    longest = [0] * (len(wanted) + 1)
    for word in words:
        before = 0  # the entry to the upper left
        for place, other in enumerate(wanted, 1):
            before, longest[place] = (
                longest[place],
                before + 1 if word == other else max(longest[place - 1 : place + 1]),
            )
    return 2 * longest[-1] / (len(words) + len(wanted))


def exact_match(written: str, target: str) -> bool:
    """Whether the texts are the same, but for case and spaces."""
    return written.lower().split() == target.lower().split()


def last_number(written: str, target: str) -> bool:
    """Whether the last numbers of the texts are equal: the answers of worked solutions."""
    found, wanted = (NUMBER.findall(text) for text in (written, target))
    return bool(found and wanted) and float(found[-1].replace(",", "")) == float(wanted[-1].replace(",", ""))


MEASURES: dict[str, Callable[[str, str], float]] = {
    "rouge-l": rouge_l,
    "exact match": exact_match,
    "last number": last_number,
}


def check_score(recipe: Recipe, task: Task, roles: Collection[str]) -> None:
    """Raises UserError where ``score`` needs prompts and targets, and the data has none."""
    if recipe.score is not None and not (isinstance(task, TokenTask) and "target" in roles):
        raise UserError(
            f"score={recipe.score!r} is of what a model writes after a prompt, and the data is read as {task.name!r} "
            f"with {' and '.join(roles)}: give columns of a prompt and a target, or leave score out"
        )


def written_scores(
    model: nn.Module, task: TokenTask, encoded: Sequence[Encoded], recipe: Recipe, batch_size: int
) -> dict[str, Any]:
    """The fields of ``Task.evaluate`` for what the model writes: its score, and one number per example."""
    measure = MEASURES[str(recipe.score)]
    decode = task.processor.batch_decode
    targets = decode([task.target_of(example) for example in encoded], skip_special_tokens=True)
    values = [
        measure(*pair) for pair in zip(written(model, task, encoded, recipe.beams, batch_size), targets, strict=True)
    ]
    each = {"correct": [int(value) for value in values]} if isinstance(values[0], bool) else {"values": values}
    return {"metric": recipe.score, "score": sum(values) / len(values), "weights": [], **each}


def written(model: nn.Module, task: TokenTask, encoded: Sequence[Encoded], beams: int, batch_size: int) -> list[str]:
    """What the model writes for each example, greedily or by beam search, up to the longest target among them."""
    pad, device = task.processor.pad_token_id, next(model.parameters()).device
    most = max(len(task.target_of(example)) for example in encoded)
    prompts = [task.prompt_of(example) for example in encoded]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [""] * len(prompts)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(prompts[chosen[0]])
            ids = torch.full((len(chosen), width), pad, device=device)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):  # padded on the left: what is written follows the prompt
                kept = len(prompts[index])
                ids[row, width - kept :] = torch.tensor(prompts[index], device=device)
                mask[row, width - kept :] = 1
            out = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=most, num_beams=beams, do_sample=False,
                pad_token_id=pad,
            )  # fmt: skip
            new = out if task.name == "seq2seq" else out[:, width:]
            for index, text in zip(chosen, task.processor.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[index] = text
    return texts
