"""A command's settings: one frozen dataclass that is its flags, its `--config` file and its record."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import gc
import importlib
import logging
import os
import subprocess
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from tfclm.errors import InputError
from tfclm.terminal import abandon_stdout, mend_streams
from tfclm.terminal import say as say  # for the commands

T = TypeVar("T")

# What a disk says that is full or broken: nothing that a traceback would explain.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def setting(default: Any, help: str, *, recorded: bool = True, literal: bool = False) -> Any:
    """A dataclass field with its help text.

    What is not `recorded` is left out of the settings file. A `literal` flag is any text, "none" too: None by default.
    """
    return dataclasses.field(default=default, metadata={"help": help, "recorded": recorded, "literal": literal})


def documented(settings: type[T]) -> type[T]:
    """A decorator of settings dataclasses: their docstring lists the fields as `--help` does."""
    lines = [f"    {field.name}: {_help(field)}" for field, _ in _fields(settings)]
    settings.__doc__ = f"{settings.__doc__}\n\nAttributes:\n" + "\n".join(lines) + "\n"
    return settings


def parse(
    settings: type[T],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> T:
    """Reads a settings dataclass from command-line arguments, over the values of the file named by `--config`.

    Every field is a flag, `--learning-rate` and `--learning_rate` alike; a bool has a `--no-` twin; a tuple takes
    several values, also of a flag given again; None is written `none`. `preset` gets the values that are given, and
    may give others.

    Raises:
        InputError: an unknown flag or key, or a value that its field does not take.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
    override = "a YAML file of settings; flags override it"
    parser.add_argument("--config", metavar="FILE", help=override, default=argparse.SUPPRESS)
    for field, kind in _fields(settings):
        _add(parser, field, kind)
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    values = {**(vars(parser.parse_args(_from_yaml(settings, path))) if path else {}), **given}
    return settings(**{**preset(values), **values})


def flags(settings: Any, names: Iterable[str]) -> list[str]:
    """The arguments that give these settings again: of those that are not the defaults."""
    arguments = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in names or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            arguments += [flag, *map(str, value if isinstance(value, tuple) else ["none" if value is None else value])]
    return arguments


def record(settings: Any) -> dict[str, Any]:
    """The settings as plain values, in the order of the fields: what `fit.yaml` holds."""
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.metadata["recorded"]
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain settings as YAML, in their own order."""
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120))


def table(settings: type) -> str:
    """The settings as a Markdown table: flag, default, meaning."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field, kind in _fields(settings):
        default = "" if field.default in (None, (), "") else f"`{field.default}`"
        choices = f" ({', '.join(map(str, typing.get_args(kind)))})" if typing.get_origin(kind) is Literal else ""
        rows.append(f"| `--{field.name.replace('_', '-')}` | {default} | {field.metadata['help']}{choices} |")
    return "\n".join(rows) + "\n"


def command(
    settings: type[T],
    run: Callable[[T], int | None],
    *,
    verb: str,
    description: str,
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
    tensorflow: bool = True,
) -> NoReturn:
    """Runs a command as `python -m tfclm.VERB` does and exits: 0 done, 2 for what the user gave, 1 for the rest."""
    prog = f"python -m tfclm.{verb}"
    mend_streams()
    try:
        try:
            values = parse(settings, sys.argv[1:], prog=prog, description=description, preset=preset)
            if tensorflow:
                import_tensorflow()
            code: Any = run(values) or 0
        except SystemExit as end:  # --help
            code = end.code
        # Here, where it can still be told that what was printed has not arrived.
        sys.stdout.flush()
        sys.exit(code)
    except InputError as error:
        say(_scrubbed(f"tfclm.{verb}: {' '.join(str(error).split())}"))
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"tfclm.{verb}: interrupted")
        sys.exit(1)
    except BrokenPipeError:
        abandon_stdout()  # its reader has gone (`| head`)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            abandon_stdout()
            where = f": {error.filename}" if error.filename else ""
            say(_scrubbed(f"tfclm.{verb}: {error.strerror}{where}"))
            sys.exit(1)
        say(_scrubbed(traceback.format_exc().rstrip()))
        sys.exit(1)


def _scrubbed(text: str) -> str:
    """Without the Hub's token, which a message may quote: a proxy's, or about a flag that it was given to.

    Never fails: it is the last step between an error and its line.
    """
    from tfclm.hub.repository import scrubbed

    return scrubbed(text)


