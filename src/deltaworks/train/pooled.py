"""A sentence encoder with a classifier on its pooled token states."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.modeling_outputs import SequenceClassifierOutput


class PooledClassifier(nn.Module):
    """``classifier(pool(encoder(tokens)))``, for encoders published as sentence embedders.

    Args:
        encoder: A transformers model that returns `last_hidden_state` [batch, tokens, hidden].
        labels: Number of classes.
        pooling: "mean" over unmasked tokens, "max" over unmasked tokens, or "first" token.
    """

    main_input_name = "input_ids"

    def __init__(self, encoder: nn.Module, labels: int, pooling: str = "mean") -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.config = config
        config.num_labels = labels
        self.pooling = pooling
        self.classifier = nn.Linear(config.hidden_size, labels)
        # the head of BERT (Devlin et al. 2019): normal with the encoder's own spread, no bias
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,  # [batch, tokens]
        attention_mask: Tensor | None = None,  # [batch, tokens], 1 = token, 0 = padding
        token_type_ids: Tensor | None = None,  # [batch, tokens]
        labels: Tensor | None = None,  # [batch]
        **others: Any,
    ) -> "SequenceClassifierOutput":
        """Logits [batch, labels] and, where labels are given, the mean cross-entropy in nats."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        if token_type_ids is not None:
            others["token_type_ids"] = token_type_ids
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        pooled = pool(states, attention_mask, self.pooling)  # [batch, hidden]
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        loss = F.cross_entropy(logits.float(), labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding of the encoder."""
        return self.encoder.get_input_embeddings()  # type: ignore[operator]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Recompute the encoder's blocks in the backward pass instead of storing their activations."""
        self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        """Store activations again."""
        self.encoder.gradient_checkpointing_disable()  # type: ignore[operator]

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """The name under which later versions of the Trainer call `gradient_checkpointing_enable`."""
        enable: Any = getattr(
            self.encoder, "activation_checkpointing_enable", self.encoder.gradient_checkpointing_enable
        )
        enable(activation_checkpointing_kwargs, **options)

    def enable_input_require_grads(self) -> None:
        """Let gradients flow through checkpointed blocks although the embeddings are frozen."""
        self.encoder.enable_input_require_grads()  # type: ignore[operator]


def pool(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """Token states [batch, tokens, hidden] and a mask [batch, tokens] to sentence states [batch, hidden]."""
    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device, dtype=torch.long)
    if how == "first":
        first = mask.argmax(dim=1)  # padding may stand on the left
        return states[torch.arange(len(states), device=states.device), first]
    kept = mask.unsqueeze(-1).bool()  # [batch, tokens, 1]
    if how == "max":
        return states.masked_fill(~kept, float("-inf")).amax(dim=1)
    return (states * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
