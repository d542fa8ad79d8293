"""Large documents, which Python's parser reads in pieces: the result is the same as for the whole document."""

from __future__ import annotations

import json
import math
import random
import time

import pytest

from tfclm.server.deadline import Deadline
from tfclm.server.status import Code, StatusError, TooLarge
from tfclm.server.wire.jsonreader import LARGE_BYTES, parse

STRINGS = ["", "a", "é", "😀", '"', "\\", "\n\t", "\0", "x" * 300, "é😀" * 100, "\\" * 7, "]},:[{", "1e999"]
NUMBERS = [0, -1, 12345, 2**63, 2**64 - 1, -(2**63), 0.5, -1e-7, 1e300, 0.1234567890123456789, math.inf, -math.inf]


def document(chance: random.Random, depth: int = 0):
    """A value of some nesting."""
    kind = chance.randrange(10)
    if depth < 6 and kind < 3:
        return [document(chance, depth + 1) for _ in range(chance.randrange(6))]
    if depth < 6 and kind < 5:
        # Keys are distinct, as json.dumps would not tell the first of equal ones.
        return {f"{chance.choice(STRINGS)}{place}": document(chance, depth + 1) for place in range(chance.randrange(5))}
    return chance.choice([chance.choice(STRINGS), chance.choice(NUMBERS), None, True, False])


@pytest.mark.parametrize("seed", range(5))
def test_large_documents_read_as_a_whole_does(seed):
    """A value lost, cut or read twice where two pieces meet."""
    chance = random.Random(seed)
    rows = []
    while sum(map(len, rows)) < LARGE_BYTES * 3 // 2:
        indent, ascii_only = chance.choice([None, None, 1]), chance.random() < 0.5
        rows.append(json.dumps(document(chance), indent=indent, ensure_ascii=ascii_only))
    text = "ab\\n\\\\\\u00e9\\ud83d\\ude00" * 9999
    body = "".join(['{"', "k" * seed, '": [', " ,\n".join(rows), '], "long": "', text, '"}'])
    assert len(body) > LARGE_BYTES
    # What is not equal is not shown: there is much of it.
    assert (parse(body.encode() + b"} garbage") == json.loads(body)) is True


def test_documents_that_python_reads_differently():
    """A large document in which the second of two equal keys counts, an integer has no end, or bytes are replaced."""
    many = ", ".join(f'"{place}": {place}' for place in range(50_000))
    value = parse(
        b'{"a": 1, "a": 2, "n": [18446744073709551616, -9223372036854775809, NaN], "s": ["\\ude42", "\xff"], '
        + many.encode()
        + b', "0": "second"}'
    )
    assert (value["a"], value["0"], value["49999"]) == (1, 0, 49999)
    assert value["n"][:2] == [2.0**64, -(2.0**63)]
    assert isinstance(value["n"][0], float)
    assert math.isnan(value["n"][2])
    assert [text.encode("utf-8", "surrogateescape") for text in value["s"]] == [b"\xed\xb9\x82", b"\xff"]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("1}", "Missing a comma or ']' after an array element."),
        ("01]", "Missing a comma or ']' after an array element."),
        ("]", "Invalid value."),
        ("1e999]", "Number too big to be stored in double."),
        ('"\\ud83d"]', "The surrogate pair in string is invalid."),
        ("", "Invalid value."),
    ],
)
@pytest.mark.parametrize("filler", ["1.5, ", '"é", ', "[[], {}], "])
def test_errors_name_the_byte(filler, end, reason):
    """An error whose offset counts from the start of a piece, or counts characters."""
    start = '{"a": [' + filler * (LARGE_BYTES // len(filler) + 1)
    offset = len(start.encode()) + (1 if end in ("1}", "01]") else end.startswith('"'))
    with pytest.raises(StatusError) as error:
        parse((start + end).encode())
    assert error.value.message == f"JSON Parse error: {reason} at offset: {offset}"


@pytest.mark.parametrize("item", ["[]", "1", "{}", '{"a":[1]}', '"a"'])
def test_values_are_counted(item):
    """More values than were allowed for, each of which takes a hundred bytes; or a long text that counts as many."""
    each = item.count("[") + item.count("{") + item.count("1") + (item == '"a"')
    body = f'{{"instances":[{",".join([item] * 150_000)}]}}'.encode()
    assert len(parse(body, max_values=2 + 150_000 * each)["instances"]) == 150_000
    with pytest.raises(TooLarge):
        parse(body, max_values=1 + 150_000 * each)
    text = json.dumps({"instances": ["a,[{" * LARGE_BYTES] * 3}).encode()
    assert len(parse(text, max_values=5)["instances"]) == 3


@pytest.mark.parametrize("item", ["[],", "[", '{"a":', '"a\\n",', " ", "9", '"', '"a":1,', "\\n", "\\ude42"])
def test_parsing_ends_in_time(item):
    """A document of some kind whose parsing continues when nobody waits for it."""
    body = ('{"a":[' + ('"' if item.startswith("\\") else "") + item * (12 * 2**20 // len(item))).encode()
    start = time.monotonic()
    with pytest.raises(StatusError) as error:
        parse(body, Deadline(300))
    assert time.monotonic() - start < 5
    assert error.value.code is Code.DEADLINE_EXCEEDED or time.monotonic() - start < 1
