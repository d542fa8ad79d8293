"""Settings dataclasses as command-line arguments and as YAML: every field is a flag, and the file gives the same."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from tfclm.errors import InputError, replace_names
from tfclm.settings import fields_of, help_text

T = TypeVar("T")


def parse(
    settings: type[T],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> T:
    """Reads a settings dataclass from command-line arguments, over the values of the file named by `--config`.

    Every field is a flag, `--learning-rate` and `--learning_rate` alike; a bool has a `--no-` form; a tuple takes
    several values, and may be given several times; None is written `none`.

    Args:
        settings: the dataclass.
        arguments: the command line without the program's name.
        prog: the program's name in messages.
        description: the first lines of the help.
        preset: gets the values that are given, and returns values for other fields.

    Raises:
        InputError: an unknown flag or key, or a value that its field does not accept.

    Example:
        >>> parse(EvaluateSettings, ["--model", "runs/eli5"], prog="evaluate", description="").model
        'runs/eli5'
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
    override = "YAML file with settings; flags override it"
    parser.add_argument("--config", metavar="FILE", help=override, default=argparse.SUPPRESS)
    for field, kind in fields_of(settings):
        _add(parser, field, kind, settings)
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    values = {**(vars(parser.parse_args(_from_yaml(settings, path))) if path else {}), **given}
    return settings(**{**preset(values), **values})


def flag(name: str) -> str:
    """The flag of a settings field: `block_size` is --block-size."""
    return f"--{name.replace('_', '-')}"


def _with_flags(text: str, settings: type) -> str:
    """A help text, which names fields in backquotes, with their flags."""
    return replace_names(text, (field.name for field, _ in fields_of(settings)), flag)


def flags(settings: Any, names: Iterable[str]) -> list[str]:
    """The arguments that give these settings again; defaults are left out.

    Args:
        settings: a settings dataclass.
        names: the fields to include.
    """
    arguments = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in names or value == field.default:
            continue
        if isinstance(value, bool):
            arguments.append(flag(field.name) if value else flag(f"no_{field.name}"))
        else:
            arguments += [
                flag(field.name),
                *map(str, value if isinstance(value, tuple) else ["none" if value is None else value]),
            ]
    return arguments


def table(settings: type) -> str:
    """The settings as a Markdown table: flag, default, meaning."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field, kind in fields_of(settings):
        default = "" if field.default in (None, (), "") else f"`{field.default}`"
        choices = f" ({', '.join(map(str, typing.get_args(kind)))})" if typing.get_origin(kind) is Literal else ""
        rows.append(f"| `{flag(field.name)}` | {default} | {_with_flags(field.metadata['help'], settings)}{choices} |")
    return "\n".join(rows) + "\n"


def _meant(name: str, fields: Iterable[str], write: Callable[[str], str]) -> str:
    """Suggests the fields that an unknown name probably means, as a question; empty if none is similar."""
    names = [field.replace("_", "-") for field in fields]
    name = name.replace("_", "-").lower()
    words = set(name.split("-"))

    def likeness(other: str) -> float:
        parts = other.split("-")
        if name == "".join(part[0] for part in parts) or other.startswith(name) or name.startswith(other):
            return 1.0
        if words > set(parts):
            return 0.9
        # One word that two names share says much, and more words say more.
        shared = len(words & set(parts)) / max(len(words), len(parts))
        return max(difflib.SequenceMatcher(None, name, other).ratio(), 0.5 + shared / 2 if shared else 0.0)

    like = sorted(((likeness(other), other) for other in names), key=lambda each: -each[0])
    chosen = [write(other) for value, other in like if value >= max(0.7, like[0][0] - 0.1)][:3]
    return f" (did you mean {' or '.join(chosen)}?)" if name and chosen else ""


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = next((each for each in unknown if each.startswith("-")), "")
            names = dict.fromkeys(action.dest for action in self._actions)
            meant = _meant(first.lstrip("-").partition("=")[0], names, "--{}".format)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=min(120, int(os.environ.get("COLUMNS", 120))))


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any, settings: type) -> None:
    flags = [flag(field.name)]
    if "_" in field.name:
        flags.append(f"--{field.name}")
    # A flag that is not given is left out, so that a default does not override the file's value.
    common: dict[str, Any] = {
        "dest": field.name,
        "help": _with_flags(help_text(field), settings).replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    metavar = field.metadata["metavar"] or field.name.split("_")[-1].upper()
    if kind is bool:
        twins = dict.fromkeys((flag(f"no_{field.name}"), f"--no_{field.name}"))
        parser.add_argument(*flags, *twins, action=_Switch, nargs=0, **common)
    elif typing.get_origin(kind) is Literal:
        parser.add_argument(*flags, choices=typing.get_args(kind), **common)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(*flags, nargs="*", type=typing.get_args(kind)[0], action=_Tuple, metavar=metavar, **common)
    else:
        convert = _optional(kind) if optional and not field.metadata["literal"] else kind
        parser.add_argument(*flags, type=convert, metavar=metavar, **common)


class _Switch(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option).startswith(("--no-", "--no_")))


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text == "none" else kind(text)

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert


def _from_yaml(settings: type, path: str) -> list[str]:
    """A settings file as the equivalent flags, so that the same code checks both."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Keeps values as they are written, as for flags: `no` may be a choice and 0123456 a commit; null is None."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: give one `setting: value` per line")
    known = {field.name: (field, kind) for field, kind in fields_of(settings)}
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            meant = _meant(name, known, lambda field: field.replace("-", "_"))
            raise InputError(f"--config {path}: {key} is not a setting{meant}; the settings are {', '.join(known)}")
        field, kind = known[name]
        if kind is bool:
            switch = Loader.bool_values.get(str(value).lower())
            if switch is None:
                raise InputError(f"--config {path}: {key} must be true or false, not {value!r}")
            arguments.append(flag(name) if switch else flag(f"no_{name}"))
        elif typing.get_origin(kind) is tuple:
            items = value if isinstance(value, list) else [] if value is None else [value]
            arguments += [f"{flag(name)}={item}" for item in items] or [flag(name)]
        elif isinstance(value, list | dict):
            raise InputError(f"--config {path}: {key} must be one value, not {value!r}")
        elif value is not None or not field.metadata["literal"]:
            arguments.append(f"{flag(name)}={'none' if value is None else value}")
    return arguments


if __name__ == "__main__":
    # `python -m tfclm.cli.arguments fit` prints the command's table of the README.
    print(table(getattr(importlib.import_module(f"tfclm.{sys.argv[1]}"), f"{sys.argv[1].capitalize()}Settings")))
