"""Single numbers that discount a score by its costs. They hide what a Pareto front shows; they are for sorting.

They are defined for scores in [0, 1] of which more is better.
"""

import math

from deltaworks.compare.standings import Comparison, Entry

# what the paper divides by, taken per parameter and per base inference of its 8-billion-parameter model:
# 5e8 trainable parameters, 94 GB of memory, and 10e12 operations beside the model's own 8.38e12
_PSCP_MODEL = 8.03e9
_PSCP_TRAINABLE = 5e8 / _PSCP_MODEL
_PSCP_BYTES = 94e9 / _PSCP_MODEL
_PSCP_INFERENCE = 10 / 8.38


def ppt(score: float, trainable: float) -> float:
    """Performance-efficiency trade-off: score * exp(-log10(trainable / 1e7 + 1)).

    Source: V-PEFT Bench, Xin et al., 2024, arXiv:2402.02242. The head is not counted as trainable.
    """
    return score * math.exp(-math.log10(trainable / 1e7 + 1))


def pscp(score: float, trainable: float, parameters: float, memory_bytes: float, slowdown: float) -> float:
    """Soft cost penalties: score / ((1 + p / C_p) (1 + f / C_f) (1 + m / C_m)).

    Source: PEFT-Bench, Belanec et al., 2025, arXiv:2511.21285, all exponents 1. There p is the number of trainable
    parameters, f the operations that inference takes beside those of the base, m the memory of training, and the
    constants (5e8, 10 TFLOP, 94 GB) are meant for models of 8 billion parameters. The reading here: the constants grow
    and shrink with the model, so that an 8-billion model gets the paper's numbers; f is the measured slowdown.

    Args:
        score: In [0, 1].
        trainable: Values the method trains.
        parameters: Values of the model.
        memory_bytes: Peak of training.
        slowdown: Seconds of inference over those of the base without the method, at least 1.
    """
    penalties = (
        1 + trainable / (_PSCP_TRAINABLE * parameters),
        1 + max(0.0, slowdown - 1) / _PSCP_INFERENCE,
        1 + memory_bytes / (_PSCP_BYTES * parameters),
    )
    return score / math.prod(penalties)


def ppt_of(entry: Entry) -> float | None:
    """PPT of a method; None where its score is no share of 1 of which more is better."""
    if entry.score is None or not (entry.is_proportion and entry.higher_is_better):
        return None
    return ppt(entry.score, entry.any_run.counts.trainable)


def pscp_of(comparison: Comparison, entry: Entry) -> float | None:
    """PSCP of a method, as ``ppt_of``; None, too, where memory or the speeds of inference are not known."""
    memory, speed, base = entry.peak_memory_bytes, entry.inference_samples_per_second, comparison.base_inference_speed
    run = entry.any_run
    if ppt_of(entry) is None or memory is None or not speed or base is None or not run.model.parameters:
        return None
    slowdown = max(1.0, base / speed)
    return pscp(entry.score or 0.0, run.counts.trainable, run.model.parameters, memory, slowdown)
