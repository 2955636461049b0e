"""Numbers over time, as a procedure collects them for the record: few points, however long the run is."""

from collections.abc import Mapping
from typing import Any

POINTS = 40


class History:
    """Numbers by name (of layers, say) at up to ``POINTS`` steps; ``data`` is what record and checkpoint hold."""

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        data = data or {"steps": [], "values": {}}
        self.steps = [int(step) for step in data["steps"]]
        self.values: dict[str, list[float | None]] = {name: list(values) for name, values in data["values"].items()}
        if any(len(values) != len(self.steps) for values in self.values.values()):
            raise ValueError(f"a history of {len(self.steps)} steps needs as many values under each name")

    @property
    def data(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "values": {name: list(values) for name, values in self.values.items()}}

    def due(self, step: int, steps: int) -> bool:
        """Whether ``step`` is one of about 20 of a run of ``steps``; the last one is."""
        return step == steps or step % max(1, steps // 20) == 0

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values at ``step``, once; where there are too many, the point closest to its neighbours goes."""
        if self.steps and step <= self.steps[-1]:
            return
        for name in dict.fromkeys([*self.values, *values]):
            value = values.get(name)
            shown = float(f"{value:.6g}") if isinstance(value, float) else value
            self.values.setdefault(name, [None] * len(self.steps)).append(shown)
        self.steps.append(step)
        if len(self.steps) > POINTS:
            at = min(range(1, POINTS), key=lambda i: self.steps[i + 1] - self.steps[i - 1])
            del self.steps[at]
            for numbers in self.values.values():
                del numbers[at]
