"""The page stands alone, shows every method, and runs nothing that a record says."""

import csv
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic import a_record, some_records

from deltaworks.cli import app
from deltaworks.compare.colours import looks_of
from deltaworks.compare.overview import overview
from deltaworks.compare.pictures import WIDTH, Box, Picture, pictures, short_names, ticks
from deltaworks.compare.report import family_colours, pareto_front, render, write_report
from deltaworks.compare.scalars import ppt, pscp
from deltaworks.compare.sensitivity import sensitivity
from deltaworks.compare.standings import compare
from deltaworks.compare.tables import columns, rank_groups, score_ticks, table
from deltaworks.core.errors import UserError
from deltaworks.store.records import Counts, CurvePoint, Record, Score, Trial, Validation, read_records

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
        return self.embedded("data")

    def embedded(self, name: str) -> list[dict[str, Any]]:
        (raw,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        found: list[dict[str, Any]] = json.loads(raw)
        return found

    @property
    def heads(self) -> list[str]:
        """The headings of the table of results."""
        return [
            str(attributes.get("title"))
            for tag, attributes in self.tags
            if tag == "button" and "data-order" in attributes
        ]


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


def test_the_command_writes_the_page_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for record in some_records(3):
        record.write(tmp_path / "records")
    app(["report", str(tmp_path)], standalone_mode=False)
    assert (tmp_path / "report.html").read_text() == render(read_records(tmp_path / "records"))
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        app(["report", str(tmp_path / "nowhere")], standalone_mode=False)
    assert ended.value.code == 2
    assert "nowhere" in capsys.readouterr().err


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
            details={HOSTILE: [HOSTILE], f"{HOSTILE}_": {HOSTILE: 1}, "h": {"steps": [1], "values": {HOSTILE: [1]}}},
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
    assert len(found.scripts) == len(clean.scripts) == 4
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
    size, stored, *_ = data["scatters"]
    (row,) = size["unplaced"]
    assert data["points"][row]["label"] == "Head"
    assert row not in size["rows"]
    assert row in stored["rows"]


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


# ---- single numbers, ranks and what can be taken away ---------------------------------------------------


def test_ppt_is_that_of_the_paper() -> None:
    pairs = [((0.8566, 0.41e6), 0.8418), ((0.7225, 0.29e6), 0.7136), ((1, 1e7), 0.7401), ((1, 9e7), 0.3679)]
    for given, expected in pairs:
        assert ppt(*given) == pytest.approx(expected, abs=5e-5)
    assert ppt(0.6, 0) == 0.6
    # V-PEFT Bench, mean of the FGVC tasks: score, trainable parameters, the PPT as printed
    for score, trainable, printed in ((0.9072, 0.39e6, 0.89), (0.8478, 0.77e6, 0.82), (0.9178, 0.66e6, 0.90)):
        assert ppt(score, trainable) == pytest.approx(printed, abs=0.011)
    assert ppt(0.9, 1e6) > ppt(0.9, 2e6)
    assert ppt(0.8, 1e6) == pytest.approx(2 * ppt(0.4, 1e6))


def test_pscp_gives_an_8_billion_model_the_constants_of_the_paper() -> None:
    model = 8.03e9
    # trainable parameters, slowdown of inference as TFLOP beside 8.38, memory in GB: LoRA and IA3 of PEFT-Bench
    for score, trainable, more, memory in ((0.801, 14_680_064, 0.0, 27.75), (0.747, 196_608, 0.31, 28.41)):
        expected = score / (1 + trainable / 5e8) / (1 + more / 10) / (1 + memory / 94)
        assert pscp(score, trainable, model, memory * 1e9, 1 + more / 8.38) == pytest.approx(expected, rel=1e-9)
    assert pscp(0.8, 1e4, 1e7, 1e8, 1.0) == pytest.approx(pscp(0.8, 1e6, 1e9, 1e10, 1.0))
    assert pscp(0.8, 1e4, 1e7, 1e8, 0.9) == pscp(0.8, 1e4, 1e7, 1e8, 1.0)  # faster than the base is noise


def test_columns_that_no_record_fills_are_left_out() -> None:
    assert "nats per token" not in " ".join(page([a_record()]).heads)
    told = page([a_record(forgetting=0.25, forgetting_text="WikiText-2")])
    assert "nats per token on WikiText-2" in " ".join(told.heads)
    assert "+0.250" in told.text
    assert "PPT" not in page([a_record(test=Score(metric="perplexity", score=9.0, higher_is_better=False))]).text


def test_methods_of_one_rank_stand_together() -> None:
    def marks(right: int) -> str:
        return "1" * right + "0" * (400 - right)

    def one(name: str, right: int) -> Record:
        return a_record(method=name, name=name, test=Score(score=right / 400, correct=marks(right)))

    (found,) = compare([one("A", 380), one("B", 378), one("C", 340), one("D", 90)])
    groups = rank_groups(table(found, looks_of(found), columns(found)))
    assert [(group.rank, [row.label for row in group.rows]) for group in groups] == [
        (1, ["A", "B"]), (3, ["C"]), (4, ["D"]),
    ]  # fmt: skip
    assert [group.about for group in groups] == [
        "nothing is clearly better", "2 are clearly better", "3 are clearly better",
    ]  # fmt: skip
    places = score_ticks(found)
    assert [text for _, text in places] == ["20 %", "40 %", "60 %", "80 %"]
    (row,) = groups[0].rows[:1]
    assert row.scale is not None
    step = places[3][0] - places[2][0]
    assert row.scale[1] == pytest.approx(places[3][0] + 0.75 * step, abs=0.02)  # 95 %


def test_the_rates_that_were_tried_are_small_pictures_of_one_scale() -> None:
    calm = a_record(name="Calm", method="calm", learning_rates=[Trial(rate=r, score=0.9) for r in (1e-4, 1e-3)])
    calm.learning_rate = 1e-3
    wild = [Trial(rate=1e-4, score=0.5), Trial(rate=1e-3, score=0.8, stopped_at=40), Trial(rate=1e-2, score=None)]
    told = a_record(name="Wild", method="wild", learning_rates=wild, learning_rate=1e-4)
    given = a_record(name="Wild", method="wild", seed=1, searched_on=0, learning_rates=wild[:1], learning_rate=1e-4)
    (found,) = compare([calm, told, given])
    drawn = {label: picture for label, _, picture in sensitivity(found, looks_of(found))}
    assert drawn["Wild"].about == "3 rates from 0.0001 to 0.01: 50 to 80; 1 diverged; chosen 0.0001"
    first, second = drawn["Calm"].boxes
    assert second.width == 2 * first.width, "the chosen rate has the larger mark"
    low, stopped = drawn["Wild"].boxes
    assert stopped.strength < low.strength == 1.0
    assert stopped.tip.endswith("given up at step 40")
    assert "×" in {text for *_, text in drawn["Wild"].texts}

    def middle(box: Box) -> float:
        return box.y + box.height / 2

    assert middle(first) == middle(second) < middle(stopped) < middle(low), "90, 80 and 50 on one scale"
    marks = [[text for _, _, anchor, text in each.texts if anchor == "end"][:3] for each in drawn.values()]
    assert marks[0] == marks[1]


def test_records_and_table_can_be_taken_from_the_page() -> None:
    records = some_records(8, seeds=2)
    (given,) = page(records).embedded("exports")
    assert [Record.model_validate(each) for each in given["records"]] == records
    rows = list(csv.DictReader(io.StringIO(given["csv"])))
    assert len(rows) == 16
    by_id = {record.run_id: record for record in records}
    for row in rows:
        record = by_id[row["run_id"]]
        assert (int(row["seed"]), int(row["stored_bytes"])) == (record.seed, record.counts.stored_bytes)
        lost = record.test is None
        assert (row["test_accuracy"] == "") is lost
        if record.test is not None:
            assert float(row["test_accuracy"]) == record.test.score
            assert float(row["rank_of_change"]) == 15.5  # the median of 16 and 15
            scores = [each["test_accuracy"] for each in rows if each["spec"] == row["spec"]]
            mean = statistics.fmean(float(score) for score in scores if score)
            assert float(row["ppt"]) == pytest.approx(ppt(mean, record.counts.trainable))
            assert 0 < float(row["pscp"]) < mean
    formula = page([a_record(name="=1+1", method="=1+1")]).embedded("exports")[0]["csv"]
    assert "'=1+1" in formula


def test_several_comparisons_begin_with_all_ranks() -> None:
    def one(name: str, right: int, data: str) -> Record:
        test = Score(score=right / 400, correct="1" * right + "0" * (400 - right))
        facts = {"name": data, "digest": data, "task": "text classification"}
        return a_record(method=name.lower(), name=name, test=test, data=facts)

    records = [one("A", 380, "x"), one("B", 300, "x"), one("C", 380, "x"), one("A", 300, "y"), one("B", 390, "y")]
    lines = overview(compare(records))
    assert [(line.label, line.mean_rank) for line in lines] == [("A", 1.5), ("B", 2.0), ("C", 1.0)]
    assert lines[0].places == [(1, "95.0 %"), (2, "75.0 %")]
    assert lines[2].places == [(1, "95.0 %"), None], "C was not run on y, so it does not come first"
    assert "2 comparisons" in page(records).text


def test_the_cost_of_the_whole_is_told() -> None:
    records = [a_record(name=name, method=name, wall_seconds=1800.0) for name in "abc"]
    text = page([*records, a_record(name="d", method="d", status="failed", wall_seconds=60.0)]).text
    assert "1 h 31 min of runs in all" in text
    assert "4 runs, 12 trainings" in text


def test_training_time_leaves_out_trials_and_loading() -> None:
    run = a_record(examples=9600, training_samples_per_second=160.0, wall_seconds=500.0)
    assert "1 min 00 s" in page([run]).text


def test_the_fine_print_says_how_differences_are_judged() -> None:
    one = [a_record(name=name, method=name, test=Score(score=0.5, correct="10" * 50)) for name in "abc"]
    assert "Paired over 100 test examples. McNemar's exact test." in page(one).text
    assert "Holm's correction for 3 comparisons" in page(one).text
    assert "no difference can be called clear" in page([a_record(name=name, method=name) for name in "ab"]).text
    several = page(some_records(4, seeds=3, trouble=False)).text
    assert "600 test examples and 3 seeds" in several
    assert "quasi-F" in several


# ---- what the methods did -------------------------------------------------------------------------------


def drawn(value: Any) -> Picture:
    (found,) = pictures("Ranks", value)
    return found


def test_numbers_by_layer_are_bars_as_long_as_they_are_large() -> None:
    found = drawn({"a.0": 2, "a.1": 8, "a.2": -4, "a.3": None})
    assert found.about == "4 bars: -4 to 8, 6 in all"
    two, eight, below = found.boxes
    assert eight.width == pytest.approx(4 * two.width)
    assert below.width == pytest.approx(2 * two.width)
    assert below.x + below.width == pytest.approx(two.x)  # on the other side of zero
    assert [text for _, _, anchor, text in found.texts if anchor == "end"] == [f"block {index}" for index in range(4)]
    assert (eight.tip, below.tip) == ("a.1: 8", "a.2: -4")


def test_many_numbers_are_a_map_of_part_by_block() -> None:
    values = {
        f"layers.{block}.{part}": 10 * block + at for block in range(12) for at, part in enumerate(("up", "down"))
    }
    found = drawn({"embed": 3} | values)
    assert found.about == f"A map of 3 parts in 12 blocks: 0 to 111, {3 + sum(values.values()):,} in all"
    tips = {box.tip: box for box in found.boxes}
    assert tips["down, block 11: 111"].strength == 1.0
    assert tips["up, block 0: 0"].strength == 0.0
    assert tips["embed, block –: 3"].x < tips["up, block 0: 0"].x < tips["up, block 11: 110"].x
    assert tips["up, block 5: 50"].y < tips["down, block 5: 51"].y


def test_numbers_over_time_are_lines_while_they_are_few() -> None:
    found = drawn({"steps": [10, 20, 40], "values": {"encoder": [4.0, 3.0, 1.0], "decoder": [None, 2.0, 2.0]}})
    assert found.about == "2 lines over steps 10 to 40: at first 4, at last 1 to 2"
    (encoder, _), (_, _), (decoder, dashes), _ = found.lines
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in encoder.split()]
    assert x2 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert y2 - y1 == pytest.approx(2 * (y1 - y0), abs=0.2)
    assert y0 < y1, "four is above three"
    assert len(decoder.split()) == 2, "nothing is drawn where nothing was known"
    assert dashes
    assert {"encoder", "decoder", "10", "40", "step"} <= {text for *_, text in found.texts}


