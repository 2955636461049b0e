"""The registry of methods: a method is a configuration class, found by name, wildcard or composition string."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from deltaworks.core.errors import UserError, nearest
from deltaworks.core.forms import Tuner
from deltaworks.core.procedure import Procedure


def option(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, choices: Collection[str] = ()
) -> Any:
    """A field of a method's configuration that documents and checks itself.

    ``least`` and ``most`` are inclusive bounds; ``choices`` the allowed words.
    """
    checks = {"help": help, "least": least, "most": most, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=checks)


@dataclass(kw_only=True)
class Config:
    """The configuration of a method; each method derives its own and registers it with ``@method``.

    Subclasses give ``tuner(site)`` and, if the method does something over time, ``procedure(delta)``; a method
    that is made of others gives ``parts()`` instead.
    """

    targets: str = option("linear", "which operations to stand around: roles, globs or regular expressions")

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ()
    identity: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    tried: ClassVar[tuple[float, ...]] = ()
    limits: ClassVar[Mapping[str, str]] = {}
    small: ClassVar[Mapping[str, Any]] = {}
    tuner_class: ClassVar[type[Tuner] | None] = None

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            if field.init:
                setattr(self, field.name, _checked(self.name, field, hints[field.name], getattr(self, field.name)))
        if "rank" in hints and "alpha" in hints and self.alpha is None:  # type: ignore[attr-defined, has-type]
            self.alpha = self.rank  # type: ignore[attr-defined]

    def tuner(self, site: Any) -> Tuner | None:
        """The tuner for one site; None where there is nothing to tune."""
        if self.tuner_class is None:
            raise NotImplementedError(f"{self.name} has no tuner")
        return self.tuner_class(site, self)  # type: ignore[call-arg]

    def procedure(self, delta: Any) -> Procedure | None:
        """What the method does over time, if anything."""
        return None

    def places(self, anatomy: Any) -> list[Any]:
        """The places of the model that this configuration stands around."""
        return anatomy.select(self.targets, self.kinds)

    def parts(self) -> list[Config]:
        """The methods that this one is made of; itself, for all but compositions."""
        return [self]

    def within(self) -> list[Config]:
        """The methods that this one adds to a composition."""
        return self.parts()

    def options(self) -> dict[str, Any]:
        """Every option with its value, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def __str__(self) -> str:
        options, usual = self.options(), type(self)().options()
        if {"rank", "alpha"} <= options.keys():
            usual["alpha"] = options["rank"]
        changed = {key: value for key, value in options.items() if value != usual[key]}
        return self.name + (f"[{', '.join(f'{k}={_word(v)}' for k, v in changed.items())}]" if changed else "")

    def __add__(self, other: Config) -> Composition:
        return Composition(members=[*_members(self), *_members(other)])


@dataclass(kw_only=True)
class Composition(Config):
    """Several methods as one adapter: ``prefix[length=30]+parallel[reduction=2]``."""

    targets: str = option("", "unused: each member has its own")
    members: list[Config] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = [part for member in self.members for part in member.within()]

    def parts(self) -> list[Config]:
        return self.members

    def __str__(self) -> str:
        return "+".join(str(member) for member in self.members)


@dataclass(kw_only=True)
class OnTop(Config):
    """A method that works on others over time: a member of a composition, "lora+ist"; alone it stands on ``host``."""

    targets: str = option("", "unused: the methods below have theirs")
    host: str = option("lora", "the method below, where this one is named alone")

    def places(self, anatomy: Any) -> list[Any]:
        return super().places(anatomy) if self.kinds else []

    def parts(self) -> list[Config]:
        return [*configure(self.host).parts(), self]

    def within(self) -> list[Config]:
        return [self]


ConfigClass = TypeVar("ConfigClass", bound=type[Config])
_registry: dict[str, type[Config]] = {}


