"""The trainable parameters of the survey's head-to-head (arXiv:2303.15647, version 2) on its three T5 models."""

from pathlib import Path
from types import ModuleType

import pytest
import scripts
import zoo

import deltaworks as dw
from deltaworks.advise.evidence import read_own

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

QV = "targets='attention.[qv],cross_attention.[qv]'"
COUNTS = {
    "houlsby[reduction=16]": (12_687_360, 12_687_360, 12_687_360),
    "pfeiffer[reduction=16]": (6_343_680, 6_343_680, 6_343_680),
    "parallel[reduction=2]": (50_405_424, 50_405_424, 50_405_424),
    "ln": (124_928, 124_928, 124_928),
    "compacter[reduction=32]": (304_192, 304_192, 304_192),
    "compacter-plus-plus[reduction=32]": (152_128, 152_128, 152_128),
    f"lora[rank=8, {QV}]": (2_359_296, 5_898_240, 20_054_016),
    "lora[rank=8]": (8_650_752, 25_165_824, 91_226_112),
    f"lokr[rank=8, {QV}]": (221_184, 405_504, 774_144),
    "ia3": (344_064, 1_376_256, 5_505_024),
    "prefix[length=30, width=512]": (77_311_488, 304_246_272, 1_211_985_408),
    "prefix-flat[length=30]": (4_423_680, 17_694_720, 70_778_880),
    "prompt[length=20]": (20_480, 20_480, 20_480),
}


@pytest.mark.parametrize("method", COUNTS)
def test_trainable_parameters_on_t5(method: str) -> None:
    found = []
    for size in ("t5-large", "t5-3b", "t5-11b"):
        delta = dw.attach(zoo.real(size), method)
        found.append(sum(parameter.numel() for parameter in delta.parameters()))
    assert tuple(found) == COUNTS[method]


@pytest.fixture(scope="module")
def survey() -> ModuleType:
    return scripts.loaded(BENCHMARKS / "survey.py")


def test_the_records_of_survey_small_are_whole() -> None:
    records = read_own(BENCHMARKS / "results" / "survey-small")
    worlds = {(record.data.name, record.model.id) for record in records}
    assert len(worlds) == 3
    assert all(record.status == "finished" for record in records)
    seeds: dict[tuple[str, str], set[int]] = {}
    for record in records:
        seeds.setdefault((record.data.name, record.method), set()).add(record.seed)
    assert len(records) == 153
    assert set(map(len, seeds.values())) == {3}


@pytest.mark.slow
def test_advice_stands_where_it_was_run(survey: ModuleType) -> None:
    """The advised method is in the best rank group, or on the Pareto front, of those that keep the constraint."""
    verdicts = [
        verdict
        for answer in survey.answers(read_own(BENCHMARKS / "results" / "survey-small"))
        for verdict in answer.verdicts
    ]
    held = [verdict for verdict in verdicts if verdict.score is not None]
    assert len(held) >= 18
    assert all(verdict.in_best_group or verdict.on_front for verdict in held)