def test_numbers_of_many_layers_over_time_are_a_map() -> None:
    rows = {f"layers.{index}": [12, 12, index] for index in range(10)}
    found = drawn({"steps": [1, 2, 3], "values": rows})
    assert found.about == "A map of 10 rows over steps 1 to 3: at first 12, at last 0 to 9"
    cells = {box.tip: box for box in found.boxes}
    assert cells["layers.6, step 3: 6"].strength == pytest.approx(0.1 + 0.9 * 6 / 12)
    same = cells["layers.0, step 1 to 2: 12"]
    assert same.width > 1.9 * cells["layers.0, step 3: 0"].width, "equal neighbours are one cell"


def test_the_layers_of_a_large_model_are_gathered_to_blocks() -> None:
    rows = {f"layers.{block}.{part}": [2.0, at] for block in range(32) for at, part in enumerate("qkvo")}
    over_time, at_the_end = pictures("Ranks", {"steps": [1, 2], "values": rows})
    assert over_time.about.startswith("A map of 128 rows")
    assert "layers.31 (mean), step 2: 1.5" in {box.tip for box in over_time.boxes}
    assert len({box.y for box in over_time.boxes[:-5]}) == 32
    assert at_the_end.title == "Ranks at the end"
    assert len({box.y for box in at_the_end.boxes[:-5]}) == 4
    assert max(box.x + box.width for each in (over_time, at_the_end) for box in each.boxes) <= WIDTH


