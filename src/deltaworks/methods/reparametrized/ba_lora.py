"""BA-LoRA: PiSSA with three losses on the outputs, against what pre-training got wrong.

Paper: BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models,
Chang, Chang and Wu, 2024, arXiv:2408.04556 (ICLR 2026).

Formula: W' = W + s (B A - B0 A0) as in PiSSA, A [r, in], B [out, r]. The loss gains l1 CR + l2 DR + l3 SVDR of the
logits Z [n, D] of the model and Z_pre of the pretrained one, which is the same model without the adapter:
CR = T^2 KL(softmax(Z_pre / T) || softmax(Z / T)), the mean over rows;
DR: for classes 1/D times the sum over i != j of Cov(Z)_ij^2, for words minus the mean entropy of the K likeliest;
SVDR: minus the k largest singular values of Z over the sum of all (classes) or over ||Z||_F (words).
For words l1 falls by a cosine to a tenth, l2 and l3 are 0 in the first fifth of the steps and whole after a quarter.
Count: r (in + out) for each weight.
Departure: the published losses on words read logits and labels at the same position, which takes in the position after
the answer and leaves out the one that predicts its first word; here causal models' labels are shifted.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.calibration import evaluating
from deltaworks.core.errors import UserError
from deltaworks.core.history import History
from deltaworks.core.procedure import Procedure, Run
from deltaworks.core.registry import method, option
from deltaworks.core.sites import is_causal
from deltaworks.methods.reparametrized.lora import LowRank, PiSSATuner
from deltaworks.methods.reparametrized.output_losses import consistency, covariance, negative_entropy, spectrum

LOSSES = ("consistency", "diversity", "spectral")


class OutputLosses(Procedure):
    """Runs the pretrained model on the batch that was just seen and compares."""

    def __init__(self, delta: Any, config: "BALoRA") -> None:
        super().__init__(delta)
        self.config, self.step, self.steps = config, 0, 0
        self.call = delta.watch("", "call", graded=True)
        head = getattr(delta.model, "get_output_embeddings", lambda: None)()
        self.words = head is not None
        several = getattr(getattr(delta.model, "config", None), "is_encoder_decoder", False)
        self.shifted = self.words and not several and is_causal(delta.model)
        self.history = History()  # of CR, DR and SVDR

    def begin(self, run: Run) -> None:
        self.steps = run.steps

    def weights(self, progress: float) -> tuple[float, float, float]:
        """l1, l2, l3 after a share of the steps."""
        config, usual = self.config, (0.025, 0.005, 0.005) if self.words else (0.15, 0.03, 0.03)
        given = (config.consistency, config.diversity, config.spectral)
        l1, l2, l3 = (own if value is None else value for value, own in zip(given, usual, strict=True))
        if not self.words or not config.scheduled:
            return l1, l2, l3
        risen = min(max((progress - 0.2) / 0.05, 0.0), 1.0)
        return l1 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2), l2 * risen, l3 * risen

    def loss(self, loss: Tensor) -> Tensor:
        if not self.steps:
            raise UserError("ba-lora weighs its losses by the step: call procedure.begin(run) before the first one")
        weights, seen = self.weights(self.step / self.steps), self.call.value
        self.call.value = None  # logits are large
        if not any(weights):
            return loss
        if seen is None:
            raise UserError("ba-lora needs the logits of the batch: call the model before procedure.loss")
        terms = self.terms(self.chosen(*seen[1:]), self.teacher(*seen) if weights[0] else None, weights)
        if self.history.due(self.step, self.steps):
            self.history.note(self.step, {name: float(t.detach()) for name, t in zip(LOSSES, terms, strict=True)})
        return loss + sum(weight * term for weight, term in zip(weights, terms, strict=True)).to(loss.device)  # type: ignore[union-attr]

    def terms(self, logits: Tensor, teacher: Tensor | None, weights: tuple[float, ...]) -> list[Tensor]:
        """CR, DR and SVDR of logits [n, D]; 0 where the weight is."""
        config, terms = self.config, [logits.new_zeros(()) for _ in weights]
        if teacher is not None:
            terms[0] = consistency(logits, teacher, config.temperature)
        if weights[1]:
            terms[1] = negative_entropy(logits, config.likeliest) if self.words else covariance(logits)
        if weights[2]:
            leading = config.leading or (10 if self.words else 5)
            terms[2] = spectrum(logits, leading, frobenius=self.words)
        return terms

    def chosen(self, keywords: dict[str, Any], output: Any) -> Tensor:
        """The rows [n, D] of the logits that count, in float32: examples, or the positions with a label."""
        logits, labels = getattr(output, "logits", output), keywords.get("labels")
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            raise UserError(f"ba-lora compares logits, and {type(self.delta.model).__name__} gives none")
        if logits.dim() == 2:
            return logits.float()
        if labels is not None and self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return (logits.flatten(0, 1) if labels is None else logits[labels.to(logits.device) != -100]).float()

    @torch.no_grad()
    def teacher(self, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Tensor:
        """The same rows of the pretrained model, without dropout and in the arithmetic of ``output``."""
        model, logits = self.delta.model, getattr(output, "logits", output)
        narrow = logits.dtype != next(model.parameters()).dtype and logits.dtype in (torch.bfloat16, torch.float16)
        arithmetic = torch.autocast(logits.device.type, logits.dtype) if narrow else nullcontext()
        with evaluating(model), self.delta.disabled(), arithmetic:
            return self.chosen(keywords, model(*arguments, **keywords))

    def stepped(self) -> None:
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "history": self.history.data}

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.history = state["step"], History(state["history"])

    def details(self) -> dict[str, Any]:
        weights = self.weights(self.step / max(1, self.steps))
        return {"ba_lora_loss": self.history.data, "ba_lora_weight": dict(zip(LOSSES, weights, strict=True))}


@method(
    "ba-lora",
    family="reparametrized/low-rank",
    paper="Chang et al., 2024, arXiv:2408.04556",
    kinds=("linear", "conv1d"),
    tuner=PiSSATuner,
    learning_rate=3e-3,
    tried=(3e-4, 1e-3, 3e-3),
    limits={"family:clip": "its losses are on logits of classes or words, which a contrastive model has not"},
)
class BALoRA(LowRank):
    consistency: float | None = option(None, "l1; default: 0.025 for words, 0.15 for classes", least=0)
    diversity: float | None = option(None, "l2; default: 0.005 for words, 0.03 for classes", least=0)
    spectral: float | None = option(None, "l3; default: 0.005 for words, 0.03 for classes", least=0)
    temperature: float = option(2.0, "T of the consistency", least=1e-3)
    likeliest: int = option(20, "K, words whose entropy counts", least=2)
    leading: int | None = option(None, "k, leading singular values; default: 10 for words, 5 for classes", least=1)
    scheduled: bool = option(True, "let the weights of losses on words change over the steps")

    def procedure(self, delta: Any) -> Procedure:
        return OutputLosses(delta, self)
