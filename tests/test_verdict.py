"""Verdicts claim what paired tests carry, and no more."""

from typing import Any

import pytest
from synthetic import a_record, some_records

from deltaworks.compare.standings import compare
from deltaworks.compare.verdict import verdict
from deltaworks.compare.wording import join, show_bytes, show_count, show_seconds, show_share
from deltaworks.store.records import Counts, Record, Score


def run(name: str, right: str | None, seed: int = 0, score: float | None = None, **changes: Any) -> Record:
    share = right.count("1") / len(right) if right else score
    return a_record(
        method=changes.pop("method", name.lower()),
        name=name,
        seed=seed,
        test=Score(score=share, correct=right),
        **changes,
    )


# ---------------------------------------------------------------------------------------- told apart


def told_apart(*records: Record) -> bool:
    """Whether the only two methods of the records can be told apart."""
    (found,) = compare(records)
    return found.told_apart(*found.scored)


def entries(*records: Record) -> dict[str, Any]:
    (found,) = compare(records)
    return {entry.label: entry for entry in found.entries}


def test_one_seed_is_judged_by_its_answers() -> None:
    # 5 flips: p = 0.06; 6 flips: p = 0.03
    assert not told_apart(run("A", "1" * 95 + "0" * 5), run("B", "1" * 90 + "0" * 10))
    assert told_apart(run("A", "1" * 96 + "0" * 4), run("B", "1" * 90 + "0" * 10))


def test_one_seed_without_answers_tells_nothing_apart() -> None:
    records = [run("A", None, score=0.99), run("B", None, score=0.10)]
    assert not told_apart(*records)
    assert entries(*records)["A"].interval is None
    assert "no difference can be called clear" in " ".join(verdict(records))


def test_seeds_are_paired() -> None:
    base = (0.80, 0.90, 0.70)  # the seeds differ far more than the methods
    records = [run("A", None, seed, score + 0.02 + seed * 1e-4) for seed, score in enumerate(base)]
    records += [run("B", None, seed, score) for seed, score in enumerate(base)]
    assert told_apart(*records)
    low, high = entries(*records)["A"].interval
    assert low < 0.7 < 0.9 < high


def test_equal_differences_for_all_seeds_are_no_evidence() -> None:
    records = [run("A", None, seed, 0.9) for seed in (0, 1)] + [run("B", None, seed, 0.8) for seed in (0, 1)]
    assert not told_apart(*records)
    assert entries(*records)["A"].interval is None


def test_few_test_examples_hold_back_what_seeds_alone_would_claim() -> None:
    records = []
    for seed, (first, second) in enumerate([("1110", "1100"), ("1111", "1100"), ("1110", "1000")]):
        records += [run("A", first, seed), run("B", second, seed)]
    assert not told_apart(*records)


def test_a_score_that_is_not_the_mean_of_the_answers_is_not_judged_by_them() -> None:
    as_f1 = [run("A", "1" * 200), run("B", "0" * 200)]
    for record, score in zip(as_f1, (0.9, 0.3), strict=True):
        assert record.test is not None
        record.test.metric, record.test.score = "macro_f1", score
    assert not told_apart(*as_f1)


def token_run(name: str, values: list[float], weights: list[float], seed: int = 0) -> Record:
    score = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    test = Score(metric="token accuracy", score=score, values=values, weights=weights)
    return a_record(method=name.lower(), name=name, seed=seed, test=test)


def test_tokens_count_with_the_length_of_their_example() -> None:
    better = [0.6 + 0.01 * (index % 7) for index in range(60)]
    worse = [value - 0.05 - 0.01 * (index % 3) for index, value in enumerate(better)]
    lengths = [10.0 + index % 9 for index in range(60)]
    assert told_apart(token_run("A", better, lengths), token_run("B", worse, lengths))
    assert verdict([token_run("A", better, lengths)])[0].startswith("A reaches 62.9 % test token accuracy")
    # nearly all tokens lie in one example: the same values hardly say anything
    lengths = [1.0] * 59 + [5000.0]
    assert not told_apart(token_run("A", better, lengths), token_run("B", [*worse[:-1], better[-1]], lengths))
    # another test split with other lengths cannot be paired
    assert not told_apart(token_run("A", better, [1.0] * 60), token_run("B", worse, [2.0, *[1.0] * 59]))


