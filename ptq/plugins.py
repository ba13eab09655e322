"""Finds plug-ins by file name and builds them from text such as "genie:steps=500,count=256".

The only dynamic import of the code base. A module of a plug-in folder without a leading underscore is a plug-in; other
distributions add theirs through the entry-point groups `ptq.calibrators`, `ptq.reconstructors`,
`ptq.finishers` and `ptq.exporters`.
"""

import contextlib
import difflib
import importlib
import math
import pkgutil
import re
import types
import typing
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from ptq.errors import PluginError

Kind = Literal["calibrators", "reconstructors", "finishers", "exporters"]
_PACKAGES: dict[Kind, str] = {
    "calibrators": "ptq.calibrators", "reconstructors": "ptq.reconstruct", "finishers": "ptq.finish",
    "exporters": "ptq.exporters",
}  # fmt: skip

# Options of any plug-in that no sign turns into something useful, beside rates, lr_…; of these, shares.
_NOT_NEGATIVE = (
    "lr", "least_lr", "drop", "warmup", "penalty", "scale_step", "smoothness", "decay", "patience", "margin",
)  # fmt: skip
_AT_MOST = {"drop": 1}
_NEXT = r",(?=\s*\w+\s*=)"  # between two options
_THEN = r"training\s*=\s*\((.*)\)"
_POSITIVE = (("latent", 1), ("memory_latent", 1), ("decay_every", 1))


def names(kind: Kind) -> list[str]:
    """The plug-ins of a kind, sorted."""
    package = importlib.import_module(_PACKAGES[kind])
    found = {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}
    return sorted(found | set(_external(kind)))


def _external(kind: Kind) -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=f"ptq.{kind}")}


def classes(kind: Kind) -> dict[str, type]:
    """The options classes of a kind's plug-ins by name, without those that cannot be imported."""
    found = {}
    for name in names(kind):
        with contextlib.suppress(PluginError):
            found[name] = load(kind, name)
    return found


def why_not(kind: Kind, name: str) -> str:
    """Why a plug-in cannot be imported; nothing where it can."""
    try:
        load(kind, name)
    except PluginError as e:
        return str(e)
    return ""


def load(kind: Kind, name: str) -> type:
    """The options class of a plug-in.

    Raises:
        PluginError: there is no plug-in of that name, or it cannot be imported.
    """
    known = names(kind)
    if name not in known:
        known += [alias for cls in classes(kind).values() for alias in getattr(cls, "aliases", {})]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PluginError(f"unknown {kind.removesuffix('s')} {name!r}; known: {', '.join(known)}{hint}")
    try:
        if name in (external := _external(kind)):
            return external[name].load()
        module = importlib.import_module(f"{_PACKAGES[kind]}.{name}")
        return getattr(module, module.__all__[0])
    except Exception as e:  # whatever the code of others does
        said = f"{type(e).__name__}: {e}".splitlines()[0]
        raise PluginError(
            f"{kind.removesuffix('s')} {name!r} cannot be imported ({said}); mend it or take it away"
        ) from e


def build(kind: Kind, text: str, effort: str = "full", *, training: bool = False) -> Any:
    """The options object that `text` describes: a name, then options after a colon.

    "genie", "genie:steps=500,count=256", "images:photos/". The preset of `effort` applies to what the text leaves open, or,
    where a student is trained, what the plug-in says of that. Options for then alone: "nayer:count=256,training=(steps=30)".

    Raises:
        PluginError: unknown name, unknown option, or a value that does not fit the option.
    """
    name, _, rest = text.partition(":")
    name, given = _alias(kind, name.strip())
    cls = load(kind, name)
    rest, then = _apart(rest)
    options = dict(cls.presets.get(effort, {})) | (getattr(cls, "in_training", {}) if training else {}) | given
    inside = read_options(cls, name, then, effort)
    options |= read_options(cls, name, rest, effort) | (inside if training else {})
    for key, least in (("count", 1), ("batch_size", 1), ("steps", 1 if kind == "calibrators" else 0), *_POSITIVE):
        if options.get(key, least) < least:
            raise PluginError(f"option {key}={options[key]} of {name}: at least {least} is needed")
    for key, value in options.items():
        if (
            (key in _NOT_NEGATIVE or key.startswith("lr_"))
            and isinstance(value, int | float)
            and not 0 <= value <= _AT_MOST.get(key, math.inf)
        ):
            ends = f"0 to {_AT_MOST[key]}" if key in _AT_MOST else "0 or more"
            raise PluginError(f"option {key}={value} of {name}: {ends} is needed")
    try:
        return cls(**options)
    except TypeError as e:
        example = getattr(cls, "example", "PATH")
        raise PluginError(f"{name} needs {_missing(cls, options)}, as in '{name}:{example}'") from e


