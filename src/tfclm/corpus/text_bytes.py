"""The UTF-8 bytes of the text that tokens stand for, to compare models whose tokenizers differ."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tfclm.corpus.packing import Packed

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from transformers import PreTrainedTokenizerBase

# Characters per call of the tokenizer: a token's offsets take some hundred bytes.
GROUP_CHARACTERS = 1 << 15


class _Inexact(Exception):
    """The tokens do not stand for all of the text."""


def block_bytes(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, packed: Packed) -> int | None:
    """Bytes of the tokens that are predicted in the blocks of `pack`.

    A token stands for the text from where the token before it ends to where it ends itself: a character that several
    tokens share counts for the first of them, and separators and prefixes have no bytes. The bytes of all tokens of a
    text are those of the text.

    Args:
        texts: the texts that were tokenized and packed, a dataset with a column "text".
        tokenizer: their tokenizer.
        packed: their blocks.

    Returns:
        The bytes; None if the tokenizer does not tell where tokens end, or if the tokens of some text do not give that
        text back, except for its Unicode composition (NFC) and a space at its beginning.

    Example:
        >>> block_bytes(texts, tokenizer, pack(tokenize(texts, tokenizer), 128))
        5342
    """
    import numpy as np

    kept = packed.tokens - packed.dropped_tokens
    begin, total = 0, 0
    try:
        for sizes in _token_bytes(_stream(texts), tokenizer):
            places = np.arange(begin, begin + len(sizes))
            # Without a prefix, the first token of each block is only context.
            predicted = places < kept if packed.prefix else (places < kept) & (places % packed.block_size > 0)
            total += int(sizes[predicted].sum())
            begin += len(sizes) + len(packed.separator)
    except _Inexact:
        return None
    # Other tokens than those that were packed: BPE with dropout cuts a text differently each time.
    return total if begin == packed.tokens else None


def window_bytes(
    text: str, tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], window: int, stride: int
) -> int | None:
    """Bytes of the tokens of one text that `tfclm.perplexity` predicts in windows, as `block_bytes` counts them."""
    try:
        (sizes,) = _token_bytes([text], tokenizer)
    except _Inexact:
        return None
    context = 0
    if not prefix:
        # The first token; of every window, if no two overlap.
        context = int(sizes[:: stride if stride == window else len(sizes) or 1].sum())
    return int(sizes.sum()) - context


def _token_bytes(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray[Any, Any]]:
    """For each text, the bytes of each of its tokens, without special tokens around it; int64 [T]."""
    if not tokenizer.is_fast:
        raise _Inexact
    for group in _groups(texts):
        yield from _group_bytes(group, tokenizer)


def _group_bytes(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray[Any, Any]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    sizes = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != text and _canonical(decoded) != _canonical(text):
            raise _Inexact
        sizes.append(_sizes(text, [end for _, end in offsets]))
    return sizes


def _stream(texts: datasets.Dataset) -> Iterator[str]:
    """The texts of a dataset, one at a time in memory."""
    for table in texts.with_format("arrow").iter(1000):
        yield from (text.as_py() for text in table["text"])


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _canonical(text: str) -> str:
    """The text without what nearly every tokenizer ignores."""
    return unicodedata.normalize("NFC", text).removeprefix(" ")


def _sizes(text: str, ends: list[int]) -> np.ndarray[Any, Any]:
    """The bytes of each token, from the characters at which they end."""
    import numpy as np

    if not ends:
        if text:
            raise _Inexact
        return np.empty(0, np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    lengths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(lengths)])
    reached = bytes_before[np.maximum.accumulate(ends)]
    if reached[-1] != bytes_before[-1]:
        raise _Inexact
    return np.diff(reached, prepend=0)
