"""Which column plays which role: given by the user, or guessed from names and values and said so."""

from collections.abc import Iterable
from dataclasses import dataclass
from string import Formatter

from deltaworks.core.errors import UserError, nearest
from deltaworks.train.files import Table

ROLES: dict[str, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "pairs": ("text", "pair", "label"),
    "causal": ("prompt", "target"),  # or ("text",)
    "seq2seq": ("prompt", "target"),
    "images": ("image", "label"),
}
ALL_ROLES = ("text", "pair", "label", "prompt", "target", "image")

TEXT_NAMES = (
    "text", "sentence", "content", "utterance", "question", "query", "tweet", "review", "comment", "message",
    "document", "passage", "body", "description", "abc", "code", "input", "instruction", "intent", "title",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "intent", "category", "class", "sentiment", "topic", "tag", "coarse_label",
    "label_text", "y", "answer", "target", "output", "response",
)  # fmt: skip
# a prompt that is in two columns is written "instruction+input": their texts joined by a line break
PAIR_NAMES = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("text_a", "text_b"), ("question", "passage"), ("question", "sentence"), ("question", "context"),
    ("query", "document"), ("query", "passage"), ("premise+question", "choice1+choice2"),
)  # fmt: skip
TARGET_NAMES = (
    ("instruction+input", "output"), ("instruction+input", "response"), ("instruction", "output"),
    ("instruction+context", "response"), ("instruction", "response"), ("instruction", "answer"),
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "target"), ("prompt", "canonical_solution"),
    ("question", "answer"), ("question", "response"), ("problem", "solution"), ("input", "target"),
    ("input", "output"), ("source", "target"), ("meaning_representation", "human_reference"), ("mr", "ref"),
    ("article", "highlights"), ("document", "summary"), ("text", "summary"), ("dialogue", "summary"),
    ("intent", "code"), ("intent", "snippet"), ("rewritten_intent", "snippet"), ("text", "code"),
)  # fmt: skip
SURE_LABELS = ("label", "labels", "class", "category", "sentiment", "topic")
# names that hold classes in some data sets and free text in others: only few distinct values make a class
OPEN_LABELS = ("answer", "target", "output", "response")
MOST_OPEN_CLASSES = 50
LONGEST_LABEL = 64  # characters of a class name
SAMPLE = 2000  # rows looked at when values help to guess


@dataclass
class Choice:
    """The task, the column of each role (``"a+b"`` joins two, ``"{a} or {b}?"`` fills in), and what was guessed."""

    task: str
    columns: dict[str, str]
    notes: list[str]


def choose_columns(tables: list[Table], task: str | None = None, columns: dict[str, str] | None = None) -> Choice:
    """Settle the task and its columns; guesses go by the columns that all tables share.

    Raises:
        UserError: A role or column does not exist, or nothing fits and the user must say it.
    """
    first = tables[0]
    if task is not None and task not in ROLES:
        raise UserError(f"the task {task!r} is not known; {nearest(task, ROLES)}")
    given = dict(columns or {})
    for role, column in given.items():
        if role not in ALL_ROLES:
            raise UserError(f"{role!r} is not a role of a column; {nearest(role, ALL_ROLES)}")
        check_column(first, column)
    found = _guess(first, first.columns, task, given)
    if found is not None:
        common = [name for name in first.columns if all(name in table.columns for table in tables)]
        # the same task from the columns that all tables share, where the first choice is not in all of them
        shared = _guess(first, common, found[0], given)
        if shared is not None and set(shared[1]) == set(found[1]):
            found = shared
        return _explained(first, found, task, given)
    wanted = f"the task {task!r} needs the columns {' and '.join(ROLES[task])}" if task else "no task fits"
    raise UserError(
        f"{first.source} has the columns {', '.join(map(repr, first.columns))}, of which {wanted}; say which is "
        f"which, for example columns={{'text': {first.columns[0]!r}, 'label': {first.columns[-1]!r}}}"
    )


def check_column(table: Table, column: str) -> None:
    """Raise UserError, with the nearest names, unless the table has the column (see ``parts``)."""
    known = table.columns
    for name in parts(column, known):
        if name not in known:
            raise UserError(f"{table.source} has no column {name!r}; {nearest(name, known)}")


def parts(column: str, known: Iterable[str]) -> list[str]:
    """The columns that a template or ``"a+b"`` joins, or that the first of ``"a|b"`` does that is there."""
    known = set(known)
    if is_template(column, known):
        return [field for _, field, _, _ in Formatter().parse(column) if field is not None]
    options = [[column]] if column in known else [option.split("+") for option in column.split("|")]
    return next((option for option in options if known.issuperset(option)), options[0])


def is_template(column: str, known: Iterable[str]) -> bool:
    """Whether it is a text with columns in braces. Raises UserError where the braces do not match."""
    if column in known or "{" not in column:
        return False
    try:
        fields = [field for _, field, _, _ in Formatter().parse(column) if field is not None]
    except ValueError as error:
        raise UserError(f"the template {column!r} is not one: {error}") from None
    return bool(fields)


