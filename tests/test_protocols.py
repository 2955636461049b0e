"""Protocols: data that are checked, changed by a caller, and made into the runs of each world."""

import re
from pathlib import Path
from typing import Any

import pytest

from deltaworks.compare.protocols import Protocol, find_protocol, shipped, specs_of
from deltaworks.core.errors import UserError
from deltaworks.core.registry import find

YAML = """
help: mine
methods: [head, "lora[rank=4]"]
seeds: [3, 5]
search: first
settings: {epochs: 1, batch_size: 8, factors: [0.5, 1]}
worlds:
  - {model: [minilm, other], data: known, steps: 7}
  - {model: minilm, data: stdlib-docs, methods: bitfit, max_length: 32}
hub: {known: owner/known}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Protocol:
    (tmp_path / "mine.yaml").write_text(YAML)
    return find_protocol(str(tmp_path / "mine.yaml"))


def pairs(protocol: Protocol) -> list[tuple[str, str]]:
    return [(world[0].model, world[0].data) for world in protocol.recipes()]


def test_a_file_of_ones_own_gives_the_runs_of_each_world(mine: Protocol) -> None:
    assert (mine.name, mine.help, mine.workers) == ("mine", "mine", 1)
    first, second, third = mine.recipes()
    assert [(run.method, run.seed) for run in first] == [
        ("head", 3), ("lora[rank=4]", 3), ("head", 5), ("lora[rank=4]", 5),
    ]  # fmt: skip
    assert pairs(mine) == [("minilm", "owner/known"), ("other", "owner/known"), ("minilm", "stdlib-docs")]
    assert (first[0].steps, first[0].epochs) == (7, None)
    assert (third[0].steps, third[0].epochs, third[0].max_length) == (None, 1, 32)
    assert [run.method for run in third] == ["bitfit", "bitfit"]
    assert {run.batch_size for run in (*first, *second, *third)} == {8}


def test_who_searches(mine: Protocol) -> None:
    assert [run.searched_on for run in mine.recipes()[2]] == [None, 3]
    # five methods in the worlds: two rates with the first seed, one training with the other
    assert mine.trainings() == 5 * (2 + 1)
    each = mine.model_copy(update={"search": "each"})
    assert {run.searched_on for world in each.recipes() for run in world} == {None}
    assert each.trainings() == 5 * (2 + 2)
    # one rate is no search to wait for
    assert {run.searched_on for run in mine.changed(settings={"rates": 1e-3}).recipes()[0]} == {None}


def test_named_data_lie_in_the_data_root_or_on_the_hub(mine: Protocol, tmp_path: Path) -> None:
    (tmp_path / "root" / "known").mkdir(parents=True)
    found = mine.changed(data_root=tmp_path / "root", settings={"test": "known"})
    assert pairs(found)[0] == ("minilm", str(tmp_path / "root" / "known"))
    assert found.recipes()[0][0].test == str(tmp_path / "root" / "known")
    assert pairs(found)[2] == ("minilm", "stdlib-docs")
    (tmp_path / "root" / "known").rmdir()
    assert pairs(found)[0] == ("minilm", "owner/known")
    with pytest.raises(UserError, match=r"data root .*'nowhere' is not a folder"):
        mine.changed(data_root=Path("nowhere")).recipes()


def test_a_callers_choices_hold_in_every_world(mine: Protocol) -> None:
    runs = [world[0] for world in mine.changed(settings={"epochs": 2, "max_length": 16}).recipes()]
    assert [(run.steps, run.epochs, run.max_length) for run in runs] == [(None, 2, 16)] * 3
    chosen = mine.changed("ia3,lora", settings={"rates": [1.0]})
    assert [[run.method for run in world] for world in chosen.recipes()] == [["ia3", "lora"] * 2] * 3
    assert chosen.recipes()[0][0].rates == [1.0]
    # other data make the worlds' own settings void, and equal worlds one
    other = mine.changed(settings={"data": "mine.csv"})
    assert pairs(other) == [("minilm", "mine.csv"), ("other", "mine.csv")]
    assert other.recipes()[0][0].epochs == 1
    assert pairs(mine.changed(settings={"model": "m"})) == [("m", "owner/known"), ("m", "stdlib-docs")]
    assert pairs(mine.changed(settings={"model": "m", "data": "d"})) == [("m", "d")]


def test_the_number_of_seeds(mine: Protocol) -> None:
    survey = find_protocol("survey")
    assert survey.seeds == (0, 1, 42)
    assert [mine.changed(seeds=count).seeds for count in (1, 2, 4)] == [(3,), (3, 5), (3, 5, 0, 1)]
    assert survey.changed(seeds=4).seeds == (0, 1, 42, 2)


def test_equal_specs_are_one() -> None:
    methods = ["lora[rank=2]", "lora[rank=2, alpha=2]", "lora[alpha=2,rank=2]"]
    assert len(Protocol(methods=methods).recipes()[0]) == 1  # type: ignore[arg-type]
    assert len(Protocol(methods=methods, seeds=(0, 1)).recipes()[0]) == 2  # type: ignore[arg-type]


def test_methods_are_split_outside_brackets_and_quotes() -> None:
    assert specs_of("lora[rank=4,alpha=8], ia3") == ["lora[rank=4,alpha=8]", "ia3"]
    assert specs_of(["lora[targets='attention.[qv],mlp']", "ia3"]) == ["lora[targets='attention.[qv],mlp']", "ia3"]
    assert "adalora" in specs_of("*lora")
    assert specs_of("") == []


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ({"metods": "lora"}, "protocol .*mine.yaml' has no key 'metods': did you mean 'methods'"),
        ({"methods": "lora", "settings": {"stepz": 1}}, "protocol 'mine' has no key 'stepz': did you mean 'steps'"),
        ({"methods": "lora", "worlds": [{"limt": 1}]}, "no key 'limt': did you mean 'limit'"),
        ({"methods": "lora", "worlds": []}, "worlds: .*at least 1 item"),
        ({"methods": "lora", "worlds": [{"seed": 1}]}, "a comparison sets 'seed' itself"),
        ({"methods": "lorra"}, "did you mean 'lora'"),
        ({"methods": []}, "at least one method"),
        ({"methods": "lora", "seeds": []}, "at least one seed"),
        ({"methods": "lora", "seeds": [-1]}, "seeds.0: .*greater than or equal to 0"),
        ({"methods": "lora", "search": "last"}, "search: .*'each' or 'first'.*given: 'last'"),
        ({"methods": "lora", "workers": 0}, "workers"),
        ({}, "methods: field required"),
    ],
)
def test_a_mistake_is_one_sentence(lines: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(lines))
    with pytest.raises(UserError, match=sentence) as caught:
        find_protocol(str(tmp_path / "mine.yaml")).recipes()
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'surve' is unknown: did you mean 'survey'.*ends in \.yaml"):
        find_protocol("surve")
    with pytest.raises(UserError, match=r"'none\.yaml' cannot be read: no such file"):
        find_protocol("none.yaml")


def sizes(name: str) -> tuple[int, int, int, int]:
    """Worlds, methods of the first world, runs, trainings."""
    worlds = find_protocol(name).recipes()
    methods = {run.method for run in worlds[0]}
    return len(worlds), len(methods), sum(map(len, worlds)), find_protocol(name).trainings()


def test_the_protocols_of_the_package() -> None:
    assert shipped() == ["fair", "peft-bench", "quick", "survey", "survey-small"]
    assert sizes("quick") == (1, 9, 9, 9)
    assert sizes("fair") == (1, 6, 18, 54)
    # 16 methods x (3 rates + 2 seeds) in 12 worlds; 17 methods in 3 worlds; 20 methods in one
    assert sizes("survey") == (12, 16, 576, 960)
    assert sizes("survey-small") == (3, 17, 153, 255)
    assert sizes("peft-bench") == (1, 20, 60, 100)
    families = {find(spec.partition("[")[0]).family.split("/")[0] for spec in find_protocol("quick").methods}
    assert families >= {"baseline", "additive", "reparametrized", "selective"}


@pytest.mark.parametrize("name", ["survey", "survey-small", "peft-bench"])
def test_every_method_tries_equally_many_rates(name: str) -> None:
    runs = [run for world in find_protocol(name).recipes() for run in world]
    assert {len(run.tried_rates(run.config())) for run in runs} == {3}
    said = f"{len(runs)} runs of {find_protocol(name).trainings()} trainings"
    text = (Path(find_protocol.__code__.co_filename).parent / f"{name}.yaml").read_text()
    assert said in text.replace("\n# ", " ")


@pytest.mark.parametrize(
    ("name", "world", "model"),
    [
        ("survey", 0, "t5-large"),
        ("survey-small", 0, "bert-base"),
        ("survey-small", 2, "llama-3.2-3b"),
        ("peft-bench", 0, "llama-3.2-3b"),
    ],
)
def test_the_methods_of_a_protocol_fit_models_of_its_kind(name: str, world: int, model: str) -> None:
    import zoo

    import deltaworks as dw

    base = zoo.real(model)
    counts = []
    for spec in dict.fromkeys(run.method for run in find_protocol(name).recipes()[world]):
        if spec == "head":  # the bare encoder has none
            continue
        delta = dw.attach(base, spec)
        counts.append(sum(parameter.numel() for parameter in delta.parameters()))
        delta.detach()
    assert all(counts)
    if name == "peft-bench":  # the published numbers, where there are any
        assert counts == [
            3_212_749_824, 9_175_040, 18_350_080, 9_289_728, 9_461_760, 3_670_016, 18_353_664, 18_350_080, 2_294_656,
            129_024, 7_340_032, 8_171_520, 802_816, 5_505_024, 56_000, 286_720, 175_104, 2_867_200, 614_400,
            3_212_749_824,
        ]  # fmt: skip
    if name == "survey":  # those that the survey's table has, in its order
        table = [12_687_360, 6_343_680, 50_405_424, 124_928, 2_359_296, 8_650_752, 221_184, 304_192, 152_128, 344_064]
        assert counts[1:11] == table
        assert counts[12:14] == [77_311_488, 4_423_680]
        assert counts[15] == 20_480


def test_the_documented_protocols_are_what_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "protocols.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert {name: (int(runs), int(trainings)) for name, runs, trainings in rows} == {
        name: sizes(name)[2:] for name in shipped()
    }
    example, words = re.findall(r"```yaml.*?\n(.*?)```", page, re.DOTALL)
    (tmp_path / "example.yaml").write_text(example)
    assert pairs(find_protocol(str(tmp_path / "example.yaml"))) == [
        ("minilm", "stdlib-docs"), ("tiny-lm", "stdlib-docs"), ("tiny-lm", "stdlib-text"),
    ]  # fmt: skip
    (tmp_path / "words.yaml").write_text(words + "methods: [lora]\n")
    ((recipe,),) = find_protocol(str(tmp_path / "words.yaml")).recipes()
    assert (recipe.data, recipe.task, recipe.score) == ("google/boolq", "seq2seq", "exact match")
    assert recipe.columns["target"] == "{answer}"
    keys = re.findall(r"^\| `(\w+)` \|.*\|$", page.split("## Keys")[1].split("\n## ")[0], re.MULTILINE)
    assert set(keys) == set(Protocol.model_fields) - {"name"}
