"""Settings dataclasses: a field with its help text, the record of the values, and the docstring that lists them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def setting(
    default: Any, help: str, *, recorded: bool = True, literal: bool = False, metavar: str | None = None
) -> Any:
    """A dataclass field with its help text.

    Args:
        default: the field's default.
        help: what `--help` says; other fields are named in backquotes.
        recorded: whether the settings file of a run holds it.
        metavar: what `--help` calls the value; the last word of the field's name if not given.
        literal: the flag takes any text, "none" too, which otherwise means None.

    Example:
        >>> stride: int | None = setting(None, "tokens by which the window moves")
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "recorded": recorded, "literal": literal, "metavar": metavar}
    )


def documented(settings: type[T]) -> type[T]:
    """A decorator that adds a settings dataclass's fields to its docstring, with their help texts."""
    lines = [f"    {field.name}: {help_text(field)}" for field, _ in fields_of(settings)]
    settings.__doc__ = f"{settings.__doc__}\n\nAttributes:\n" + "\n".join(lines) + "\n"
    return settings


def record(settings: Any) -> dict[str, Any]:
    """The recorded settings as plain values, in the order of the fields: the content of `fit.yaml`."""
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.metadata["recorded"]
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain settings as YAML, in their order."""
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120))


def fields_of(settings: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a settings dataclass with their types."""
    hints = typing.get_type_hints(settings)
    return [(field, hints[field.name]) for field in dataclasses.fields(settings)]


def help_text(field: dataclasses.Field[Any]) -> str:
    """What `--help` says about a field: its help text and its default."""
    shown = "" if field.default in (None, (), False, "") else f" (default: {field.default})"
    return f"{field.metadata['help']}{shown}"
