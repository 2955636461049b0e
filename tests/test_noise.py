"""What is called a difference is one: against scipy, by hand, and by simulation over seeds and test examples."""

import time

import numpy as np
import pytest
from scipy import stats

from deltaworks.compare.noise import Examples, Sample, compared, holm, interval, pairwise


def scored(*scores: float) -> Sample:
    return Sample(dict(enumerate(scores)))


def answered(*seeds: str) -> Sample:
    values = np.array([[float(mark) for mark in marks] for marks in seeds])
    count = values.shape[1]
    return Sample(dict(enumerate(values.mean(axis=1))), Examples(values, np.full(count, 1 / count), answers=True))


# ---- against scipy and by hand --------------------------------------------------------------------------


def test_two_methods_by_seeds_alone_are_a_paired_t_test() -> None:
    chance = np.random.default_rng(1)
    for seeds in (2, 3, 5, 8):
        first, second = chance.normal(0.9, 0.01, seeds), chance.normal(0.89, 0.02, seeds)
        found = pairwise([scored(*first), scored(*second)])[0, 1]
        assert found == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)


def test_one_seed_of_answers_is_mcnemars_exact_test() -> None:
    chance = np.random.default_rng(2)
    for size in (10, 200, 3000):
        first, second = chance.random((2, size)) < [[0.8], [0.75]]
        marks = ["".join("01"[int(mark)] for mark in row) for row in (first, second)]
        only = int((first & ~second).sum()), int((~first & second).sum())
        expected = stats.binomtest(only[0], sum(only)).pvalue
        assert pairwise([answered(marks[0]), answered(marks[1])])[0, 1] == pytest.approx(expected, rel=1e-6)
    assert pairwise([answered("1100"), answered("1100")])[0, 1] == 1.0


def test_one_seed_of_values_is_a_paired_t_test_over_the_examples() -> None:
    chance = np.random.default_rng(3)
    first, second = chance.random((2, 50))
    samples = [Sample({0: row.mean()}, Examples(row[None], np.full(50, 0.02))) for row in (first, second)]
    assert pairwise(samples)[0, 1] == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)


