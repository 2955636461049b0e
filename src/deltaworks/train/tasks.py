"""What a task is: how its rows are encoded and batched, its loss, and its score per example."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.calibration import evaluating
from deltaworks.core.errors import UserError, nearest
from deltaworks.train.batching import Encoded, batches, length_of
from deltaworks.train.losses import IGNORED, frozen_head
from deltaworks.train.scores import classification_scores, token_scores

__all__ = ["IGNORED", "TASKS", "Encoded", "Task", "batches", "make_task"]

PAD_MULTIPLE = 8  # tokens; matrix units work in multiples of 8


class Task(ABC):
    """Encode, batch, train on and evaluate the rows of one kind of task.

    Args:
        processor: The tokenizer or picture scaler of `load_model`.
        max_length: Most tokens per example; longer ones are truncated.
        target_length: Most tokens of a target, within ``max_length``.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    def __init__(self, processor: Any, max_length: int = 256, target_length: int | None = None) -> None:
        if max_length < 4:
            raise UserError(f"max_length={max_length} leaves no room for text; give at least 4")
        self.processor = processor
        self.max_length = min(max_length, getattr(processor, "model_max_length", max_length))
        self.target_length = min(target_length or self.max_length, self.max_length)

    @abstractmethod
    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        """Rows under role keys to model inputs, once for the whole run."""

    @abstractmethod
    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Encoded examples to one batch: integer tensors [batch, tokens], padded to a multiple of 8."""

    @abstractmethod
    def _measure(self, model: nn.Module, batch: dict[str, Tensor]) -> list[dict[str, float]]:
        """The outcome of each example of a batch, as `_summary` wants it."""

    @abstractmethod
    def _summary(self, outcomes: list[dict[str, float]]) -> dict[str, Any]:
        """Scores over all examples, in their order."""

    def loss_of(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch in nats; a model's own auxiliary losses are included. May be NaN."""
        return training_loss(model, _on_device_of(model, batch), self._loss)

    def evaluate(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> dict[str, Any]:
        """Scores without dropout and gradients; the modules' training modes are restored.

        Returns:
            "score" (in [0, 1]), "loss" (nats, NaN if any logit is), "metric" (what the score is), the task's
            further scores, and one number per example, in order, for paired statistics: "correct" (0 or 1), or
            "values" with "weights" whose weighted mean the score is.
        """
        if not encoded:
            raise UserError("there is nothing to evaluate: the split has no rows")
        # examples of like length share a batch, so little padding is computed
        order = sorted(range(len(encoded)), key=lambda index: -length_of(encoded[index]))
        outcomes: list[dict[str, float]] = [{}] * len(encoded)
        with evaluating(model), torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = _on_device_of(model, self.collate([encoded[index] for index in chosen]))
                for index, outcome in zip(chosen, self._measure(model, batch), strict=True):
                    outcomes[index] = outcome
        return {"metric": self.metric, **self._summary(outcomes)}

    def counted(self, examples: Sequence[Encoded]) -> int:
        """What the loss of a batch is the mean over: its examples, or its target tokens."""
        return len(examples)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels.to(logits.device))

    def _padded(self, examples: Sequence[Encoded], fills: dict[str, int]) -> dict[str, Tensor]:
        """Token lists to tensors [batch, tokens], each key with its own fill."""
        batch: dict[str, Tensor] = {}
        for key, fill in fills.items():
            longest = max(len(example[key]) for example in examples)
            # never past the longest input of the model, which need not be a multiple of 8
            width = max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.max_length))
            tensor = torch.full((len(examples), width), fill, dtype=torch.long)
            for row, example in enumerate(examples):
                tensor[row, : len(example[key])] = torch.tensor(example[key], dtype=torch.long)
            batch[key] = tensor
        return batch


