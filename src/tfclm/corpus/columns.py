"""The text column: finds a dotted path in an Arrow schema and extracts its texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tfclm.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


def is_blank(text: str | None) -> bool:
    """Whether a row has no text: it is null, empty or white space."""
    return text is None or not text or text.isspace()


def find_column(schema: pa.Schema, column: str, where: str) -> tuple[str, str]:
    """Splits a dotted path into a top-level column and the path inside it.

    Args:
        schema: the columns there are.
        column: the dotted path, `answers.text`.
        where: the file or dataset, for messages.

    Raises:
        InputError: there is no such column, it occurs twice, or it does not hold text.
    """
    head = max((name for name in schema.names if column == name or column.startswith(f"{name}.")), key=len, default="")
    if schema.names.count(head) > 1:
        raise InputError(f"{where} has column {head} twice: give each column its own name")
    kind = _type_at(schema.field(head).type, column[len(head) + 1 :]) if head else None
    if kind is None:
        raise InputError(f"{where} has no column {column}: it has {', '.join(schema_paths(schema))}")
    if not _is_text(kind):
        raise InputError(
            f"column {column} of {where} is {kind}, not text: give one of "
            f"{', '.join(schema_paths(schema, text_only=True)) or 'another source, this one has no text column'}"
        )
    return head, column[len(head) + 1 :]


def _element_type(kind: pa.DataType) -> pa.DataType:
    """The element type of a list of any kind, and the value type of a dictionary."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind


def _is_text(kind: pa.DataType) -> bool:
    return str(_element_type(kind)) in ("string", "large_string", "string_view", "null")


def _type_at(kind: pa.DataType, path: str) -> pa.DataType | None:
    import pyarrow as pa

    if not path:
        return kind
    kind = _element_type(kind)
    if not pa.types.is_struct(kind):
        return None
    fields = {field.name: field.type for field in kind}
    name = path if path in fields else path.partition(".")[0]
    return _type_at(fields[name], path[len(name) + 1 :]) if name in fields else None


def schema_paths(schema: pa.Schema, text_only: bool = False) -> list[str]:
    """The dotted paths of all leaves, in order; with `text_only` those that hold text."""
    import pyarrow as pa

    def paths(name: str, kind: pa.DataType) -> Iterator[str]:
        inner = _element_type(kind)
        if pa.types.is_struct(inner):
            for field in inner:
                yield from paths(f"{name}.{field.name}", field.type)
        elif not text_only or _is_text(inner):
            yield name

    return [path for field in schema for path in paths(field.name, field.type)]


def extract_texts(column: pa.Array | pa.ChunkedArray, path: str) -> list[str | None]:
    """The text of each row of a column that `find_column` has checked."""
    rows = column.to_pylist()
    return (
        rows
        if not path and all(row is None or isinstance(row, str) for row in rows)
        else [extract_text(row, path) for row in rows]
    )


def extract_text(value: object, path: str) -> str | None:
    """The text at a dotted path in a row of plain Python values; the strings of a list are joined with spaces.

    Raises:
        KeyError: the row has no such path.
        TypeError: the value there is not text.
    """
    if isinstance(value, str) and not path:
        return value
    pieces = list(_strings(value, path))
    return " ".join(pieces) if pieces else None


def _strings(value: object, path: str) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, list):
        for item in value:
            yield from _strings(item, path)
    elif not path:
        if not isinstance(value, str):
            raise TypeError(type(value).__name__)
        yield value
    elif isinstance(value, dict):
        name = path if path in value else path.partition(".")[0]
        yield from _strings(value[name], path[len(name) + 1 :])
    else:
        raise KeyError(path)
