"""Stop strings found in the bytes of tokens, compared with `bytes.find` in the text so far."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tensorflow as tf

from tfclm.savedmodel.graph.stopping import MAX_STOP_BYTES, MAX_STOPS, Stop, StopFinder

PIECES = [b"a", b"b", b"ab", b"ba", b"aab", b"", b"\xc3", b"\xa9", b"e\xcc", b"\x81 ", b"bbbbbbbbb", b"\0", b"\n\n"]


def search(finder: StopFinder, stops: list[bytes], rows: np.ndarray, ends: list[int], *, xla: bool) -> Stop:
    """The state after rows of tokens [B, L], each of which ends at `ends` [B]."""

    @tf.function(jit_compile=xla)
    def find_all(state: Stop, tokens: tf.Tensor, ends: tf.Tensor) -> Stop:
        def step(index: tf.Tensor, state: Stop) -> tuple[tf.Tensor, Stop]:
            return index + 1, finder.find(state, tokens[:, index], (index < ends) & ~state.found)

        return tf.while_loop(lambda index, _: index < tokens.shape[1], step, (0, state))[1]

    return find_all(finder.begin(tf.constant(stops)[:, None]), tf.constant(rows), tf.constant(ends))


@pytest.mark.parametrize("xla", [False, True], ids=["default", "xla"])
def test_random_texts(xla: bool) -> None:
    """A stop string missed across tokens or inside one, or lost while other rows continue."""
    rng = random.Random(7)
    batch, length = 400, 24
    rows = np.array([[rng.randrange(len(PIECES)) for _ in range(length)] for _ in range(batch)], np.int32)
    ends = [rng.randrange(1, length + 1) for _ in rows]
    texts = [b"".join(PIECES[token] for token in row) for row in rows]
    stops = []
    for text in texts:
        start = rng.randrange(len(text))
        common = rng.choice([b"", b"a", b"ab", b"abab", b"bb", "é".encode(), b"e\xcc\x81", b"\0a", b"\n\n"])
        stops.append(rng.choice([common, text[start : start + rng.randrange(1, 20)]]))
    found, before = [], []
    for row, end, stop in zip(rows, ends, stops, strict=True):
        text = b""
        for token in row[:end]:
            text += PIECES[token]
            if stop and stop in text:
                break
        found.append(bool(stop) and stop in text)
        before.append(text.find(stop) if found[-1] else -1)
    state = search(StopFinder(PIECES), stops, rows, ends, xla=xla)
    assert state.found.numpy().tolist() == found
    assert np.where(state.found, state.length, -1).tolist() == before
    assert 100 < sum(found) < 300


@pytest.mark.parametrize("size", [1, 2, MAX_STOP_BYTES - 1, MAX_STOP_BYTES])
def test_longest(size: int) -> None:
    """A stop string that is cut off, or bytes lost from the window when the longest one ends in the longest token."""
    pieces = [bytes([65 + token]) for token in range(26)] + [b"0123456789" * 7]
    rng = random.Random(size)
    rows = [[26, *(rng.randrange(26) for _ in range(70)), 26]]
    text = b"".join(pieces[token] for token in rows[0])
    stops = [text[start : start + size] for start in range(len(text) - size + 1)]
    rows *= len(stops)
    state = search(StopFinder(pieces), stops, np.array(rows, np.int32), [72] * len(stops), xla=False)
    assert state.found.numpy().all()
    assert state.length.numpy().tolist() == [text.find(stop) for stop in stops]


def test_not_found_before_the_text() -> None:
    """The empty window at the beginning, or padding after a row's end, taken for the bytes of a stop string."""
    finder = StopFinder([b"\0", b"a", b""])
    rows = np.array([[1, 0, 0], [2, 2, 2], [1, 1, 1]], np.int32)
    state = search(finder, [b"\0", b"\0\0", b"aa"], rows, [1, 3, 1], xla=False)
    assert not state.found.numpy().any()


def test_ids_beyond_the_pieces() -> None:
    """A vocabulary larger than the tokenizer's, whose last ids read beyond the table."""
    finder = StopFinder([b"a", b"b", b""])
    state = search(finder, [b"ab"], np.array([[0, 700, 1]], np.int32), [3], xla=False)
    assert state.found.numpy().tolist() == [True]


@pytest.mark.parametrize("xla", [False, True], ids=["default", "xla"])
def test_several_stop_strings(xla: bool) -> None:
    """One of them missed, or text that still holds another one; a stop string that ends a row that is too short."""
    rng = random.Random(9)
    batch, length, kinds = 300, 8, [*[b""] * 8, b"ab", b"ba", b"bb", b"bba", b"aab", "é".encode(), b"\n\n"]
    rows = np.array([[rng.randrange(len(PIECES)) for _ in range(length)] for _ in range(batch)], np.int32)
    stops = [[rng.choice(kinds) for _ in range(MAX_STOPS)] for _ in rows]
    least = [rng.choice([0, 0, 1, 4]) for _ in rows]
    finder = StopFinder(PIECES)

    @tf.function(jit_compile=xla)
    def find_all(state: Stop) -> Stop:
        def step(index: tf.Tensor, state: Stop) -> tuple[tf.Tensor, Stop]:
            return index + 1, finder.find(state, tf.constant(rows)[:, index], ~state.found, index < tf.constant(least))

        return tf.while_loop(lambda index, _: index < length, step, (0, state))[1]

    state = find_all(finder.begin(tf.constant(stops)))
    for row in range(batch):
        text, before = b"", -1
        for number, token in enumerate(rows[row]):
            for end in range(len(text) + 1, len(text) + len(PIECES[token]) + 1):
                ending = [stop for stop in stops[row] if stop and (text + PIECES[token])[:end].endswith(stop)]
                if before < 0 and ending and number >= least[row]:
                    before = end - max(map(len, ending))
            text += PIECES[token]
            if before >= 0:
                break
        assert state.found[row] == (before >= 0)
        assert before in (-1, state.length[row])
    assert 100 < state.found.numpy().sum() < 290