@pytest.mark.parametrize(
    "value",
    [
        None, True, "text", [], [1, 2], {}, {"a": None}, {"a": "b"}, {"a": [1]}, {"a": 1, "b": {"c": 2}},
        {"steps": [1, 2], "values": {"a": [1]}}, {"steps": [1], "values": {"a": [None]}}, {"steps": [], "values": {}},
        {"steps": 3, "values": {"a": []}}, {"steps": ["x"], "values": {"a": [1]}}, {"steps": [1], "values": [1]},
        {"a": 10**400},
    ],
)  # fmt: skip
def test_what_is_of_no_known_kind_is_left_to_the_fine_print(value: Any) -> None:
    assert pictures("Ranks", value) == []
    assert "What the methods did" not in page([a_record(details={"lora_odd": value})]).text


@pytest.mark.parametrize("many", [1, 5, 300])
def test_extremes_are_drawn_within_the_picture(many: int) -> None:
    for value in (0, -1e-30, 1e299, 7):
        same = {f"n{index}": value for index in range(many)}
        for each in (same, {"steps": [5], "values": {name: [value] for name in same}}):
            found = drawn(each)
            for box in found.boxes:
                assert 0 <= box.x <= box.x + box.width <= WIDTH + 0.1
                assert 0 <= box.y <= box.y + box.height <= found.height
                assert 0 <= box.strength <= 1


