"""The one exception a user's mistake ends in, and the hint that names the nearest right name."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that names the input and the mend.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint such as ``"did you mean 'lora' or 'loha'?"``, or the known names where nothing is near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "known: " + ", ".join(known) if known else "nothing is known here"
