"""Advice: every rule fires where it should, what is advised fits, and what would change the answer does change it."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from estimates import SIZES, estimate
from small_data import write_letters
from synthetic import a_record, some_records

from deltaworks import cli
from deltaworks.advise.advice import Advice, Adviser, Option
from deltaworks.advise.candidates import candidates, composed
from deltaworks.advise.evidence import base_of, findings, read_own, stands_up
from deltaworks.advise.rules import Book, Effect, holds, names_in, rule_book
from deltaworks.advise.show import as_data, lines, recipe_of, write_recipe
from deltaworks.advise.standing import standings
from deltaworks.advise.wishes import parse_wishes
from deltaworks.core.errors import UserError
from deltaworks.core.registry import configure, registry
from deltaworks.store.records import Counts, DataFacts, ModelFacts, Record, Score, read_record
from deltaworks.train.recipe import read_recipe

DATA = DataFacts(name="letters", digest="1", task="classification", sizes={"test": 600})
adviser = Adviser(estimate)


def ask(**wanted: Any) -> Advice:
    return adviser.advise(parse_wishes({"model": "small", "memory": "24GB", **wanted}))


def by_name(advice: Advice) -> dict[str, Option]:
    return {option.method: option for option in advice.options}


def excluded(advice: Advice, rule: str) -> set[str]:
    return {out.method for out in advice.excluded if out.rule == rule}


def points(rule: str, method: str, **wanted: Any) -> int | None:
    """What a rule gives a method in a situation; None where it does not fire for it."""
    pool = standings({})
    wishes = parse_wishes({"model": "small", "memory": "24GB", **wanted})
    adviser._ask(adviser.situation(wishes), wishes, pool)
    (standing,) = (each for each in pool if each.name == method)
    found = [reason.points for reason in standing.reasons if reason.rule == rule]
    return sum(found) if found else None


# ---- conditions


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({}, True),
        ({"trials": 3}, True),
        ({"trials": 4}, False),
        ({"trials": {"at_most": 3}}, True),
        ({"trials": {"below": 3}}, False),
        ({"trials": {"at_least": 3, "below": 4}}, True),
        ({"trials": {"above": 3}}, False),
        ({"task": ["pairs", "causal"]}, True),
        ({"family": "selective*"}, False),
        ({"family": "additive/*"}, True),
        ({"kinds": "keyvalue"}, True),  # one member of a collection is enough
        ({"storage": {"at_most": 1}}, False),  # what is not known passes no test
        ({"not": {"storage": {"at_most": 1}}}, True),
        ({"any": [{"trials": 9}, {"merge": True}]}, True),
        ({"any": [{"trials": 9}, {"merge": False}]}, False),
        ({"trials": 3, "merge": False}, False),
    ],
)
def test_conditions(condition: dict[str, Any], expected: bool) -> None:
    facts = {
        "trials": 3, "task": "causal", "family": "additive/adapters", "kinds": ("sublayer", "keyvalue"),
        "storage": None, "merge": True,
    }  # fmt: skip
    assert holds(condition, facts) is expected


def test_a_condition_on_a_fact_that_nobody_gives_is_an_error() -> None:
    with pytest.raises(KeyError, match="colour"):
        holds({"colour": "red"}, {"trials": 3})


@pytest.mark.parametrize("broken", [{"trials": {"most": 3}}, {"any": [{"trials": {}}]}, {"not": [1]}, [1]])
def test_a_broken_condition_is_refused_when_the_rules_are_read(broken: Any) -> None:
    with pytest.raises(ValueError, match=r"condition|bounds"):
        Effect(when=broken)


# ---- the rules


def test_the_rules_of_the_survey_are_all_there_with_their_sources() -> None:
    rules = {rule.id: rule for rule in rule_book().rules}
    assert set(rules) == {f"R{number}" for number in range(17)} | {"OWN"}
    for rule in rules.values():
        assert rule.title
        assert re.search(r"arXiv:\d{4}\.\d{5}|records", rule.source), rule.id
        assert rule.effects
        assert all(effect.reason for effect in rule.effects), rule.id


def test_rules_ask_for_facts_methods_and_options_that_exist() -> None:
    situation = adviser.situation(parse_wishes({"model": "small"}))
    method = standings({})[0].facts
    for rule in rule_book().rules:
        for effect in rule.effects:
            assert {*names_in(rule.when), *names_in(effect.when)} <= situation.keys(), rule.id
            assert effect.settings.keys() <= situation.keys()
            effect.reason.format_map({**situation, **method, "activation_share": 0.6})
            if effect.methods is None:
                assert not effect.points
                assert not effect.never
                continue
            assert set(names_in(effect.methods)) <= method.keys(), rule.id
            named = [test for name, test in _tests(effect.methods) if name == "name"]
            for name in (name for test in named for name in (test if isinstance(test, list) else [test])):
                configure(name, **effect.options)
            assert any(holds(effect.methods, each.facts) for each in standings({})) or rule.id == "OWN", effect


def _tests(condition: dict[str, Any]) -> list[tuple[str, Any]]:
    parts = [*condition.get("any", []), *([condition["not"]] if "not" in condition else [])]
    own = [(name, test) for name, test in condition.items() if name not in ("any", "not")]
    return own + [found for part in parts for found in _tests(part)]


ROOMY: dict[str, Any] = {"trials": 6, "epochs": 8}
LARGE: dict[str, Any] = {"model": "large", "batch": 1, "length": 64}


@pytest.mark.parametrize(
    ("rule", "method", "fires", "does_not", "given"),
    [
        ("R0", "full", {}, {"memory": "600MB"}, 3),
        ("R0", "full", {}, {"storage": "1MB"}, 3),
        ("R0", "full", {}, {"adapters_served": 2}, 3),
        ("R1", "lora", {**LARGE, "memory": "13GB"}, {**LARGE, "memory": "15GB"}, 1),
        ("R3", "lora", {}, ROOMY, 3),
        ("R3", "houlsby", {"trials": 3, "epochs": 8}, {"trials": 4, "epochs": 4}, 3),
        ("R3", "ist", {}, ROOMY, -1),
        ("R4", "lora", {"merge": True}, {}, 1),
        ("R5", "prompt", {"adapters_served": 2}, {}, -4),
        ("R5", "lora", {"adapters_served": 2}, {}, 2),
        ("R5", "ia3", {"adapters_served": 2}, {}, 2),
        ("R5", "krona", {"adapters_served": 2}, {}, 1),
        ("R6", "lst", {"memory": "300MB", "batch": 64}, {"memory": "24GB", "batch": 64}, 3),
        ("R6", "lora-fa", {"memory": "300MB", "batch": 64}, {"memory": "90MB", "batch": 1, "length": 8}, 2),
        ("R7", "ia3", {"storage": "80kB"}, {"storage": "20MB"}, 3),
        ("R8", "prompt", {"storage": "11kB"}, {"storage": "10kB"}, -4),
        ("R10", "parallel", ROOMY, {}, 1),
        ("R10", "pfeiffer", {**ROOMY, "task": "causal"}, ROOMY, 1),
        ("R11", "ia3", {"examples": 999}, {"examples": 1000}, 2),
        ("R11", "houlsby", {"examples": 999, "task": "causal"}, {"examples": 999}, 1),
        ("R12", "fish", {"memory": "300MB"}, {}, -2),
        ("R16", "full", {}, LARGE, 1),
    ],
)
def test_a_rule_fires_on_its_side_of_the_edge(
    rule: str, method: str, fires: dict[str, Any], does_not: dict[str, Any], given: int
) -> None:
    assert points(rule, method, **fires) == given
    other = points(rule, method, **does_not)
    assert other is None or other != given


def test_few_runs_take_out_what_holds_prompts_and_budgets() -> None:
    for wanted in ({}, {"trials": 9}, {"epochs": 9}):
        assert excluded(ask(**wanted), "R3") == {"prompt", "prefix", "prefix-flat", "mam", "unipelt", "adalora"}
    assert excluded(ask(trials=4, epochs=4), "R3") == set()


def test_what_cannot_be_merged_is_out_where_merging_is_needed() -> None:
    cannot = {each.name for each in candidates() if not each.facts["merges"]}
    assert {"houlsby", "prefix", "lst"} <= cannot
    advice = ask(merge=True)
    assert excluded(advice, "R4") == cannot
    assert not {option.method for option in advice.options} & cannot
    reason = next(out.reason for out in advice.excluded if out.method == "houlsby")
    assert reason == "it cannot be merged: Bottleneck computes something that no single weight can hold"


def test_every_registered_method_is_a_candidate_by_its_family_and_abilities() -> None:
    facts = {each.name: each.facts for each in candidates()}
    assert facts.keys() == registry().keys()
    assert facts["lora"]["form"] == 1
    assert facts["unipelt"]["kinds"].count("keyvalue") == 1
    assert facts["ist"]["over_time"]
    assert not facts["lora"]["over_time"]
    both = composed("houlsby+lora").facts
    assert (both["merges"], both["rows"], both["form"]) == (False, facts["houlsby"]["rows"], 3)


def test_few_examples_are_given_more_epochs_unless_the_user_says() -> None:
    assert ask(examples=999).options[0].settings["epochs"] == 10
    assert ask(examples=1000).options[0].settings["epochs"] == 3
    advice = ask(examples=500, epochs=2)
    assert advice.options[0].settings["epochs"] == 2
    assert advice.options[0].steps == math.ceil(500 * 2 / 32)


# ---- the list


def test_the_default_is_lora_on_all_linear_layers() -> None:
    advice = ask(examples=5000, task="classification", trials=3)
    best = advice.options[0]
    assert best.spec == "lora[rank=16]"
    assert best.options["targets"] == "linear"
    assert best.rates == [0.001, 0.003, 0.01]  # those it was tried with, on small models
    assert best.steps == math.ceil(5000 * 3 / 32)
    assert best.seconds == pytest.approx(3 * best.steps * best.step_seconds)
    assert {reason.rule for reason in best.reasons} == {"R2", "R3"}
    assert [option.method for option in advice.options] == ["lora", "houlsby", "full"]
    ranked = [(-option.points, option.peak_bytes) for option in advice.options]
    assert ranked == sorted(ranked)


def test_large_models_get_the_rates_of_large_models() -> None:
    found = by_name(ask(**LARGE, memory="200GB", trials=5))
    assert found["lora"].rates == [0.0001, 0.0003, 0.001, 0.003]
    assert found["full"].rates == [1e-5, 3e-5, 1e-4]
    assert by_name(ask(**LARGE, memory="200GB", trials=1))["lora"].rates == [3e-4]


@pytest.mark.parametrize(
    ("memory", "settings"),
    [
        ("40GB", {"dtype": "float32"}),
        ("20GB", {"dtype": "bfloat16"}),
        ("13GB", {"dtype": "bfloat16", "quantize": "nf4"}),
        ("5.2GB", {"dtype": "bfloat16", "quantize": "nf4", "checkpointing": "block"}),
    ],
)
def test_memory_is_saved_only_as_far_as_it_must(memory: str, settings: dict[str, Any]) -> None:
    best = ask(model="large", batch=1, length=256, memory=memory, task="causal").options[0]
    assert best.method == "lora"
    assert {key: value for key, value in best.settings.items() if key != "epochs"} == settings
    assert best.peak_bytes <= float(memory[:-2]) * 1e9


def test_what_the_user_fixes_stays() -> None:
    fixed = ask(model="large", batch=1, memory="60GB", dtype="bfloat16").options
    assert {option.settings["dtype"] for option in fixed} == {"bfloat16"}
    held = ask(model="large", batch=1, memory="60GB", quantize="nf4").options
    assert {option.settings["quantize"] for option in held} == {"nf4"}


def test_adapters_shrink_until_they_are_within_the_storage() -> None:
    usual = ask().options[0].stored_bytes
    best = ask(storage="3MB").options[0]
    assert best.spec == "lora[rank=2]"
    assert best.stored_bytes <= 3_000_000 < estimate("small", "lora[rank=4]", batch=1, length=1).stored_bytes < usual
    tiny = ask(storage="80kB")
    assert all(option.stored_bytes <= 80_000 for option in tiny.options)
    assert [option.method for option in tiny.options] == ["ia3", "ln"]
    assert "lora" in excluded(tiny, "storage")


def test_rooms_for_a_search_and_no_other_wish_put_full_fine_tuning_first() -> None:
    assert ask(**ROOMY).options[0].method == "full"
    assert ask(**ROOMY, storage="50MB").options[0].method == "lora"


# ---- contradictions


def test_contradicting_wishes_are_named() -> None:
    (served,) = ask(merge=True, adapters_served=200).conflicts
    assert served.startswith("a merged model holds one adapter, so that 200 of them cannot")
    (held,) = ask(merge=True, quantize="nf4").conflicts
    assert "quantized to nf4" in held
    assert ask(merge=True).conflicts == []


def test_methods_that_are_asked_for_against_the_rules_are_named() -> None:
    advice = ask(methods="prompt,full", merge=True, storage="45kB", trials=9, epochs=9)
    assert advice.conflicts == [
        "you ask for prompt, but it cannot be merged: PromptTuner computes something that no single weight can hold "
        "(R4)",
        "you ask for full, but it stores 88.0 MB at the least (storage)",
    ]
    assert [option.method for option in advice.options] == ["ln"]  # all else stores more than 45 kB


def test_methods_that_are_asked_for_are_all_that_is_advised() -> None:
    advice = ask(methods="houlsby,krona*,pfeiffer", trials=9, epochs=9, task="causal")
    assert [option.method for option in advice.options][:2] == ["houlsby", "pfeiffer"]
    assert {option.method for option in advice.options} <= {"houlsby", "pfeiffer", "krona", "krona-b"}
    assert advice.conflicts == []


# ---- what would change it


@pytest.mark.parametrize(
    "wanted",
    [
        {"examples": 5000},
        {"examples": 2000, **ROOMY},
        {"examples": 400, "storage": "1MB", "adapters_served": 50},
        {"model": "large", "batch": 2, "memory": "14GB", "task": "causal"},
    ],
)
def test_changes_change_the_answer_and_nothing_nearer_does(wanted: dict[str, Any]) -> None:
    advice = ask(**wanted)
    assert advice.changes
    for change in advice.changes:
        changed = advice.wishes.model_copy(update={change.wish: change.then})
        answer = adviser.judge(changed, show=1).options[0].answer
        assert change.option is not None
        assert answer == change.option.answer != advice.options[0].answer
        if not isinstance(change.then, bool):
            step = 1 if change.now is None or change.then < change.now else -1
            before = advice.wishes.model_copy(update={change.wish: change.then + step})
            assert adviser.judge(before, show=1).options[0].answer == advice.options[0].answer, change


def test_the_values_that_are_tried_lie_beside_the_bounds_of_the_rules() -> None:
    assert rule_book().bounds("trials") == {3, 4}
    assert rule_book().bounds("examples") == {999, 1000}
    shown = "\n".join(lines(ask(**ROOMY, examples=5000)))
    assert "with 3 trials instead of 6: lora[rank=16]" in shown
    assert "with less than 680 MB of memory: lora[rank=16]" in shown
    assert "with 2 adapters served instead of 1: lora[rank=16]" in shown


# ---- bad input


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"memory": "24"}, "--memory: 24 lacks its unit: write 24GB, MB or kB"),
        ({"memory": "24 parsecs"}, "--memory: '24 parsecs' is no size"),
        ({"storage": "-1MB"}, "--storage: '-1MB' is no size"),
        ({"storage": "0MB"}, "--storage: input should be greater than 0"),
        ({"trials": 0}, "--trials: input should be greater than or equal to 1"),
        ({"epochs": math.inf}, "--epochs: input should be a finite number"),
        ({"adapters_served": 0}, "--adapters-served: "),
        ({"task": "clasification"}, "--task 'clasification' is unknown: did you mean 'classification'"),
        ({"dtype": "float8"}, "--dtype: input should be 'float32', 'bfloat16' or 'float16'"),
        ({"quantize": "nf5"}, "--quantize: input should be 'nf4', 'fp4', 'int8'"),
        ({"methods": "lorra"}, "no method matches 'lorra': did you mean 'lora'"),
        ({"methods": "lora,"}, "--methods 'lora,' has an empty part between commas"),
        ({"colour": "red"}, "there is no wish 'colour'"),
        ({"model": "large", "memory": "3GB"}, "the frozen base alone takes 3.64 GB in nf4, more than the memory of 3"),
        ({"model": "large", "memory": "3640100kB"}, "no method fits in 3.64 GB at 32 rows of 256 tokens"),
        ({"storage": "1kB", "methods": "lora,ia3"}, "no adapter fits in 1.00 kB: give more --storage"),
    ],
)
def test_bad_input_ends_in_one_sentence(wanted: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(**wanted)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_sizes_have_decimal_and_binary_units() -> None:
    sizes = {"24GB": 24 * 10**9, "24GiB": 24 * 2**30, "1.5 MB": 1_500_000, "10kb": 10_000}
    assert {text: parse_wishes({"memory": text}).memory for text in sizes} == sizes


# ---- records


def runs(spec: str, score: float, seeds: int = 3, **changes: Any) -> list[Record]:
    """Runs of one method on the small model: each seed a little other, and 600 answers that agree with the score."""
    return [
        a_record(
            method=spec,
            name="",
            family="",
            seed=seed,
            model=ModelFacts(id="small", parameters=SIZES["small"]),
            data=DATA,
            test=Score(
                score=round(600 * score) / 600, correct="1" * round(600 * score) + "0" * round(600 - 600 * score)
            ),
            **changes,
        )
        for seed in range(seeds)
    ]


def test_own_records_outweigh_the_rules() -> None:
    own = [
        *runs("houlsby[reduction=8]", 0.95, learning_rate=5e-3, peak_memory_bytes=123_000_000),
        *runs("lora[rank=8]", 0.60),
        *[run.model_copy(update={"status": "failed", "test": None, "message": "boom"}) for run in runs("ia3", 0.5)],
    ]
    wishes = {"model": "small", "examples": 1000, "batch": own[0].batch_size}
    best = Adviser(estimate, own).advise(parse_wishes(wishes)).options[0]
    assert best.spec == "houlsby[reduction=8]"  # as it was run
    assert best.rates == [0.0017, 0.005, 0.015]  # around the rate that was chosen
    assert best.measured_peak_bytes == 123_000_000
    batch = own[0].batch_size
    assert best.measured_seconds == pytest.approx(3 * math.ceil(1000 * 3 / batch) * batch / 171.0)
    told = {reason.rule: reason for reason in best.reasons}["OWN"]
    assert (told.points, told.text) == (
        6,
        "in the best group of your own runs: accuracy 95.0 % on letters with small",
    )
    found = findings(own, SIZES["small"], "classification")
    assert {name: (each.record, each.base) for name, each in found.items()} == {
        "houlsby": ("leader", "same"), "lora": ("behind", "same"), "ia3": ("failed", "same"),
    }  # fmt: skip
    assert findings(own, SIZES["small"], "causal") == {}
    larger = parse_wishes({**wishes, "batch": 64})
    assert Adviser(estimate, own).advise(larger).options[0].measured_peak_bytes is None


def test_who_leads_is_asked_among_what_may_be_stored() -> None:
    own = [*runs("full", 0.99), *runs("lora[rank=8]", 0.80), *runs("ia3", 0.60)]
    sizes = {"full": 90_000_000, "lora": 900_000, "ia3": 90_000}
    for run in own:
        run.counts.stored_bytes = sizes[run.method.partition("[")[0]]
    for storage, expected in (
        (None, {"full": "leader", "lora": "behind", "ia3": "behind"}),
        (1e6, {"lora": "leader", "ia3": "behind"}),
        (1e5, {"ia3": "leader"}),
        (1e4, {}),
    ):
        found = findings(own, SIZES["small"], "classification", storage)
        assert {name: each.record for name, each in found.items()} == expected


def test_records_of_another_size_count_less_and_of_another_class_nothing() -> None:
    assert [base_of(size, 22_000_000) for size in (22_400_000, 90_000_000, 100_000_000, 9_000_000, 0)] == [
        "same", "class", None, None, None,
    ]  # fmt: skip
    near = [run.model_copy(update={"model": ModelFacts(id="b", parameters=60_000_000)}) for run in runs("houlsby", 0.9)]
    pool = {
        option.method: option for option in Adviser(estimate, near).judge(parse_wishes({"model": "small"}), 4).options
    }
    assert pool["houlsby"].points == by_name(ask())["houlsby"].points + 3
    assert pool["houlsby"].spec == "houlsby"


def test_a_composition_of_ones_own_may_be_advised() -> None:
    own = [*runs("houlsby+lora[rank=4]", 0.97), *runs("lora", 0.6), *runs("no-such-method", 0.6)]
    best = Adviser(estimate_sum, own).judge(parse_wishes({"model": "small"}), 4).options[0]
    assert best.spec == "houlsby+lora[rank=4]"


def estimate_sum(model: str, method: str, **settings: Any) -> Any:
    return estimate(model, "houlsby" if "+" in method else method, **settings)


def test_records_that_are_not_there_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no records"):
        read_own(tmp_path)
    (tmp_path / "records").mkdir()
    a_record().write(tmp_path / "records")
    assert [run.method for run in read_own(tmp_path)] == ["lora[rank=16]"]
    assert len(read_own(tmp_path / "records")) == 1


# ---- against evidence


def counted(trainable: int) -> dict[str, Any]:
    return {"counts": Counts(trainable=trainable, changed=trainable, stored_bytes=4 * trainable)}


EVIDENCE = [
    *runs("lora[rank=16]", 0.90, **counted(300_000), peak_memory_bytes=500_000_000),
    *runs("houlsby", 0.90, **counted(200_000), peak_memory_bytes=400_000_000),
    *runs("parallel", 0.70, **counted(250_000), peak_memory_bytes=450_000_000),
    *runs("ia3", 0.72, **counted(10_000), peak_memory_bytes=300_000_000),
    *runs("head", 0.40, **counted(0), peak_memory_bytes=100_000_000),
]


def test_advice_is_held_against_records() -> None:
    def verdict(method: str, **limits: Any) -> tuple[bool, bool]:
        (found,) = stands_up(EVIDENCE, method, **limits)
        return found.in_best_group, found.on_front

    assert verdict("houlsby") == (True, True)
    assert verdict("lora") == (True, False)  # as good for more values
    assert verdict("ia3") == (False, True)  # worse for less
    assert verdict("parallel") == (False, False)
    assert verdict("head") == (False, True)
    assert verdict("ia3", memory=350e6) == (True, True)  # the best that keeps the constraint
    assert verdict("houlsby", storage=100_000) == (False, False)  # breaks it
    assert verdict("lora", among=["lora", "ia3"]) == (True, True)
    assert verdict("adalora") == (False, False)  # was not run
    assert stands_up(EVIDENCE, "lora", memory=1e6) == []


def test_advice_stands_up_to_synthetic_runs() -> None:
    """Twenty methods, three seeds: what is advised from these records lies in their best group or on the front."""
    own = [
        run.model_copy(update={"data": DATA, "model": ModelFacts(id="small", parameters=SIZES["small"])})
        for run in some_records(20, seeds=3, trouble=False)
        if run.method.partition("[")[0] in registry() and "+" not in run.method and run.method != "oft[blocks=8]"
        and run.method not in ("lst[reduction=8]", "prefix[length=30]", "houlsby[reduction=16]", "prompt[length=20]")
    ]  # fmt: skip
    for wanted in ({}, {"storage": "1MB"}, {"merge": True}, ROOMY):
        wishes = parse_wishes({"model": "small", "memory": "24GB", **wanted})
        merging = {each.name for each in candidates() if each.facts["merges"]} if wishes.merge else None
        for records in ((), own):
            best = Adviser(estimate, records).judge(wishes, 4).options[0]
            verdicts = stands_up(own, best.method, among=merging, cost="stored")
            assert [verdict.stands for verdict in verdicts] == [True], (wanted, bool(records), verdicts)


# ---- what is shown and written


def test_the_answer_is_short_and_names_rules_and_sources() -> None:
    shown = list(lines(ask(examples=5000, task="classification")))
    assert len(shown) <= 40
    assert max(map(len, shown)) <= 100
    text = "\n".join(shown)
    assert "1  lora[rank=16]\n   412 MB of memory, 21.0 MB stored, 25 s for 3 runs of 469 steps\n" in text
    assert "LoRA on all linear layers stays near full fine-tuning at every size (R2)" in text
    assert "few runs or epochs (R3): prefix, prefix-flat, prompt, mam, unipelt and adalora" in text
    assert "R2: arXiv:2303.15647" in text


def test_json_is_complete() -> None:
    advice = ask(examples=500, merge=True, adapters_served=3)
    told = json.loads(as_data(advice))
    assert told["wishes"]["memory"] == 24_000_000_000
    assert told["facts"]["parameters"] == SIZES["small"]
    assert told["facts"]["storage_share"] is None  # no limit
    assert len(told["options"]) == len(advice.options)
    first = told["options"][0]
    assert (first["spec"], first["options"]["rank"], first["settings"]["epochs"]) == ("lora[rank=16]", 16, 10)
    assert {reason["rule"] for reason in first["reasons"]} >= {"R2", "R4", "R5", "R11"}
    assert all(reason["source"] for reason in first["reasons"])
    assert {out["method"] for out in told["excluded"]} >= {"houlsby", "prefix"}
    assert len(told["conflicts"]) == 1
    assert [note["rule"] for note in told["notes"]] == ["R11", "R14", "R15"]
    assert {change["wish"] for change in told["changes"]} >= {"memory", "storage"}


def test_the_recipe_reads_back_with_what_was_advised(tmp_path: Path) -> None:
    advice = ask(examples=500, task="classification", memory="150MB", data="rows.csv", batch=8, length=64)
    write_recipe(advice, tmp_path / "recipe.yaml")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    best = advice.options[0]
    assert recipe == recipe_of(advice)
    assert (recipe.method, recipe.rates, recipe.epochs) == (best.spec, list(best.rates), 10)
    assert (recipe.data, recipe.task, recipe.batch_size, recipe.max_length) == ("rows.csv", "classification", 8, 64)
    assert (recipe.dtype, recipe.gradient_checkpointing) == (
        best.settings["dtype"],
        best.settings.get("checkpointing", False),
    )
    assert best.settings["dtype"] == "bfloat16"
    assert "(R2)" in (tmp_path / "recipe.yaml").read_text()


def test_a_quantized_base_is_in_the_recipe(tmp_path: Path) -> None:
    write_recipe(ask(model="large", memory="12GB", batch=1), tmp_path / "recipe.yaml")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.method, recipe.quantize, recipe.dtype) == ("lora[rank=16]", "nf4", "bfloat16")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit status, standard output, standard error)."""
    monkeypatch.chdir(Path(__file__).parent)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaworks", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_the_command_advises_and_tune_runs_its_recipe(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaworks.advise import estimate as real

    monkeypatch.setattr(real, "estimate", estimate)
    monkeypatch.setitem(SIZES, "tiny_models:classifier", 100_000)
    recipe, data = tmp_path / "recipe.yaml", write_letters(tmp_path)
    words = ["advise", "--model", "tiny_models:classifier", "--task", "classification", "--examples", 128]
    words += ["--batch", 8, "--length", 16, "--trials", 2, "--data", data, "--write", recipe]
    status, out, err = call(*words)
    assert (status, err) == (0, "")
    assert "1  lora[rank=16]" in out
    assert f"deltaworks tune {recipe}" in out
    status, out, err = call("tune", recipe, "epochs=0.5", "curve_points=1", f"out={tmp_path / 'out'}")
    assert status == 0, err
    record = read_record(tmp_path / "out" / "record.json")
    assert (record.status, record.method) == ("finished", "lora[rank=16]")
    assert [trial.rate for trial in record.learning_rates] == yaml.safe_load(recipe.read_text())["rates"]
    assert len(record.learning_rates) == 2


def test_the_command_says_what_is_wrong(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert call("advise", "--memory", "24") == (
        2,
        "",
        "deltaworks: --memory: 24 lacks its unit: write 24GB, MB or kB\n",
    )
    status, _, err = call("advise", "--records", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "holds no records" in err


@pytest.mark.slow
def test_the_real_estimator_answers(call: Callable[..., tuple[int, str, str]]) -> None:
    words = ["--task", "classification", "--labels", 77, "--examples", 1540, "--memory", "24GB", "--batch", 8]
    status, out, err = call("advise", *words, "--length", 32, "--storage", "1MB", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert told["facts"]["parameters"] == pytest.approx(22.6e6, rel=0.01)
    assert all(option["stored_bytes"] <= 1_000_000 for option in told["options"])
    assert told["options"][0]["method"] == "lora"


def test_the_rules_file_is_read_strictly() -> None:
    with pytest.raises(ValueError, match="extra"):
        Book.model_validate({"savings": [], "rules": [], "conflicts": [], "more": 1})
