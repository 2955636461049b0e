"""Numbers and lists as a person reads them."""

import math
from collections.abc import Sequence


def show_count(count: float) -> str:
    """A count such as ``812``, ``14.2 K``, ``3.81 M``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= 0.9995 * size:
            return f"{three_digits(count / size)} {unit}"
    return f"{count:.0f}"


def show_bytes(count: float) -> str:
    """Bytes such as ``812 B``, ``14.2 kB``, ``1.32 GB`` (decimal units)."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * size:
            return f"{three_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def show_seconds(seconds: float) -> str:
    """A duration such as ``0.82 s``, ``48 s``, ``12 min 05 s``, ``3 h 20 min``."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_share(part: float, whole: float) -> str:
    """A share in per cent with two digits that count, such as ``0.26 %``; empty where the whole is 0."""
    if not whole:
        return ""
    share = 100 * part / whole
    if share == 0 or share >= 9.95:
        return f"{share:.0f} %"
    if share < 0.001:
        return "< 0.001 %"
    return f"{share:.{max(1, 1 - math.floor(math.log10(share)))}f} %"


def three_digits(value: float) -> str:
    """A number from 0 to 999 with three digits that count."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def scientific(value: float) -> str:
    """A number such as ``3e-4``, with two digits where they differ from one."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def plural(count: int, noun: str) -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def join(names: Sequence[str], limit: int = 6) -> str:
    """``a, b and c``; beyond ``limit`` names ``a, b, c and 9 more``."""
    shown = list(names)
    if len(shown) > limit:
        shown = [*shown[: limit - 1], f"{len(shown) - limit + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)
