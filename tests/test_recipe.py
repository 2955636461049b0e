"""Recipes: flat, checked, and wrong ones named with the nearest right one."""

from pathlib import Path
from typing import Any

import pytest

from deltaworks.core.errors import UserError
from deltaworks.core.registry import configure, find
from deltaworks.train.recipe import Recipe, parse_overrides, parse_recipe, read_recipe


def test_a_file_with_words_in_place_of_its_values(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: minilm\nsteps: 10\nrates: [1e-3, 3e-3]\ncolumns: {text: title}\n")
    recipe = read_recipe(path, ["steps=20", "method=lora[rank=4]", "rates=1e-4", "bfloat16=true"])
    assert (recipe.steps, recipe.method, recipe.rates, recipe.bfloat16) == (20, "lora[rank=4]", [1e-4], True)
    assert recipe.columns == {"text": "title"}


def test_words_read_lists_pairs_and_plain_numbers() -> None:
    recipe = parse_recipe(parse_overrides(["rates=1e-3,3e-3", "columns=text=a,label=b", "factors=2"]))
    assert recipe.rates == [1e-3, 3e-3]
    assert recipe.columns == {"text": "a", "label": "b"}
    assert recipe.factors == [2.0]


def test_the_rates_of_the_search_follow_the_method() -> None:
    own = find("lora").learning_rate
    recipe = parse_recipe({"method": "lora", "factors": [3, 0.5, 1]})
    assert recipe.tried_rates(recipe.config()) == [0.5 * own, own, 3 * own]
    wider = parse_recipe({"method": "lora", "tried": True, "factors": [2]})
    assert wider.tried_rates(wider.config()) == [2 * rate for rate in sorted({own, *recipe.config().tried})]
    assert parse_recipe({"rates": [1, 2, 2]}).tried_rates(configure("lora")) == [1, 2]
    head = configure("head")
    assert parse_recipe({"head_rate": 0.5}).tried_rates(head) == [0.5]
    assert Recipe().tried_rates(head) == [head.learning_rate]
    both = configure("lora+bitfit")
    lower = min(own, find("bitfit").learning_rate)
    assert Recipe().tried_rates(both) == [lower]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batchsize": 8}, "no key 'batchsize': did you mean 'batch_size'"),
        ({"learning_rate": 1}, "no key 'learning_rate'"),
        ({"steps": 0}, r"steps: .*greater than or equal to 1.*given: 0"),
        ({"rates": [-1]}, "rates.0"),
        ({"rates": []}, "give at least one rate"),
        ({"rates": ["fast"]}, "rates.0: .*number.*'fast'"),
        ({"rates": [float("nan")]}, "rates.0"),
        ({"steps": 5, "epochs": 1}, "steps and epochs both"),
        ({"dtype": "int8"}, "dtype: .*'float32'"),
        ({"columns": "text"}, "write it as text=title"),
        ({"validation": 1.0}, "validation: .*less than 1"),
        ({"seed": "one"}, "seed"),
    ],
)
def test_a_wrong_value_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse_recipe(values)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [minilm\nsteps: 5", "is not YAML in line 2"),
        ("- minilm\n", "must hold lines such as"),
        ("stepz: 5\n", "did you mean 'steps'"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        read_recipe(path)
    assert "recipe.yaml" in str(caught.value)


def test_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: no such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_recipe(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match="write it as key=value"):
        parse_overrides(["steps"])


def test_every_key_is_described_or_plain() -> None:
    plain = {"batch_size", "weight_decay"}
    for name, field in Recipe.model_fields.items():
        assert field.description or name in plain, name