def test_intervals_of_one_kind_of_noise_are_wilsons_and_students() -> None:
    expected = stats.binomtest(180, 200).proportion_ci(method="wilson")
    assert interval(answered("1" * 180 + "0" * 20)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    scores = [0.91, 0.93, 0.88]
    expected = stats.ttest_1samp(scores, 0).confidence_interval()
    assert interval(scored(*scores)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert interval(scored(0.9)) is None
    assert interval(scored(0.9, 0.9)) is None


def test_holm_by_hand() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def test_a_method_with_one_seed_borrows_the_noise_of_the_others() -> None:
    others = [scored(0.80, 0.82, 0.81), scored(0.70, 0.71, 0.69)]
    near, far = pairwise([*others, scored(0.815)])[0, 2], pairwise([*others, scored(0.2)])[0, 2]
    assert near > 0.3
    assert far < 0.01


def test_seeds_that_are_not_shared_are_not_paired() -> None:
    first, second = Sample({0: 0.8, 1: 0.9}), Sample({2: 0.81, 3: 0.92})
    assert pairwise([first, second])[0, 1] > 0.5
    shared = Sample({0: 0.801, 1: 0.9012})
    assert pairwise([first, shared])[0, 1] < 0.1


# ---- by simulation --------------------------------------------------------------------------------------


def drawn(
    chance: np.random.Generator,
    methods: int,
    seeds: int,
    examples: int,
    wobble: float | list[float],
    gains: list[float] | None = None,
    threshold: float | None = None,
    luck: float = 0.02,
) -> list[Sample]:
    """Methods that differ by ``gains`` only: hardness of examples, liking of methods for examples, luck of seeds."""
    shape = methods, seeds, examples
    values = chance.normal(0, 0.3, examples) + chance.normal(0, 0.2, (methods, 1, examples))
    values = values + chance.normal(0, 1, (methods, seeds, 1)) * np.reshape(
        np.broadcast_to(wobble, methods), (-1, 1, 1)
    )
    values = values + chance.normal(0, 0.25, shape) + chance.normal(0, luck, (seeds, 1))
    if gains is not None:
        values = values + np.reshape(gains, (-1, 1, 1))
    if threshold is not None:
        values = (values > threshold).astype(float)
    weights = np.full(examples, 1 / examples)
    return [
        Sample(dict(enumerate(rows.mean(axis=1))), Examples(rows, weights, threshold is not None)) for rows in values
    ]


UNEVEN = [0.01, 0.01, 0.01, 0.05, 0.01, 0.02, 0.01, 0.1]


@pytest.mark.parametrize(
    ("methods", "seeds", "wobble", "threshold"),
    [
        (2, 3, 0.08, None),
        (8, 3, 0.02, -0.3),
        (8, 3, 0.08, None),
        (8, 3, UNEVEN, None),
        (8, 5, UNEVEN, -0.3),
        (8, 1, 0.0, -0.3),
    ],
)
def test_methods_that_do_not_differ_are_seldom_told_apart(
    methods: int, seeds: int, wobble: float | list[float], threshold: float | None
) -> None:
    chance, rounds = np.random.default_rng(0), 120
    found = [compared(drawn(chance, methods, seeds, 200, wobble, threshold=threshold)).min() for _ in range(rounds)]
    wrong = sum(p < 0.05 for p in found)
    # more than 12 of 120 at a level of 5 % come in one of a hundred such tests
    assert wrong <= 12, f"{wrong} of {rounds} comparisons claim a difference that is not there"


def test_seeds_alone_or_examples_alone_would_claim_too_much() -> None:
    """What the crossed noise is for: each half of it forgets the other."""
    chance, rounds = np.random.default_rng(4), 300
    wrong = {"both": 0, "seeds": 0, "examples": 0}
    for _ in range(rounds):
        samples = drawn(chance, 2, 8, 100, 0.06)
        values = [sample.examples.values for sample in samples if sample.examples]
        difference = values[0] - values[1]
        wrong["both"] += pairwise(samples)[0, 1] < 0.05
        for name, axis, critical in (("seeds", 1, 2.365), ("examples", 0, 1.984)):  # Student's, 7 and 99 degrees
            means = difference.mean(axis=axis)
            wrong[name] += abs(means.mean()) > critical * means.std(ddof=1) / len(means) ** 0.5
    assert wrong["both"] <= 25
    assert wrong["seeds"] > 25
    assert wrong["examples"] > 40


def test_a_true_difference_is_found_also_beside_a_wild_method() -> None:
    chance, rounds = np.random.default_rng(1), 25
    found = 0.0
    for _ in range(rounds):
        p = compared(drawn(chance, 10, 3, 800, [*[0.01] * 9, 0.1], [0.12, *[0.0] * 9]))
        found += (p[0, 1:9] < 0.05).mean()
    assert found / rounds > 0.85


@pytest.mark.parametrize(("seeds", "threshold"), [(3, None), (3, -0.3), (1, -0.3)])
def test_intervals_cover(seeds: int, threshold: float | None) -> None:
    chance, rounds = np.random.default_rng(2), 300
    wobble, luck = (0.03, 0.02) if seeds > 1 else (0.0, 0.0)
    spread = np.sqrt(0.3**2 + 0.2**2 + wobble**2 + 0.25**2 + luck**2)
    truth = 0.0 if threshold is None else float(stats.norm.sf(threshold / spread))
    inside = 0
    for _ in range(rounds):
        found = interval(drawn(chance, 1, seeds, 200, wobble, threshold=threshold, luck=luck)[0])
        assert found is not None
        inside += found[0] <= truth <= found[1]
    assert inside / rounds >= 0.93


def test_sixty_methods_take_seconds() -> None:
    samples = drawn(np.random.default_rng(3), 60, 3, 1000, 0.01, threshold=-0.3)
    start = time.process_time()
    found = compared(samples)
    assert found.shape == (60, 60)
    assert time.process_time() - start < 5