class _ClassTask(Task):
    metric = "accuracy"

    def _measure(self, model: nn.Module, batch: dict[str, Tensor]) -> list[dict[str, float]]:
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = _logits(model(**inputs)).float()  # [batch, classes]
        losses = F.cross_entropy(logits, labels, reduction="none")
        # no class is right where a logit is not a number
        guesses = torch.where(logits.isfinite().all(dim=-1), logits.argmax(dim=-1), -1)
        columns = (labels.tolist(), guesses.tolist(), losses.tolist())
        return [{"label": a, "guess": b, "loss": c} for a, b, c in zip(*columns, strict=True)]

    def _summary(self, outcomes: list[dict[str, float]]) -> dict[str, Any]:
        return classification_scores(outcomes)


class Classification(_ClassTask):
    """One text, one of several classes."""

    name = "classification"

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        return self._encode_texts(rows, [row["text"] for row in rows])

    def _encode_texts(self, rows: Sequence[dict[str, Any]], *texts: list[str]) -> list[Encoded]:
        if not rows:
            return []
        columns = self.processor(*texts, truncation=True, max_length=self.max_length)
        return [
            {**{key: columns[key][index] for key in columns}, "labels": row["label"]} for index, row in enumerate(rows)
        ]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        fills = {key: 0 for key in examples[0] if key != "labels"} | {"input_ids": self.processor.pad_token_id}
        batch = self._padded(examples, fills)
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch


class Pairs(Classification):
    """Two texts, one of several classes; the longer text is truncated first."""

    name = "pairs"

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        return self._encode_texts(rows, [row["text"] for row in rows], [row["pair"] for row in rows])


