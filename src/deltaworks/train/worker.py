"""One run in a process of its own: ``python -m deltaworks.train.worker JOB.json``.

The job is ``{"recipe": ..., "records": FOLDER, "prepared": FILE or null, "adapter": FOLDER or null}``. Progress goes
to standard output as one JSON object per line; whatever libraries print goes to standard error. The record is
written before the last line, so a run that was reported is never lost.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LINES = 0.2


def channel() -> Any:
    """Take standard output for progress alone: what anything else prints there goes to standard error."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return lines


def sparing(tell: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Passes on what a run tells, of its steps no more than a person can follow."""
    last = 0.0

    def told(event: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if event["event"] != "step" or "validation" in event or now - last > SECONDS_BETWEEN_LINES:
            last = now
            tell(event)

    return told


def main(path: str) -> int:
    """Run a job. Returns the exit status: 0 with a record, 2 for a mistake of the user."""
    lines = channel()
    tell = sparing(lambda event: lines.write(json.dumps(event) + "\n"))
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    from deltaworks.core.errors import UserError
    from deltaworks.train.loop import train
    from deltaworks.train.prepared import read_prepared
    from deltaworks.train.recipe import parse_recipe

    try:
        data = read_prepared(job["prepared"]) if job["prepared"] else None
        adapter = Path(job["adapter"]) if job["adapter"] else None
        record = train(parse_recipe(job["recipe"]), data=data, adapter=adapter, tell=tell)
        record.write(job["records"])
    except UserError as error:
        tell({"event": "failed", "message": str(error)})
        return 2
    except BrokenPipeError:  # whoever started this run is gone
        return 1
    tell({"event": "done", "run_id": record.run_id})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
