"""What procedures collect over time stays short, keeps both ends, and survives a checkpoint."""

import json

import pytest

from deltaworks.core.history import POINTS, History


def test_about_twenty_steps_of_any_run_are_due_and_the_last_one_is() -> None:
    history = History()
    assert [step for step in range(1, 8) if history.due(step, 7)] == [1, 2, 3, 4, 5, 6, 7]
    due = [step for step in range(1, 1008) if history.due(step, 1007)]
    assert due[:3] == [50, 100, 150]
    assert due[-2:] == [1000, 1007]


@pytest.mark.parametrize("count", [POINTS, POINTS + 1, 1000, 5003])
def test_it_never_grows_long_and_its_points_stay_spread(count: int) -> None:
    history = History()
    for step in range(count):
        history.note(step, {"a": step, "b": 2 * step})
    assert len(history.steps) == min(count, POINTS)
    assert history.steps[0] == 0
    assert history.steps[-1] == count - 1
    assert history.values == {"a": history.steps, "b": [2 * step for step in history.steps]}
    gaps = [after - before for before, after in zip(history.steps, history.steps[1:], strict=False)]
    assert max(gaps) <= 4 * count / POINTS, "no part of the run is left out"


def test_a_step_counts_once_and_a_late_name_was_unknown_before() -> None:
    history = History()
    history.note(1, {"a": 1})
    history.note(1, {"a": 5})
    history.note(2, {"b": 1 / 3})
    assert history.data == {"steps": [1, 2], "values": {"a": [1, None], "b": [None, 0.333333]}}


def test_it_goes_on_from_json_apart_from_its_copy() -> None:
    history = History()
    history.note(1, {"a": 1})
    again = History(json.loads(json.dumps(history.data)))
    again.note(2, {"a": 2})
    assert history.data == {"steps": [1], "values": {"a": [1]}}
    assert again.data == {"steps": [1, 2], "values": {"a": [1, 2]}}
    with pytest.raises(ValueError, match="2 steps"):
        History({"steps": [1, 2], "values": {"a": [1]}})