def import_tensorflow() -> None:
    """Imports TensorFlow for a command: without the lines in which it announces itself, which would bury ours."""
    # Its modules and graphs are millions of objects that stay, and the collector would walk them time and again.
    gc.set_threshold(200_000, 20, 100)
    # Or it would import Keras 3 beside tf_keras.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    # Where PyTorch is installed, transformers would import it, which some of its versions do not survive (triton).
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.stderr.flush()
    terminal = os.dup(2)
    # In another process, because this one may be aborted while TensorFlow is imported, having said why.
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", _RELAY], stdin=read, stderr=terminal) as relay:
        os.close(read)
        os.dup2(write, 2)
        os.close(write)
        try:
            importlib.import_module("tensorflow")
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            # It ends with its input, unless a process that TensorFlow started still holds that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                relay.wait(timeout=5)
            relay.kill()


# Copies stderr but for what TensorFlow says of itself: informational lines begin with I and a date, and another line
# says that they are not in the log file yet.
_RELAY = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
for line in sys.stdin.buffer:
    if not line.startswith((b"I0000", b"WARNING: All log messages before absl")):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


def _meant(name: str, fields: Iterable[str], spell: Callable[[str], str]) -> str:
    """A question that names the fields that are probably meant by a name that is none; empty if none is like it."""
    names = [field.replace("_", "-") for field in fields]
    name = name.replace("_", "-").lower()
    words = set(name.split("-"))

    def likeness(other: str) -> float:
        parts = other.split("-")
        if name == "".join(part[0] for part in parts) or other.startswith(name) or name.startswith(other):
            return 1.0
        if words > set(parts):
            return 0.9
        # Of names with several words, one word that both have says much, the more of them the more.
        shared = len(words & set(parts)) / max(len(words), len(parts))
        return max(difflib.SequenceMatcher(None, name, other).ratio(), 0.5 + shared / 2 if shared else 0.0)

    like = sorted(((likeness(other), other) for other in names), key=lambda each: -each[0])
    chosen = [spell(other) for value, other in like if value >= max(0.7, like[0][0] - 0.1)][:3]
    return f" (did you mean {' or '.join(chosen)}?)" if name and chosen else ""


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((each for each in unknown if each.startswith("-")), "")
            names = dict.fromkeys(action.dest for action in self._actions)
            meant = _meant(flag.lstrip("-").partition("=")[0], names, "--{}".format)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=min(120, int(os.environ.get("COLUMNS", 120))))


def _fields(settings: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(settings)
    return [(field, hints[field.name]) for field in dataclasses.fields(settings)]


def _help(field: dataclasses.Field[Any]) -> str:
    shown = "" if field.default in (None, (), False, "") else f" (default: {field.default})"
    return f"{field.metadata['help']}{shown}"


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any) -> None:
    flags = [f"--{field.name.replace('_', '-')}"]
    if "_" in field.name:
        flags.append(f"--{field.name}")
    # A flag that is not given stays out of the result, so that the file's value can be told from a default.
    common: dict[str, Any] = {
        "dest": field.name,
        "help": _help(field).replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    metavar = field.name.split("_")[-1].upper()
    if kind is bool:
        twins = dict.fromkeys((f"--no-{field.name.replace('_', '-')}", f"--no_{field.name}"))
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
    """A settings file as the flags that say the same, so that both are checked by the same code."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads a value as it is written, as a flag's is: `no` is a choice of some, 0123456 a commit; null is None."""

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
        raise InputError(f"--config {path}: no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: give one `setting: value` a line")
    known = {field.name: (field, kind) for field, kind in _fields(settings)}
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            meant = _meant(name, known, lambda field: field.replace("-", "_"))
            raise InputError(f"--config {path}: {key} is no setting{meant}; there are {', '.join(known)}")
        field, kind = known[name]
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            switch = Loader.bool_values.get(str(value).lower())
            if switch is None:
                raise InputError(f"--config {path}: {key} is true or false, not {value!r}")
            arguments.append(flag if switch else flag.replace("--", "--no-", 1))
        elif typing.get_origin(kind) is tuple:
            items = value if isinstance(value, list) else [] if value is None else [value]
            arguments += [f"{flag}={item}" for item in items] or [flag]
        elif isinstance(value, list | dict):
            raise InputError(f"--config {path}: {key} takes one value, not {value!r}")
        elif value is not None or not field.metadata["literal"]:
            arguments.append(f"{flag}={'none' if value is None else value}")
    return arguments


if __name__ == "__main__":
    # `python -m tfclm.settings fit` prints the command's table of the README.
    print(table(getattr(importlib.import_module(f"tfclm.{sys.argv[1]}"), f"{sys.argv[1].capitalize()}Settings")))