def test_every_run_with_details_is_shown_under_its_method() -> None:
    told = {
        "ist_score": {"steps": [1, 2], "values": {"0": [1, 2]}},
        "ist_density_percent": {"a": 5},
        "ist_samples": 1024,
    }
    runs = [a_record(method="lora+ist", name="IST", seed=seed, details=told) for seed in (0, 1)]
    found = page([*runs, a_record()])
    drawings = [
        attributes for tag, attributes in found.tags if tag == "svg" and "seed" in str(attributes["aria-label"])
    ]
    labels = [str(attributes["aria-label"]) for attributes in drawings]
    assert labels[:2] == [
        "IST, seed 0, Score. A line over steps 1 to 2: at first 1, at last 2",
        "IST, seed 0, Density (%). 1 bar: 5, 5 in all",
    ]
    assert [label.split(",")[1] for label in labels] == [" seed 0", " seed 0", " seed 1", " seed 1"]
    assert all(attributes["role"] == "img" for attributes in drawings)
    assert "Samples: 1,024" in found.text
    told_of = [attributes for tag, attributes in found.tags if tag == "details" and attributes["class"] != "seed"]
    opened = [attributes for attributes in told_of if "open" in attributes]
    assert len(opened) == 1, "of several seeds the first one is open"


def test_titles_name_the_method_where_two_tell() -> None:
    told = {"ada_deft_gate": {"a": 1}, "adalora_rank": {"a": 2}, "other": 3}
    text = page([a_record(method="adalora+ada-deft[weight=1]", details=told)]).text
    assert "Ada-deft: gate" in text
    assert "Adalora: rank" in text
    assert "Other: 3" in text


def test_long_names_keep_block_and_end() -> None:
    assert short_names(["a.0.query.w", "a.1.key.w"]) == ["0.query", "1.key"]
    assert short_names(["0.attention.output.dense.weight", "b"])[0] == "0…on.output.dense.weight"
    assert short_names(["a.b"]) == ["a.b"]
    assert short_names(["a.0<1>.w", "a.12<1>.w"]) == ["block 0", "block 12"]


def test_ticks_are_round_and_hold_the_values() -> None:
    assert ticks(0.0, 9.0) == [0, 5, 10]
    assert ticks(31.0, 40.0) == [30, 35, 40]
    assert ticks(5.0, 5.0)[0] <= 5 <= ticks(5.0, 5.0)[-1]


def test_labels_of_a_narrow_range_differ() -> None:
    found = drawn({"steps": [1, 2], "values": {"encoder": [99.87, 99.86]}})
    labels = [text for _, _, anchor, text in found.texts if anchor == "end" and text != "2"]
    assert len(labels) == len(set(labels)) >= 2
    assert labels[0] == "99.860"