def _guess(
    table: Table, names: list[str], task: str | None, given: dict[str, str]
) -> tuple[str, dict[str, str]] | None:
    """The first (task, columns) that has all its roles; more telling tasks are tried first."""
    order = [task] if task else ["images", "pairs", "classification", "causal"]
    for candidate in order:
        found = _guess_roles(table, names, candidate, given)
        if found is not None and set(given) <= set(found):
            return candidate, found
    return None


def _guess_roles(table: Table, names: list[str], task: str, given: dict[str, str]) -> dict[str, str] | None:
    if set(given) == set(ROLES[task]) or (task == "causal" and set(given) == {"text"}):
        return given
    match task:
        case "images":
            image = given.get("image") or next((name for name in names if _is_image(table, name)), None)
            label = given.get("label") or _label(table, names, {image or ""})
            return {"image": image, "label": label} if image and label else None
        case "pairs":
            for first, second in _matching(PAIR_NAMES, names, given, ("text", "pair")):
                label = given.get("label") or _label(table, names, {*first.split("+"), *second.split("+")})
                if label:
                    return {"text": first, "pair": second, "label": label}
            return None
        case "classification":
            # first the label: its values decide, and what is left may be the text
            label = given.get("label") or _label(table, names, {given.get("text", "")})
            text = given.get("text") or _text(table, [name for name in names if name != label])
            return {"text": text, "label": label} if text and label else None
        case _:
            if "text" not in given:
                for prompt, target in _matching(TARGET_NAMES, names, given, ("prompt", "target")):
                    return {"prompt": prompt, "target": target}
            if task == "seq2seq" or {"prompt", "target"} & set(given):
                return None
            text = given.get("text") or _text(table, names)
            return {"text": text} if text else None


def _matching(
    table_of_names: tuple[tuple[str, str], ...], names: list[str], given: dict[str, str], roles: tuple[str, str]
) -> list[tuple[str, str]]:
    """The known pairs of names whose columns exist and agree with what is given."""
    if roles[0] in given and roles[1] in given:
        return [(given[roles[0]], given[roles[1]])]
    lowered = {name.lower(): name for name in names}
    found = []
    for pair in table_of_names:
        if all(part in lowered for column in pair for part in column.split("+")):
            own = tuple("+".join(lowered[part] for part in column.split("+")) for column in pair)
            chosen = (given.get(roles[0], own[0]), given.get(roles[1], own[1]))
            if chosen[0] != chosen[1] and (chosen == own or set(roles) & set(given)):
                found.append(chosen)
    return found


def _label(table: Table, names: list[str], taken: set[str]) -> str | None:
    """The best label column: a name of LABEL_NAMES, one with readable class names before bare numbers."""
    lowered = {name.lower(): name for name in names if name not in taken}
    candidates = [lowered[name] for name in LABEL_NAMES if name in lowered]
    candidates = [name for name in candidates if _is_label(table, name)]
    if not candidates:
        return None
    sure = [name for name in candidates if name.lower() in SURE_LABELS or name.lower() == "intent"] or candidates
    readable = [name for name in sure if isinstance(_values(table, name)[0], str) or name in table.label_names]
    return (readable or sure)[0]


def _is_label(table: Table, name: str) -> bool:
    values = _values(table, name)
    if values and name.lower() in SURE_LABELS:
        return True  # values that are no classes are refused later, at their line
    if not values or not all(isinstance(value, bool | int | str) for value in values):
        return False
    if any(isinstance(value, str) and len(value) > LONGEST_LABEL for value in values):
        return False
    distinct = len(set(values))
    if name.lower() in OPEN_LABELS and (distinct > MOST_OPEN_CLASSES or "instruction" in table.columns):
        return False
    return distinct <= max(2, len(values) // 3)


def _text(table: Table, names: list[str]) -> str | None:
    lowered = {name.lower(): name for name in names}
    for name in TEXT_NAMES:
        if name in lowered and _is_text(table, lowered[name]):
            return lowered[name]
    texts = [name for name in names if _is_text(table, name)]
    return texts[0] if len(texts) == 1 else None


def _is_text(table: Table, name: str) -> bool:
    values = _values(table, name)
    return bool(values) and sum(isinstance(value, str) for value in values) * 2 >= len(values)


def _is_image(table: Table, name: str) -> bool:
    values = _values(table, name)
    return bool(values) and getattr(values[0], "ndim", 0) in (2, 3)


def _values(table: Table, name: str) -> list:
    return [row[name] for row in table.rows[:SAMPLE] if row.get(name) is not None]


def _explained(table: Table, found: tuple[str, dict[str, str]], task: str | None, given: dict[str, str]) -> Choice:
    chosen, columns = found
    notes = [] if task else [f"task guessed: {chosen!r}"]
    if not task and chosen == "causal" and "target" in columns:
        notes[0] += " (for an encoder-decoder model say task='seq2seq')"
    notes += [f"{role} column guessed: {name!r}" for role, name in columns.items() if role not in given]
    used = {part for column in columns.values() for part in parts(column, table.columns)}
    unused = [name for name in table.columns if name not in used]
    if unused:
        notes.append("columns not used: " + ", ".join(map(repr, unused)))
    return Choice(chosen, columns, notes)