def chosen(kind: Kind, choice: Any, effort: str = "full") -> Any:
    """What an optional argument asks for: text is built, an object is itself, and None or "none" is None.

    Raises:
        PluginError: as `build`.
    """
    if choice in (None, "none"):
        return None
    return build(kind, choice, effort) if isinstance(choice, str) else choice


def read_options(cls: type, name: str, text: str, effort: str = "full") -> dict[str, Any]:
    """The options that "steps=500,count=256" gives to `cls`, which messages call `name`.

    Raises:
        PluginError: an option that it does not have, or a value that does not fit.
    """
    found = {}
    for item in filter(None, (part.strip() for part in _split(text, _NEXT))):
        match = re.match(r"(\w+)\s*=", item)
        key, raw = (match[1], item[match.end() :]) if match else (getattr(cls, "positional", ""), item)
        found[key] = _parse(cls, name, key, raw.strip(), effort)
    return found


def _apart(text: str) -> tuple[str, str]:
    """Options, and those within training=( … )."""
    parts = _split(text, _NEXT)
    found = [re.fullmatch(_THEN, part.strip()) for part in parts]
    return (
        ",".join(part for part, then in zip(parts, found) if not then),
        ",".join(then[1] for then in found if then),
    )


def _alias(kind: Kind, name: str) -> tuple[str, dict[str, Any]]:
    """A plug-in and options that `name` stands for; itself where it is a plug-in, or where nothing knows it."""
    if name not in names(kind):
        for plugin, cls in classes(kind).items():
            if name in (aliases := getattr(cls, "aliases", {})):
                return plugin, dict(aliases[name])
    return name, {}


def _split(text: str, separator: str) -> list[str]:
    """`text` cut where the pattern matches outside of parentheses."""
    parts, start, depth = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and (match := re.compile(separator).match(text, at)):
            parts.append(text[start:at])
            start = match.end()
    return [*parts, text[start:]]


def _missing(cls: type, options: dict[str, Any]) -> str:
    hints = {f.name: f for f in fields(cls)}
    required = [n for n, f in hints.items() if n not in options and f.default is MISSING]
    return " and ".join(repr(n) for n in required) or "other options"


def _parse(cls: type, name: str, key: str, raw: str, effort: str) -> Any:
    hints = typing.get_type_hints(cls)
    allowed = [f.name for f in fields(cls)]
    if key not in allowed:
        close = difflib.get_close_matches(key, allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PluginError(f"{name} has no option {key or raw!r}; it has {', '.join(allowed) or 'none'}{hint}")
    kind = hints[key]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(build("calibrators", _outside(part), effort) for part in _split(raw, r"\+"))
    if typing.get_origin(kind) is Literal:
        if raw not in typing.get_args(kind):
            raise PluginError(f"option {key}={raw!r} of {name}: one of {', '.join(typing.get_args(kind))} is needed")
        return raw
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[raw.lower()]
        return Path(raw) if kind is Path else _finite(kind(raw))
    except (ValueError, KeyError) as e:
        raise PluginError(f"option {key}={raw!r} of {name} is not a valid {kind.__name__}") from e


def _finite(v: Any) -> Any:
    if isinstance(v, float) and not math.isfinite(v):
        raise ValueError("not finite")
    return v


def _outside(text: str) -> str:
    """ "genie(steps=5)" as "genie:steps=5"."""
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    return f"{match[1]}:{match[2]}" if match else text.strip()


def describe(plugin: Any) -> str:
    """The text that builds an equal options object again."""
    name = type(plugin).__module__.rpartition(".")[2]
    options = describe_options(plugin)
    return f"{name}:{options}" if options else name


def describe_options(options: Any) -> str:
    """The fields of an options object, as `read_options` reads them."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    return ",".join(f"{key}={_text(v)}" for key, v in given.items() if v is not None)


def _text(v: Any) -> str:
    if isinstance(v, tuple):
        return "+".join("{}({})".format(*describe(part).split(":", 1)) for part in v)
    return str(v).lower() if isinstance(v, bool) else str(v)


def options(cls: type) -> dict[str, Any]:
    """The options of a plug-in's class and their defaults; None for one without."""
    return {f.name: None if f.default is MISSING else _text(f.default) for f in fields(cls)}
