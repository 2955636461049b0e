"""The page stands alone, shows every method, and runs nothing that a record says."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic import a_record, some_records

from deltaworks.compare.report import family_colours, pareto_front, render, write_report
from deltaworks.core.errors import UserError
from deltaworks.store.records import Counts, CurvePoint, Record, Score, Validation

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}\u2028"


class Page(HTMLParser):
    """The page as a browser's parser sees it: tags with attributes, scripts, and text outside scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.cells: list[list[dict[str, str | None]]] = []
        self._in: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append(dict(attrs))
        if tag in ("script", "style"):
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in == ["script"]:
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif not self._in:
            self.text += data

    @property
    def data(self) -> list[dict[str, Any]]:
        (raw,) = [text for attributes, text in self.scripts if attributes.get("id") == "data"]
        found: list[dict[str, Any]] = json.loads(raw)
        return found


def page(records: list[Record]) -> Page:
    return Page(render(records))


@pytest.fixture(scope="module")
def ten() -> Page:
    return page(some_records(10, seeds=2))


def test_the_report_is_made_from_the_records_of_the_folder(tmp_path: Path) -> None:
    for record in some_records(3):
        record.write(tmp_path / "records")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert [found.name for found in tmp_path.iterdir() if found.name != "records"] == ["report.html"]
    first = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == first  # the same records give the same page