def method(
    name: str,
    *,
    family: str,
    paper: str,
    kinds: Collection[str] = (),
    tuner: type[Tuner] | None = None,
    identity: bool = True,
    learning_rate: float = 1e-3,
    tried: Collection[float] = (),
    limits: Mapping[str, str] | None = None,
    small: Mapping[str, Any] | None = None,
) -> Callable[[ConfigClass], ConfigClass]:
    """Register a configuration class as a method.

    ``family`` is its place in the taxonomy ("reparametrized/low-rank"); ``paper`` author, year and arXiv number;
    ``kinds`` the kinds of places it can stand around (what changes the weight of a linear can change that of an
    expert, so "matrix" goes without saying); ``identity`` whether the model's output is unchanged at
    step 0; ``learning_rate`` a default found by running, among the rates ``tried``; ``limits`` what it cannot do
    ("merge", "rows", "generate", "compile", "checkpointing", "bfloat16", "sharded", "family:NAME" or "nothing" to
    tune), each with the sentence that its error says; ``small`` options that suit a model of width 32, where the
    defaults do not.
    """

    def register(config: ConfigClass) -> ConfigClass:
        config = dataclass(kw_only=True)(config)  # type: ignore[assignment]
        config.name, config.family, config.paper = name, family, paper
        config.kinds, config.identity = tuple(kinds), identity
        if "linear" in kinds and "parameters" not in kinds and (tuner is None or _makes_a_weight(tuner)):
            config.kinds = tuple(dict.fromkeys((*kinds, "matrix")))
        config.learning_rate, config.tried = learning_rate, tuple(tried)
        config.limits, config.small, config.tuner_class = dict(limits or {}), dict(small or {}), tuner
        if name in _registry and _registry[name].__module__ != config.__module__:
            raise ValueError(f"two methods are called {name!r}")
        _registry[name] = config
        return config

    return register


def _makes_a_weight(tuner: type[Tuner]) -> bool:
    return tuner.gives("weight") or tuner.gives("factors")


def registry() -> dict[str, type[Config]]:
    """Every method by name; the first call imports the method files."""
    package = importlib.import_module("deltaworks.methods")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(_registry.items(), key=lambda item: (item[1].family, item[0])))


def methods(pattern: str = "*") -> list[str]:
    """Names of methods; ``pattern`` is a wildcard on the name or on the family ("low-rank*", "lora*")."""
    known = registry()
    found = [
        name
        for name, config in known.items()
        if any(fnmatch.fnmatch(text, pattern) for text in (name, config.family, *config.family.split("/")))
    ]
    if not found:
        raise UserError(f"no method matches {pattern!r}: {nearest(pattern, known)}")
    return found


def find(name: str) -> type[Config]:
    """The configuration class of a method. Raises UserError with the nearest names."""
    known = registry()
    if name not in known:
        raise UserError(f"method {name!r} is unknown: {nearest(name.lower(), known)}")
    return known[name]


def configure(spec: str | Config, **options: Any) -> Config:
    """A configuration from ``"lora"``, ``"lora[rank=16]"``, ``"prefix+parallel"`` or a configuration itself.

    Values that hold brackets, commas, plus signs or spaces stand in quotes, in which a doubled quote is a quote:
    ``"lora[targets='re:.*[qv]_proj']"``. ``options`` go before what stands in the brackets. Raises UserError.
    """
    if isinstance(spec, Composition) or (isinstance(spec, str) and len(split(spec, "+")) > 1):
        if options:
            raise UserError(f"'{spec}' is several methods: give options inside the brackets of the one they belong to")
        return spec if isinstance(spec, Config) else Composition(members=[configure(s) for s in split(spec, "+")])
    if isinstance(spec, Config):
        return _replaced(spec, options) if options else spec
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"a method is a name such as 'lora[rank=16]', not {spec!r}")
    name, words = _parse(spec.strip())
    config = find(name)
    return config(**_known(config, words | options))


def _replaced(config: Config, options: Mapping[str, Any]) -> Config:
    """The configuration with other options; an alpha that equals the rank follows it."""
    values = config.options()
    if "rank" in options and values.get("alpha") == values.get("rank"):
        values["alpha"] = None
    return type(config)(**values | _known(type(config), options))


def as_data(config: Config) -> list[dict[str, Any]]:
    """A configuration as JSON data: one entry for each method it is made of."""
    return [{"method": member.name, **member.options()} for member in _members(config)]


