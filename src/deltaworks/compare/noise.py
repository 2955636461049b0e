"""What a difference of two scores may be by chance: over the test examples, and over the seeds.

A claim is about methods, so it must hold for other seeds and for other test examples: both are noise, and they are
crossed (every seed answers the same examples). One seed of right and wrong answers: McNemar's exact test. Otherwise
the difference D of two means is tested as D^2 / (V_seeds + V_examples), the quasi-F of Clark (1973, "The
language-as-fixed-effect fallacy", min F'), with the degrees of freedom of Welch and Satterthwaite. It counts the
noise that seeds and examples share twice, so it errs towards "cannot be told apart".

Few seeds say little about a variance. V_seeds is therefore estimated from the runs of all methods together: the
effect of each seed that all methods share is taken out, and a method's own variance counts where it is larger than
the typical one, which counts where it is not. So methods that seeds move much are judged by their own noise, and a
method whose seeds happen to agree gains nothing by it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIGNIFICANCE = 0.05

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Examples:
    """Scores of single test examples: ``values`` [seeds, examples], ``weights`` [examples] that sum to 1.

    ``answers`` says that the values are 0 or 1, of equal weight.
    """

    values: Array
    weights: Array
    answers: bool = False


@dataclass(frozen=True)
class Sample:
    """What is known of one entry: a score for each seed, and where the records hold them, of each test example."""

    scores: Mapping[int, float]
    examples: Examples | None = None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return math.fsum(self.scores.values()) / len(self.scores)


def interval(sample: Sample) -> tuple[float, float] | None:
    """The 95 % interval of the mean score for other seeds and other examples; None where nothing is known of either.

    The examples' part is Wilson's (1927) for right and wrong answers, else Student's; the seeds' part is Student's.
    The distances of the two to the mean are added in squares (Zou and Donner 2008, MOVER).
    """
    from scipy import stats

    parts: list[tuple[float, float]] = []  # distances from the mean down and up
    mean, seeds = sample.mean, list(sample.scores.values())
    if (found := sample.examples) is not None:
        count = len(found.weights)
        if found.answers:
            z = float(stats.norm.ppf(1 - SIGNIFICANCE / 2))
            centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
            half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + (z / (2 * count)) ** 2)
            parts.append((max(0.0, mean - (centre - half)), max(0.0, centre + half - mean)))
        elif count > 1:
            parts.append((_student(count - 1) * math.sqrt(_covariances([found])[0, 0]),) * 2)
    if len(seeds) > 1 and max(seeds) > min(seeds):  # seeds that all score the same say nothing about noise
        parts.append((_student(len(seeds) - 1) * float(np.std(seeds, ddof=1)) / math.sqrt(len(seeds)),) * 2)
    if not parts:
        return None
    down, up = (math.hypot(*distances) for distances in zip(*parts, strict=True))
    return mean - down, mean + up


def compared(samples: Sequence[Sample]) -> Array:
    """The p-value that each two samples differ, [samples, samples], corrected for the number of pairs (Holm 1979).

    1 where the records hold no evidence. With probability 1 - ``SIGNIFICANCE`` no difference below it is by chance.
    """
    count = len(samples)
    corrected = np.ones((count, count))
    if count > 1:
        upper = np.triu_indices(count, 1)
        corrected[upper] = holm(pairwise(samples)[upper])
    return np.minimum(corrected, corrected.T)


def pairwise(samples: Sequence[Sample]) -> Array:
    """The p-value that each two samples differ, [samples, samples], each pair as if it were the only one."""
    from scipy import stats

    effects, seeds, seed_degrees = _seed_noise(samples)
    difference = np.subtract.outer(effects, effects)
    examples = np.zeros_like(difference)
    example_degrees = np.full_like(difference, math.inf)
    found = {index: sample.examples for index, sample in enumerate(samples) if sample.examples is not None}
    if found:
        count = len(next(iter(found.values())).weights)
        covariances = _covariances(list(found.values()))
        own = np.diag(covariances)
        # a difference of right and wrong answers: half an example flipped each way (Agresti and Min 2005)
        floor = count**-2.0 if all(each.answers for each in found.values()) else 0.0
        grid = np.ix_(list(found), list(found))
        examples[grid] = np.maximum(0.0, own[:, None] + own[None, :] - 2 * covariances) + floor
        example_degrees[grid] = max(1, count - 1)
    total = seeds + examples
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = total**2 / (seeds**2 / seed_degrees + examples**2 / example_degrees)
        p = 2 * stats.t.sf(np.abs(difference) / np.sqrt(total), degrees)
    scale = max((abs(score) for sample in samples for score in sample.scores.values()), default=0.0)
    p = np.where((total > 1e-12 * scale**2) & np.isfinite(p), p, 1.0)
    single = [index for index in found if found[index].answers and len(found[index].values) == 1]
    if single and not seeds.any():
        right = np.stack([found[index].values[0] for index in single])
        only = right @ (1 - right).T  # right where the other is wrong
        flips, smaller = only + only.T, np.minimum(only, only.T)
        p[np.ix_(single, single)] = np.minimum(1.0, 2 * stats.binom.cdf(smaller, flips, 0.5))  # McNemar's exact test
    return np.asarray(p)


def holm(p: Array) -> Array:
    """p-values [n] corrected so that the chance of any false one below a level is at most that level (Holm 1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(1.0, stepped)
    return corrected


def _student(degrees: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(1 - SIGNIFICANCE / 2, degrees))


def _covariances(found: Sequence[Examples]) -> Array:
    """The covariances of mean scores over the draw of the test examples, [found, found]."""
    weights = found[0].weights
    values = np.stack([each.values.mean(axis=0) for each in found])  # [found, examples]
    parts = weights * (values - (values @ weights)[:, None])
    return np.asarray(parts @ parts.T * (len(weights) / max(1, len(weights) - 1)))


def _seed_noise(samples: Sequence[Sample]) -> tuple[Array, Array, Array]:
    """Scores without the effects that all share of a seed [samples]; of their differences the variance and its degrees.

    The scores are fitted as method + seed by least squares; where all have the same seeds, the first are the means.
    """
    methods = np.array([index for index, sample in enumerate(samples) for _ in sample.scores])
    seeds = np.array([seed for sample in samples for seed in sample.scores])
    scores = np.array([score for sample in samples for score in sample.scores.values()])
    count = len(samples)
    # a seed that only one method ran says nothing about what seeds do to all
    shared = [seed for seed in np.unique(seeds) if (seeds == seed).sum() > 1][1:]
    design = np.column_stack([methods[:, None] == np.arange(count), seeds[:, None] == np.array(shared, ndmin=2)])
    design = design.astype(float)
    solve = np.linalg.pinv(design)  # [methods and seeds, runs]
    effects, residuals = solve @ scores, scores - design @ (solve @ scores)
    left = np.clip(1 - np.einsum("ij,ji->i", design, solve), 0, 1)  # 1 - leverage of each run
    degrees = np.bincount(methods, left, count).astype(float)
    squares = np.bincount(methods, residuals**2, count).astype(float)
    if degrees.sum() < 0.5 or squares.sum() <= 1e-24 * np.square(scores).sum():
        return effects[:count], np.zeros((count, count)), np.full((count, count), math.inf)
    variances, own_degrees = _variances(squares, degrees)
    contrasts = solve[:count, None] - solve[None, :count]  # [methods, methods, runs]
    of_method = methods[:, None] == np.arange(count)
    parts = (contrasts**2 @ of_method) * variances  # [methods, methods, methods]
    total = parts.sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        satterthwaite = total**2 / (parts**2 / own_degrees).sum(axis=2)
    return effects[:count], total, np.nan_to_num(np.minimum(satterthwaite, degrees.sum()), nan=math.inf)


def _variances(squares: Array, degrees: Array) -> tuple[Array, Array]:
    """The variance over seeds of each method and its degrees of freedom: the typical one, or more where it is wilder.

    Args:
        squares: Sum of squared residuals of each method.
        degrees: Degrees of freedom of each sum.
    """
    from scipy import stats

    known = degrees > 0.25
    own = np.divide(squares, degrees, out=np.zeros_like(squares), where=known)
    # the smaller of mean and median, so that one wild method does not stand for all
    medians = own[known] * degrees[known] / stats.chi2.median(degrees[known])
    typical = min([squares.sum() / degrees.sum(), *([np.median(medians)] if known.any() else [])])
    excess = np.maximum(0.0, own - typical)
    parts = typical**2 / degrees.sum() + np.divide(excess**2, degrees, out=np.zeros_like(excess), where=known)
    return typical + excess, np.divide((typical + excess) ** 2, parts, out=np.ones_like(parts), where=parts > 0)