def test_no_records_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="records"):
        write_report(tmp_path)
    (tmp_path / "records").mkdir()
    with pytest.raises(UserError, match="holds no record"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("count", [3, 10, 40])
def test_every_method_is_in_the_table_the_plots_and_the_settings(count: int) -> None:
    records = some_records(count)
    found = page(records)
    (data,) = found.data
    assert len(data["points"]) == count
    assert len(found.cells) == count + 1
    for record in records:
        assert record.method in found.text
        assert record.run_id in found.text
    for scatter in data["scatters"]:
        assert len(scatter["rows"]) == len(scatter["costs"]) > 0
        assert set(scatter["front"]) <= set(scatter["rows"])


def test_nothing_is_loaded_from_anywhere(ten: Page) -> None:
    for tag, attributes in ten.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        assert not {"src", "href", "srcset", "action", "background"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    source = render(some_records(3))
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [a["content"] for t, a in ten.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_only_own_scripts_run(ten: Page) -> None:
    (policy,) = [a["content"] for t, a in ten.tags if t == "meta" and "http-equiv" in a]
    runnable = [attributes for attributes, _ in ten.scripts if attributes.get("type") != "application/json"]
    assert len(runnable) == 2
    for attributes in runnable:
        assert f"script-src 'nonce-{attributes['nonce']}';" in str(policy)


def test_hostile_texts_are_shown_and_never_run() -> None:
    records = [
        a_record(
            name=HOSTILE,
            method=HOSTILE,
            family=f"{HOSTILE}/{HOSTILE}",
            paper=HOSTILE,
            message=HOSTILE,
            targets=HOSTILE,
            optimizer=HOSTILE,
            config={HOSTILE: HOSTILE},
            details={HOSTILE: [HOSTILE]},
            hardware=HOSTILE,
            versions={HOSTILE: HOSTILE},
            learning_rate_split=HOSTILE,
            peak_memory_includes=HOSTILE,
            model={"id": HOSTILE, "parameters": 5},
            data={"name": HOSTILE, "digest": HOSTILE, "task": HOSTILE, "labels": [HOSTILE], "sizes": {HOSTILE: 1}},
            test=Score(metric=HOSTILE, score=0.5),
            rank={HOSTILE: {"median": 1, "max": 2}},
            status=status,
            seed=seed,
        )
        for seed, status in enumerate(("finished", "failed"))
    ]
    clean = page([a_record(), a_record(status="failed", message="m", seed=1)])
    found = page(records)
    names = [tag for tag, _ in found.tags]
    assert len(found.scripts) == len(clean.scripts) == 3
    assert "img" not in names
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.text.count("alert(1)") > 10
    assert "{{ 7*7 }}" in found.text
    (data,) = found.data
    for text in (data["points"][0]["label"], data["points"][0]["hover"], data["measure"]):
        # plotly reads a markup language of its own: only the breaks and emphases made here may be in it
        assert re.sub(r"</?(b|i|br)>", "", text).count("<") == 0


def test_cells_sort_by_numbers_and_missing_values_are_empty() -> None:
    found = page(some_records(10))
    header, *rows = found.cells
    assert [cell.get("aria-sort") for cell in header] == [None, "descending", *[None] * (len(header) - 2)]
    for row in rows:
        assert len(row) == len(header)
        for cell in row[1:]:
            key = cell["data-sort"]
            assert key is not None
            if key:
                float(key)
    scores = [row[1]["data-sort"] or "" for row in rows]
    numbers = [float(score) for score in scores if score]
    assert numbers == sorted(numbers, reverse=True)
    assert scores[len(numbers) :] == [""] * (len(scores) - len(numbers))
    assert "" in scores  # the run that diverged


def test_runs_that_only_diverged_are_a_page_too() -> None:
    records = [
        a_record(
            name=name, method=name, status="diverged", message="NaN", test=None, validation={}, curve=[],
            peak_memory_bytes=None, wall_seconds=None, inference_samples_per_second=None,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    found = page(records)
    assert "No run finished with a score" in found.text
    (data,) = found.data
    assert data["scatters"] == []
    assert "Runs that did not finish" in found.text


def test_a_single_run_and_identical_scores_are_pages() -> None:
    assert "no other method" in page([a_record()]).text
    same = [a_record(name=name, method=name, test=Score(score=0.5, correct="10" * 50)) for name in "abc"]
    found = page(same)
    assert "none of the 3 methods can be told apart" in found.text
    assert all(len(scatter["front"]) == 1 for scatter in found.data[0]["scatters"])


def test_a_head_without_parameters_is_a_line_in_the_plot_of_sizes() -> None:
    head = a_record(
        name="Head", method="head", family="baseline", counts=Counts(trainable=0, changed=0, stored_bytes=9)
    )
    (data,) = page([head, a_record()]).data
    size, memory, *_ = data["scatters"]
    (row,) = size["unplaced"]
    assert data["points"][row]["label"] == "Head"
    assert row not in size["rows"]
    assert row in memory["rows"]


def test_several_models_are_several_sections() -> None:
    other = a_record(model={"id": "another", "parameters": 10})
    found = page([a_record(), other])
    assert len(found.data) == 2
    assert "comparison 1 of 2" in found.text


def test_the_pareto_front_by_hand() -> None:
    assert pareto_front([1, 2, 3, 4], [0.5, 0.7, 0.6, 0.9]) == [0, 1, 3]
    assert pareto_front([1, 1, 1], [0.5, 0.5, 0.4]) == [0]
    assert pareto_front([3, 2, 1], [1, 2, 3]) == [2]
    assert pareto_front([], []) == []


def test_families_keep_their_colour_whoever_else_is_there() -> None:
    few = family_colours(["additive/prompts", "selective/by-type"])
    many = family_colours(
        ["additive/adapters", "additive/prompts", "selective/by-type", "mixture/x", "new/y", "baseline"]
    )
    for family in few:
        assert few[family][:2] == many[family][:2]
    assert (
        len({many[family][1] for family in ("additive/prompts", "selective/by-type", "mixture/x", "new/y", "baseline")})
        == 5
    )
    assert many["additive/adapters"][2] != many["additive/prompts"][2]
    # where all share the top of the path, the level below takes the colours
    low_rank = family_colours(["reparametrized/low-rank", "reparametrized/orthogonal"])
    assert len({colour for _, colour, _ in low_rank.values()}) == 2


def test_long_curves_are_thinned_to_what_a_screen_shows() -> None:
    curve = [CurvePoint(step=step, loss=1.0 / (step + 1)) for step in range(10_000)]
    (data,) = page([a_record(curve=curve)]).data
    steps, losses = data["points"][0]["curve"]["loss"]
    assert len(steps) == len(losses) <= 240
    assert steps[-1] == 9999


def test_a_finished_run_without_a_score_is_shown_as_lost() -> None:
    page = render([a_record(test=None, validation=Validation(last=None, best=None))])
    assert "no message was left" in page
