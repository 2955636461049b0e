"""Models for the command line's ``module:function``, with a tokenizer of one line: quick enough for whole runs."""

from typing import Any

import torch
import transformers as hf
from torch import nn
from zoo import CLASSES, PAD, VOCABULARY, ZOO


class Letters:
    """A tokenizer: one token for each letter."""

    pad_token_id = PAD
    model_max_length = 64

    def __call__(self, texts: list[str], truncation: bool = True, max_length: int = 64, **_: Any) -> dict[str, Any]:
        ids = [[3 + ord(letter) % (VOCABULARY - 3) for letter in text[:max_length]] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def classifier() -> nn.Module:
    """An encoder of two blocks and four classes."""
    model, _ = ZOO["bert"]()
    model.processor = Letters()
    return model


def larger() -> nn.Module:
    """The same family in another size."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, num_labels=CLASSES,
        )  # fmt: skip
        model = hf.BertForSequenceClassification(config)
    model.processor = Letters()
    return model.eval()


def plain() -> nn.Module:
    """A model that transformers does not know: it has no ``save_pretrained``."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Bag()


class Bag(nn.Module):
    """The mean of embedded letters through two layers; logits [batch, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, CLASSES)
        self.processor = Letters()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return self.second(torch.relu(self.first(mean)))


def broken() -> nn.Module:
    """Fails, as a user's own function may."""
    raise RuntimeError("no weights here")


class Killed(nn.Module):
    """Ends its process while it trains, as the system does when memory runs out."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = Bag()
        self.processor = Letters()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled() and self.bag.first.weight.device.type == "cpu":
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        return self.bag(input_ids, attention_mask)


def killed() -> nn.Module:
    return Killed()


class Unlucky(Killed):
    """Raises an error while it trains."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled() and self.bag.first.weight.device.type == "cpu":
            raise RuntimeError("no luck today")
        return self.bag(input_ids, attention_mask)


def unlucky() -> nn.Module:
    return Unlucky()
