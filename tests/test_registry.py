"""The language of methods: names, brackets, quotes, compositions, and the sentence of every mistake."""

from dataclasses import fields
from typing import Any

import pytest

import deltaworks as dw
from deltaworks.core import registry as module
from deltaworks.core.registry import Composition, Config, as_data, from_data, method, option

QUOTED = 're:layers\\.[0-5]\\..*(q|v)_proj, it\'s + "x=1"'


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods that live in these tests only."""
    dw.registry()
    monkeypatch.setattr(module, "_registry", dict(module._registry))

    @method("toy", family="tests/toys", paper="nobody")
    class Toy(Config):
        rank: int = option(4, "a whole number", least=1)
        alpha: float | None = option(None, "follows the rank")
        size: float = option(0.5, "a number", least=0, most=1)
        flag: bool = option(False, "true or false")
        mode: str = option("slow", "a word", choices=("slow", "fast"))
        text: str = option("", "any text")
        limit: int | None = option(None, "a number or none", most=9)

    @method("toy-two", family="tests/other-toys", paper="nobody")
    class ToyTwo(Config):
        width: int = option(2, "a whole number")


def toy(spec: str = "toy", **options: Any) -> Any:
    return dw.configure(spec, **options)


# ---------------------------------------------------------------------------- reading


def test_options_are_read_in_the_type_of_their_field() -> None:
    config = toy("toy[rank=16, size=1e-1, flag=yes, mode=fast, text=a b, limit=3]")
    assert (config.rank, config.size, config.flag, config.mode) == (16, 0.1, True, "fast")
    assert (config.text, config.limit) == ("a b", 3)
    assert toy("toy[limit=none]").limit is None
    assert toy(" toy [ rank = 2 ] ").rank == 2
    assert toy("toy[]") == toy("toy") == toy()


@pytest.mark.parametrize(
    ("written", "read"), [("true", True), ("True", True), ("1", True), ("no", False), ("false", False), ("0", False)]
)
def test_words_for_true_and_false(written: str, read: bool) -> None:
    assert toy(f"toy[flag={written}]").flag is read


def test_options_as_arguments_go_before_the_brackets() -> None:
    assert toy("toy[rank=2,size=0.1]", rank=3).rank == 3
    assert toy("toy[rank=2,size=0.1]", rank=3).size == 0.1
    assert toy(toy("toy[rank=2]"), rank=5).rank == 5  # type: ignore[arg-type]
    config = toy("toy[rank=2]")
    assert dw.configure(config) is config


def test_alpha_follows_the_rank_until_it_is_given() -> None:
    assert toy(rank=16).alpha == 16
    assert toy("toy[rank=16]", rank=32).alpha == 32
    assert toy(toy(rank=16), rank=32).alpha == 32  # type: ignore[arg-type]
    assert toy(toy(rank=16, alpha=2), rank=32).alpha == 2  # type: ignore[arg-type]
    assert toy("toy[rank=16,alpha=2]", rank=32).alpha == 2
    assert str(toy(rank=16)) == "toy[rank=16]"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("targets=attention.[qv]", "attention.[qv]"),
        ("targets='attention.q,attention.v'", "attention.q,attention.v"),
        ('targets="attention.q,attention.v"', "attention.q,attention.v"),
        ("targets='re:[^]]+'", "re:[^]]+"),
        ("targets='it''s'", "it's"),
        ("targets='a=b+c'", "a=b+c"),
        ("targets=mlp@0-5", "mlp@0-5"),
        ("text='none'", "none"),
        ("text=''", ""),
        ("text=' a '", " a "),
    ],
)
def test_quotes_and_brackets_inside_values(written: str, read: str) -> None:
    key = written.partition("=")[0]
    assert getattr(toy(f"toy[rank=3,{written}]"), key) == read
    assert getattr(toy(f"toy[{written},rank=3]+toy-two").parts()[0], key) == read


def test_compositions() -> None:
    config = toy("toy[rank=2,targets='a+b'] + toy-two[width=7]+toy")
    assert isinstance(config, Composition)
    assert [str(part) for part in config.parts()] == ["toy[targets='a+b', rank=2]", "toy-two[width=7]", "toy"]
    assert str(toy() + toy("toy-two") + toy(rank=3)) == "toy+toy-two+toy[rank=3]"
    assert str(toy() + toy("toy-two+toy")) == "toy+toy-two+toy"
    assert dw.configure(config) is config


# ---------------------------------------------------------------------------- writing and reading again

ROUND_TRIPS = [
    {},
    {"rank": 16},
    {"rank": 16, "alpha": 3.5},
    {"alpha": 1e-7, "size": 0.3},
    {"flag": True, "limit": 0, "mode": "fast"},
    {"text": "none"},
    {"text": " "},
    {"text": "'"},
    {"text": "a]"},
    {"text": QUOTED, "targets": "re:[^]\"']+"},
    {"targets": ["attention.q", "attention.v"]},
]


@pytest.mark.parametrize("options", ROUND_TRIPS, ids=str)
def test_text_and_data_round_trip(options: dict[str, Any]) -> None:
    config = toy(**options)
    assert dw.configure(str(config)) == config
    assert from_data(as_data(config)) == config
    both = config + toy("toy-two[width=9]")
    assert dw.configure(str(both)) == both
    assert from_data(as_data(both)) == both
    assert as_data(both)[1] == {"method": "toy-two", "targets": "linear", "width": 9}


def test_every_method_round_trips() -> None:
    for name, config in dw.registry().items():
        default = config()
        assert str(default) == name
        assert dw.configure(str(default)) == default
        assert from_data(as_data(default)) == default
        for field in fields(config):
            assert field.metadata.get("help"), f"{name}: option {field.name} has no help"


# ---------------------------------------------------------------------------- mistakes

MISTAKES = [
    ("tyo", "method 'tyo' is unknown: did you mean 'toy'"),
    ("TOY", "method 'TOY' is unknown: did you mean 'toy'"),
    ("toy[rnak=2]", "toy has no option 'rnak': did you mean 'rank'?"),
    ("toy[zzz=2]", "toy has no option 'zzz': known: alpha, flag, limit, mode, rank, size, targets, text"),
    ("toy[rank=0]", "toy: option rank=0 must be at least 1"),
    ("toy[limit=10]", "toy: option limit=10 must be at most 9"),
    ("toy[size=1.5]", "toy: option size=1.5 must be between 0 and 1"),
    ("toy[rank=many]", "toy: option rank='many' is not a whole number"),
    ("toy[rank=1.5]", "toy: option rank='1.5' is not a whole number"),
    ("toy[rank=none]", "toy: option rank='none' is not a whole number"),
    ("toy[size=nan]", "toy: option size='nan' is not a number"),
    ("toy[alpha=inf]", "toy: option alpha='inf' is not a number"),
    ("toy[flag=maybe]", "toy: option flag='maybe' is not true or false"),
    ("toy[mode=fsat]", "toy: option mode='fsat' is unknown: did you mean 'fast'"),
    ("toy[rank=2,rank=3]", "option 'rank' of 'toy' is given twice"),
    ("toy[rank]", "option 'rank' of 'toy' has no value: write it as 'rank=16'"),
    ("toy[rank=]", "option 'rank=' of 'toy' has no value: write it as 'rank=16'"),
    ("toy[rank=2", "'toy[rank=2' lacks a closing bracket: write 'lora[rank=16]'"),
    ("toy[rank=2+toy", "'toy[rank=2+toy' lacks a closing bracket"),
    ("toy]", "'toy]' lacks an opening bracket"),
    ("toy[rank=2]]", "'toy[rank=2]]' lacks an opening bracket"),
    ("toy[rank=2]x", "method 'toy[rank=2]x' lacks its closing bracket at the end"),
    ("toy[text='a]", "\"toy[text='a]\" lacks a closing '"),
    ("toy+", "'toy+' has an empty part beside '+'"),
    ("+toy", "'+toy' has an empty part beside '+'"),
    ("toy[rank=2,,size=1]", "'rank=2,,size=1' has an empty part beside ','"),
    ("toy+tyo", "method 'tyo' is unknown"),
    ("", "a method is a name such as 'lora[rank=16]', not ''"),
    ("  ", "a method is a name such as 'lora[rank=16]', not '  '"),
]


@pytest.mark.parametrize(("spec", "sentence"), MISTAKES, ids=[spec for spec, _ in MISTAKES])
def test_mistakes_in_text(spec: str, sentence: str) -> None:
    with pytest.raises(dw.UserError) as error:
        dw.configure(spec)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": True}, "toy: option rank=True is not a whole number"),
        ({"rank": 2.5}, "toy: option rank=2.5 is not a whole number"),
        ({"rank": None}, "toy: option rank needs a value"),
        ({"rank": [1]}, "toy: option rank=[1] is not a whole number"),
        ({"rank": float("inf")}, "toy: option rank=inf is not a whole number"),
        ({"size": 10**400}, "is not a number"),
        ({"text": 3}, "toy: option text=3 is not a text"),
        ({"text": ["a"]}, "toy: option text=['a'] is not a text"),
        ({"flag": 2}, "toy: option flag=2 is not true or false"),
        ({"speed": 3}, "toy has no option 'speed'"),
    ],
)
def test_mistakes_in_arguments(options: dict[str, Any], sentence: str) -> None:
    for change in (lambda: toy(**options), lambda: dw.configure(toy(), **options)):
        with pytest.raises(dw.UserError) as error:
            change()
        assert sentence in str(error.value)


def test_mistakes_around_compositions() -> None:
    both = "'toy+toy-two' is several methods: give options inside the brackets"
    for spec in ("toy+toy-two", toy("toy+toy-two")):
        with pytest.raises(dw.UserError, match="several methods") as error:
            dw.configure(spec, rank=2)
        assert both in str(error.value)
    with pytest.raises(dw.UserError, match="not 3"):
        dw.configure(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "names no method"),
        ([{}], "not a method configuration"),
        ([{"rank": 2}], "not a method configuration"),
        ([{"method": 3}], "not a method configuration"),
        ([{"method": ["toy"]}], "not a method configuration"),
        (["toy"], "not a method configuration"),
        (None, "not a method configuration"),
        ({"method": "toy"}, "not a method configuration"),
        ([{"method": "toy+toy-two"}], "method 'toy+toy-two' is unknown"),
        ([{"method": "toy[rank=2]"}], "method 'toy[rank=2]' is unknown"),
        ([{"method": "toy", "rnak": 2}], "did you mean 'rank'?"),
        ([{"method": "toy", "spec": 2}], "toy has no option 'spec'"),
        ([{"method": "toy", "rank": 0}], "must be at least 1"),
    ],
    ids=str,
)
def test_mistakes_in_data(data: Any, sentence: str) -> None:
    with pytest.raises(dw.UserError) as error:
        from_data(data)
    assert sentence in str(error.value)


# ---------------------------------------------------------------------------- listing


def test_listing_by_wildcards() -> None:
    assert dw.methods("toy") == ["toy"]
    assert sorted(dw.methods("toy*")) == ["toy", "toy-two"]
    assert dw.methods("tests/toys") == dw.methods("toys") == ["toy"]
    assert sorted(dw.methods("tests*")) == ["toy", "toy-two"]
    assert {"lora", "adalora"} <= set(dw.methods("low-rank*"))
    assert set(dw.methods()) == set(dw.registry())
    families = [dw.registry()[name].family for name in dw.methods()]
    assert families == sorted(families)
    with pytest.raises(dw.UserError, match="no method matches 'tyo': did you mean 'toy'"):
        dw.methods("tyo")


def test_configuration_classes_by_name() -> None:
    assert dw.LoRA(rank=3) == dw.configure("lora[rank=3]")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dw.Nothing


def test_two_methods_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two methods are called 'lora'"):

        @method("lora", family="tests", paper="nobody")
        class Other(Config):
            pass