def test_a_rank_is_one_more_than_the_number_of_methods_that_are_clearly_better() -> None:
    def marks(right: int) -> str:
        return "1" * right + "0" * (400 - right)

    records = [run(name, marks(right)) for name, right in (("A", 380), ("B", 378), ("C", 340), ("D", 336), ("E", 90))]
    (found,) = compare(records)
    assert [(entry.label, found.rank(entry)) for entry in found.entries] == [
        ("A", 1), ("B", 1), ("C", 3), ("D", 3), ("E", 5),
    ]  # fmt: skip
    assert [entry.label for entry in found.leaders] == ["A", "B"]
    lost = compare([*records, run("F", None, status="failed")])[0]
    assert lost.rank(lost.entries[-1]) is None


def test_many_methods_need_a_larger_difference() -> None:
    best, other = "1" * 98 + "0" * 2, "1" * 90 + "0" * 10  # 8 flips: p = 0.008, one of 15 pairs: 0.117
    assert told_apart(run("A", best), run("B", other))
    crowd = compare([run("A", best), *(run(name, other) for name in "BCDEF")])[0]
    assert len(crowd.leaders) == 6


def test_the_interval_never_vanishes_where_test_examples_are_few() -> None:
    found = entries(*(run("A", "1" * 9 + "0", seed) for seed in range(3)))
    low, high = found["A"].interval
    assert low < 0.65
    assert high > 0.97


# ---------------------------------------------------------------------------------------- aggregation


def test_a_rerun_replaces_its_seed_and_settings_are_kept_apart() -> None:
    old = run("A", None, score=0.5, run_id="old", finished="2026-01-01T00:00:00Z")
    new = run("A", None, score=0.7, run_id="new", finished="2026-02-01T00:00:00Z")
    found = entries(old, new)
    assert found["A"].scores == [0.7]
    ranks = entries(run("A", "10", method="a[rank=4]"), run("A", "11", method="a[rank=8]"))
    assert set(ranks) == {"A [rank=4]", "A [rank=8]"}
    twins = entries(run("A", "10", config={"x": 1}), run("A", "11", config={"x": 2}))
    assert len(twins) == 2


def test_models_and_data_are_never_mixed() -> None:
    other = run("A", "1111")
    other.data.digest = "another"
    assert len(compare([run("A", "1110"), other])) == 2
    assert all(sentence.startswith("Banking77 with") for sentence in verdict([run("A", "1110"), other]))


def test_lower_is_better_where_the_metric_says_so() -> None:
    records = [
        a_record(method=name, name=name, test=Score(metric="perplexity", score=score, higher_is_better=False))
        for name, score in (("A", 20.0), ("B", 12.0))
    ]
    (found,) = compare(records)
    assert [entry.label for entry in found.entries] == ["B", "A"]
    assert verdict(records)[0].startswith("Of the methods B has the lowest score, 12 test perplexity")


def test_without_test_scores_the_validation_scores_are_used_and_said() -> None:
    records = [a_record(test=None, name="A", method="a"), a_record(test=None, name="B", method="b")]
    sentences = " ".join(verdict(records))
    assert "validation" in sentences
    assert "No run has a test score" in sentences


# ------------------------------------------------------------------------------------------- sentences


def test_a_clear_leader_is_called_one() -> None:
    sentences = verdict([run("A", "1" * 95 + "0" * 5), run("B", "1" * 60 + "0" * 40)])
    assert sentences[0] == "A leads with 95.0 % test accuracy, 35.0 points ahead of B."


