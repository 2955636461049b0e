"""GPS: train, of every output neuron, the few connections with the largest gradient.

Paper: Gradient-based Parameter Selection for Efficient Fine-Tuning, Zhang et al., 2023, arXiv:2312.10136 (CVPR 2024).

Formula: G = sum over batches of dL/dW [out, in] at the pretrained weights, convolutions as [out, in kh kw]; of each
row i the K entries with the largest |G_ij| are trained, w' = w + v, and every bias of these layers. L is the
supervised contrastive loss of the normalised features f in front of the head, with temperature t = 0.07: the mean
over a and over the p of its label of -log(exp(f_a f_p / t) / sum over b != a of exp(f_a f_b / t)).
Count: K sum(out) + sum(bias) (ViT-B/16 without head, K = 1: 167,424); each is stored with its position, 5 to 6 bytes.
Departure: the published code sees two augmented views of an image; augmentation is the data's business, so that each
example is its own second view here; dropout is off, only the chosen values exist (not a dense gradient with a mask),
and where batches have no class labels (language models) the training loss chooses.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.anatomy import backbone
from deltaworks.core.calibration import Criterion, summed_gradients
from deltaworks.core.delta import Delta
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import Config, method, option
from deltaworks.core.sites import Site
from deltaworks.core.weights import to_matrix
from deltaworks.methods.selective.entries import Choosing, EntriesTuner


def contrastive_loss(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """The supervised contrastive loss of ``features`` [views, width] with class ``labels`` [views].

    Every view needs another one of its label.
    """
    unit = F.normalize(features.float(), dim=-1)
    own = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logs = (unit @ unit.T / temperature).masked_fill(own, -torch.inf).log_softmax(dim=1)
    positive = (labels[:, None] == labels) & ~own
    return -(logs.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def class_labels(batch: Any) -> Tensor | None:
    """The class of each example [batch], if that is what a batch is labelled with."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    classes = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return labels if classes else None


def per_row(kind: str, scores: Tensor, count: int) -> Tensor:
    """Flat positions, ascending, of the ``count`` largest ``scores`` of each row of a weight seen as [out, in]."""
    rows = to_matrix(kind, scores)
    columns = rows.topk(min(count, rows.shape[1]), dim=1).indices
    positions = torch.arange(scores.numel(), device=scores.device).view(scores.shape)
    return to_matrix(kind, positions).gather(1, columns).flatten().sort().values


class GPSProcedure(Choosing):
    """The pass over the batches, then nothing: the mask never changes."""

    batches, contrastive = 0, False

    def begin(self, run: Run) -> None:
        if self.chosen:
            return  # loaded with its mask
        owners, whole = self.owners(), list(self.parameters().values())
        criterion = None if run.loss is None else partial(self.criterion, run.loss)
        gradients, self.batches = summed_gradients(self.delta.model, whole, run, self.config.batches, criterion)
        self.take(
            [
                per_row(item.place.kind, gradient.abs(), self.config.connections)
                if name == "weight"
                else torch.arange(gradient.numel(), device=gradient.device)
                for (item, name), gradient in zip(owners.values(), gradients, strict=True)
            ]
        )

    def criterion(self, loss_of: Criterion, model: Any, batch: Any) -> Tensor:
        """What ranks the weights: the contrastive loss of the head's input, or the training loss."""
        head = next((place for place in self.delta.anatomy.places if place.role == "head"), None)
        labels = class_labels(batch)
        if self.config.criterion == "loss" or head is None or labels is None:
            return loss_of(model, batch)
        seen: list[Tensor] = []
        module = model.get_submodule(head.path)
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            loss = loss_of(model, batch)
        finally:
            handle.remove()
        if not seen or seen[0].dim() != 2:  # a head that reads every token has no feature of the example
            return loss
        self.contrastive = True
        return contrastive_loss(torch.cat([seen[0], seen[0]]), torch.cat([labels, labels]))

    def details(self) -> dict[str, Any]:
        return super().details() | {"gps_batches": self.batches, "gps_contrastive": int(self.contrastive)}


@method(
    "gps",
    family="selective",
    paper="Zhang et al., 2023, arXiv:2312.10136",
    kinds=("linear", "conv1d", "conv2d"),
    tuner=EntriesTuner,
    learning_rate=3e-3,
    tried=(1e-3, 3e-3, 1e-2),
    limits={"compile": "the entries of each adapter are others, so that switching compiles again"},
)
class GPS(Config):
    targets: str = option("all", "which layers, never the output head; the paper: all, with the embedding of patches")
    connections: int = option(1, "K: trained inputs of each output neuron (the paper: 1 to 20)", least=1)
    batches: int = option(200, "batches whose gradients are summed; the paper: one pass over the data", least=1)
    criterion: str = option(
        "contrastive",
        "what ranks the weights: contrastive (the training loss where there are no class labels) or loss",
        choices=("contrastive", "loss"),
    )

    def places(self, anatomy: Any) -> list[Any]:
        return backbone(anatomy, super().places(anatomy))

    def tuner(self, site: Site) -> Tuner:
        return EntriesTuner(site)

    def procedure(self, delta: Delta) -> Procedure:
        return GPSProcedure(delta, self)
