"""Intervals and paired tests: what a difference of two scores may be by chance. No scipy needed."""

import math
import statistics
from collections.abc import Sequence

SIGNIFICANCE = 0.05


def student_tail(t: float, degrees: int) -> float:
    """P(|T| > t) for Student's t with whole ``degrees`` of freedom, by the finite trigonometric sums.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        term *= cosine_squared * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inside = math.sin(angle) * total
    if odd:
        inside = (2.0 / math.pi) * (angle + inside)
    return min(1.0, max(0.0, 1.0 - inside))


def student_quantile(degrees: int, significance: float = SIGNIFICANCE) -> float:
    """The t with P(|T| > t) = ``significance``, by bisection."""
    low, high = 0.0, 1.0
    while student_tail(high, degrees) > significance:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, degrees) > significance else (low, middle)
    return high


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion ``share`` seen in ``total`` examples (Wilson 1927)."""
    z = 1.959963984540054
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two sets of answers to the same questions differ (McNemar 1947)."""
    flips, smaller = only_first + only_second, min(only_first, only_second)
    if flips == 0:
        return 1.0
    # in logarithms, because 0.5 ** flips underflows from 1,075 flips on
    logs = [
        math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
        for k in range(smaller + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired t-test that the mean of ``differences`` is not 0."""
    count = len(differences)
    mean = math.fsum(differences) / count
    spread = statistics.stdev(differences)
    if spread <= 1e-12 * max(map(abs, differences), default=0.0) or spread == 0.0:
        return 1.0 if mean == 0 else 0.0
    return student_tail(mean / (spread / math.sqrt(count)), count - 1)


def welch_p(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p-value that two unpaired samples differ in mean (Welch 1947), degrees rounded down."""
    a, b = statistics.variance(first) / len(first), statistics.variance(second) / len(second)
    gap = statistics.fmean(first) - statistics.fmean(second)
    if a + b == 0:
        return 1.0 if gap == 0 else 0.0
    degrees = (a + b) ** 2 / (a * a / (len(first) - 1) + b * b / (len(second) - 1))
    return student_tail(gap / math.sqrt(a + b), max(1, math.floor(degrees)))