def test_the_group_its_cheapest_and_the_baselines() -> None:
    def counts(trainable: int) -> Counts:
        return Counts(trainable=trainable, changed=0, stored_bytes=10)

    records = [
        run("Big", "1" * 95 + "0" * 5, counts=counts(1_000_000), training_samples_per_second=50.0),
        run("Small", "1" * 94 + "0" * 6, counts=counts(1_000), peak_memory_bytes=10**9),
        run("Poor", "1" * 50 + "0" * 50, counts=counts(10)),
        run("Full fine-tuning", "1" * 96 + "0" * 4, method="full"),
        run("Head only", "1" * 70 + "0" * 30, method="head", counts=counts(0)),
    ]
    lead, cheapest, full, head, *_ = verdict(records)
    assert lead == (
        "Of the methods Big has the highest score, 95.0 % test accuracy, but Small cannot be told apart from it; "
        "1 method clearly trails."
    )
    assert "Small is the smallest (1.00 K trainable parameters, 0.0044 % of the model)" in cheapest
    assert "Poor" not in cheapest
    assert full == "Full fine-tuning reaches 96.0 % and cannot be told apart from Big."
    assert head == "Training only the head reaches 70.0 %, so Big gains 25.0 points over a frozen model."


def test_equal_costs_are_not_praised() -> None:
    text = " ".join(verdict([run("A", "1110"), run("B", "1100", training_samples_per_second=173.0)]))
    assert not any(word in text for word in ("smallest (", "fastest", "least memory"))


def test_lost_runs_are_counted_by_what_became_of_them() -> None:
    records = [run("A", "1110"), run("B", None, status="diverged"), run("C", None, status="interrupted")]
    assert "2 runs of 3 did not finish: B diverged; C was interrupted." in verdict(records)
    assert verdict([run("B", None, status="failed")])[0].startswith("No run finished with a score")


def test_an_unequal_search_and_unequal_steps_are_said() -> None:
    records = [run("A", "1110"), run("B", "1100", learning_rates=[{"rate": 1e-3}], steps=50)]
    sentences = " ".join(verdict(records))
    assert "number of learning rates tried differs" in sentences
    assert "not alike in steps" in sentences


def test_seeds_that_take_over_the_rate_are_no_smaller_search() -> None:
    tried = [{"rate": rate, "score": 0.5} for rate in (1e-4, 3e-4, 1e-3)]
    records = [
        run(name, "1110", seed, learning_rates=tried[: 1 if seed else 3], searched_on=0 if seed else None)
        for name in "AB"
        for seed in (0, 1, 2)
    ]
    sentences = " ".join(verdict(records))
    assert "3 learning rates were tried per method." in sentences
    assert "differs between runs" not in sentences


@pytest.mark.parametrize(("count", "seeds"), [(0, 1), (1, 1), (3, 1), (10, 3), (40, 1), (40, 2)])
def test_no_superlative_without_its_reservation(count: int, seeds: int) -> None:
    sentences = verdict(some_records(count, seeds))
    assert all(sentence.endswith(".") and "  " not in sentence for sentence in sentences)
    text = " ".join(sentences)
    assert not any(word in text for word in ("proves", "significant", "nan", "None", "best method is"))


def test_numbers_for_people() -> None:
    assert [show_count(n) for n in (0, 812, 999, 18_432, 999_700, 22_713_216)] == [
        "0", "812", "999", "18.4 K", "1.00 M", "22.7 M",
    ]  # fmt: skip
    assert [show_bytes(n) for n in (500, 1_340_000, 1.62e9)] == ["500 B", "1.34 MB", "1.62 GB"]
    assert [show_seconds(s) for s in (0.82, 9.96, 48.4, 59.9, 65, 3599.9, 12000)] == [
        "0.82 s", "10 s", "48 s", "1 min 00 s", "1 min 05 s", "1 h 00 min", "3 h 20 min",
    ]  # fmt: skip
    assert [show_share(*pair) for pair in ((26, 10_000), (1, 10**9), (0, 5), (5, 5), (1, 0))] == [
        "0.26 %", "< 0.001 %", "0 %", "100 %", "",
    ]  # fmt: skip
    assert join(list("abc")) == "a, b and c"
    assert join(list("abcdefgh"), 4) == "a, b, c and 5 more"