def from_data(data: list[dict[str, Any]]) -> Config:
    """The inverse of ``as_data``. Raises UserError for what it does not know."""
    try:
        members = []
        for entry in data:
            config = find(entry["method"])
            members.append(config(**_known(config, {k: v for k, v in entry.items() if k != "method"})))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not a method configuration: {str(data)[:80]}") from error
    if not members:
        raise UserError("this method configuration names no method")
    return members[0] if len(members) == 1 else Composition(members=members)


def _members(config: Config) -> list[Config]:
    return config.members if isinstance(config, Composition) else [config]


def _hints(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _known(config: type[Config], words: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(config) if field.init]
    for key in words:
        if key not in names:
            raise UserError(f"{config.name} has no option {key!r}: {nearest(key, names)}")
    return dict(words)


def _checked(method: str, field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """The value in the type of its field, within its bounds."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (value == "none" and types.NoneType in kinds and not isinstance(value, _Quoted)):
        if types.NoneType in kinds:
            return None
        raise UserError(f"{method}: option {field.name} needs a value")
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    wrong = UserError(f"{method}: option {field.name}={value!r} is not {_named(kind)}")
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if not isinstance(value, bool):
            if str(value).lower() not in words:
                raise wrong
            value = words[str(value).lower()]
    elif kind in (int, float):
        if isinstance(value, bool):
            raise wrong
        try:
            number = float(value)
            value = kind(value) if kind is float or not isinstance(value, str) else int(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if number != value or not math.isfinite(number):
            raise wrong
        least, most = field.metadata.get("least"), field.metadata.get("most")
        if (least is not None and value < least) or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"at most {most}"
            bounds = bounds if least is None or most is None else f"between {least} and {most}"
            raise UserError(f"{method}: option {field.name}={value} must be {bounds}")
    elif kind is str:
        if isinstance(value, (list, tuple)) and field.name == "targets":
            value = ",".join(value)
        if not isinstance(value, str):
            raise wrong
        value = str(value)
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise UserError(f"{method}: option {field.name}={value!r} is unknown: {nearest(value, choices)}")
    return value


def _named(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def _word(value: Any) -> str:
    """A value as it is written inside brackets."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    plain = value and value == value.strip() and value != "none" and not any(mark in value for mark in ",[]+='\" ")
    doubled = value.replace("'", "''")
    return value if plain else f"'{doubled}'"


def _parse(part: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``"lora[rank=16, targets='attention.q']"``."""
    name, bracket, rest = part.partition("[")
    if bracket and not rest.endswith("]"):
        raise UserError(f"method {part!r} lacks its closing bracket at the end: write it as 'lora[rank=16]'")
    words: dict[str, Any] = {}
    for item in split(rest[:-1], ",") if rest[:-1].strip() else []:
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not value:
            raise UserError(f"option {item!r} of {name!r} has no value: write it as 'rank=16'")
        if key in words:
            raise UserError(f"option {key!r} of {name!r} is given twice")
        words[key] = _unquoted(value)
    return name.strip(), words


class _Quoted(str):
    """A value that stood in quotes: 'none' is a text there."""


def _unquoted(value: str) -> str:
    quote = value[0]
    if quote not in "'\"" or len(value) < 2 or value[-1] != quote:
        return value
    return _Quoted(value[1:-1].replace(2 * quote, quote))


def split(text: str, mark: str) -> list[str]:
    """Split at ``mark`` outside brackets and quotes. Raises UserError where these do not pair up."""
    items, depth, quote, current = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter == "[") - (letter == "]")
        if letter == mark and depth == 0 and not quote:
            items.append(current.strip())
            current = ""
        else:
            current += letter
    items.append(current.strip())
    if quote:
        raise UserError(f"{text!r} lacks a closing {quote}")
    if depth:
        lacks = "a closing" if depth > 0 else "an opening"
        raise UserError(f"{text!r} lacks {lacks} bracket: write 'lora[rank=16]', and values with brackets in quotes")
    if not all(items) and text.strip():
        raise UserError(f"{text!r} has an empty part beside {mark!r}")
    return items