class Images(_ClassTask):
    """One picture, one of several classes."""

    name = "images"

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        return [{"image": row["image"], "labels": row["label"]} for row in rows]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pixels stay uint8 until here: "pixel_values" float32 [batch, channels, height, width]."""
        return {
            "pixel_values": self.processor([example["image"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }


class TokenTask(Task):
    metric = "token accuracy"
    first: ClassVar[int] = 0  # the first label that is predicted

    def counted(self, examples: Sequence[Encoded]) -> int:
        return sum(label != IGNORED for example in examples for label in example["labels"][self.first :])

    def prompt_of(self, example: Encoded) -> list[int]:
        """The tokens that are given when the model writes the target."""
        return list(example["input_ids"])

    def target_of(self, example: Encoded) -> list[int]:
        """The tokens that the model should write."""
        return [label for label in example["labels"] if label != IGNORED]

    def _token_outcomes(self, logits: Tensor, labels: Tensor) -> list[dict[str, float]]:
        """Logits [batch, tokens, vocabulary] against the labels [batch, tokens] at the same places."""
        rows, places = (labels != IGNORED).nonzero(as_tuple=True)  # each [counted]
        targets = labels[rows, places]
        counted = logits[rows, places].float()  # [counted, vocabulary]: only these need float32
        losses = F.cross_entropy(counted, targets, reduction="none")
        right = (counted.argmax(dim=-1) == targets) & counted.isfinite().all(dim=-1)

        def summed(values: Tensor) -> list[float]:
            total = torch.zeros(len(labels), dtype=torch.float64, device="cpu")
            return total.index_add_(0, rows.cpu(), values.double().cpu()).tolist()

        columns = (summed(right), summed(torch.ones_like(losses)), summed(losses))
        return [{"right": a, "tokens": b, "loss": c} for a, b, c in zip(*columns, strict=True)]

    def _summary(self, outcomes: list[dict[str, float]]) -> dict[str, Any]:
        return token_scores(outcomes)


class Causal(TokenTask):
    """A text continued token by token: all of it, or only the target after a prompt.

    The prompt and the target are joined by a line break, and the target ends with the end token. Only target
    tokens count. Where both do not fit, the target keeps at least half of `max_length`, the prompt its end.
    """

    name = "causal"
    first = 1  # nothing is before the first token

    def __init__(self, processor: Any, max_length: int = 256, target_length: int | None = None) -> None:
        super().__init__(processor, max_length, target_length)
        start = processor("a")["input_ids"][:1]
        begins = processor.bos_token_id is not None and start == [processor.bos_token_id]
        self._start: list[int] = start if begins else []
        self._end: list[int] = [] if processor.eos_token_id is None else [processor.eos_token_id]

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        if not rows:
            return []
        if "target" not in rows[0]:
            return [self._joined([], tokens) for tokens in self._tokens([row["text"] for row in rows])]
        prompts = self._tokens([row["prompt"].rstrip() + "\n" for row in rows])
        targets = self._tokens([row["target"] for row in rows])
        return [self._joined(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # not verbose: what is longer than the model can read is truncated here, after the joining
        return self.processor(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _joined(self, prompt: list[int], target: list[int]) -> Encoded:
        room = self.max_length - len(self._start)
        target = target + self._end
        target = target[: min(max(room - len(prompt), -(-room // 2)), self.target_length)]
        kept = room - len(target)
        context = self._start + (prompt[-kept:] if kept else [])
        return {
            "input_ids": context + target,
            "attention_mask": [1] * (len(context) + len(target)),
            "labels": [IGNORED] * len(context) + target,
        }

    def prompt_of(self, example: Encoded) -> list[int]:
        return list(example["input_ids"])[: -len(self.target_of(example))]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        fills = {"input_ids": self.processor.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return self._padded(examples, fills)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super()._loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def _measure(self, model: nn.Module, batch: dict[str, Tensor]) -> list[dict[str, float]]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = _logits(model(**inputs))
        return self._token_outcomes(logits[:, :-1], batch["labels"][:, 1:])


class SequenceToSequence(TokenTask):
    """An encoder reads the prompt, a decoder writes the target; scored with the true target before it."""

    name = "seq2seq"

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        if not rows:
            return []
        inputs = self.processor([row["prompt"] for row in rows], truncation=True, max_length=self.max_length)
        texts = [row["target"] for row in rows]
        targets = self.processor(text_target=texts, truncation=True, max_length=self.target_length)["input_ids"]
        columns = (inputs["input_ids"], inputs["attention_mask"], targets)
        return [
            {"input_ids": tokens, "attention_mask": mask, "labels": target}
            for tokens, mask, target in zip(*columns, strict=True)
        ]

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        fills = {"input_ids": self.processor.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return self._padded(examples, fills)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super()._loss(logits.flatten(0, 1), labels.flatten())

    def _measure(self, model: nn.Module, batch: dict[str, Tensor]) -> list[dict[str, float]]:
        # the labels go in too: the model makes the decoder's input from them
        return self._token_outcomes(_logits(model(**batch)), batch["labels"])


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Pairs, Causal, SequenceToSequence, Images)}


def make_task(name: str, processor: Any, max_length: int = 256, target_length: int | None = None) -> Task:
    """The task of this name over a tokenizer or picture scaler.

    Raises:
        UserError: The name is not one of `TASKS`, or the model came without a processor.
    """
    if name not in TASKS:
        raise UserError(f"the task {name!r} is not known; {nearest(name, TASKS)}")
    if processor is None:
        raise UserError(
            f"the task {name!r} needs a tokenizer or picture scaler; set it as the attribute 'processor' of the model"
        )
    return TASKS[name](processor, max_length, target_length)


def training_loss(model: nn.Module, batch: dict[str, Tensor], of_logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean loss that a model computes for itself, by a frozen head in chunks, or else that of logits and labels."""
    if not _reads_labels(model):
        return of_logits(
            _logits(model(**{key: value for key, value in batch.items() if key != "labels"})), batch["labels"]
        )
    with frozen_head(model):
        output = model(**batch)
    loss = getattr(output, "loss", None)
    return loss if loss is not None else of_logits(_logits(output), batch["labels"])


def _reads_labels(model: nn.Module) -> bool:
    """Whether the forward takes labels, as models that compute their own loss do."""
    parameters = inspect.signature(model.forward).parameters
    return "labels" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _on_device_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    parameter = next(model.parameters(), None)
    return batch if parameter is None else {key: value.to(parameter.device) for key, value in batch.items()}
