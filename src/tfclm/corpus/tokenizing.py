"""Texts to token ids."""

from __future__ import annotations

import copy
import functools
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tfclm.corpus.cache import made_by

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

# The tokenizer's own record of a token takes a hundred times the room of its id: long texts go a few at a time.
GROUP_CHARACTERS = 1 << 20
# Some 50 MB a process.
REMEMBERED_WORDS = 1 << 18
REMEMBERED_LENGTH = 64  # longer ones, which no language repeats, are forgotten at once
# Spaces and the word after them; the spaces at the end of a text.
_WORD = re.compile(r"\s*\S+|\s+")


def tokenize(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None
) -> datasets.Dataset:
    """The token ids of every text: one row a text, one column `input_ids` (list of int32), in the datasets cache.

    The ids are those of `tokenizer(text, add_special_tokens=False)`: no BOS or EOS, because `pack` puts the separator
    between documents. Nothing is truncated or padded, whatever the tokenizer was set to; the tokenizer itself is not
    changed. With `num_proc` processes each works on one core. Without, GPT-2's kind of tokenizer uses about one core,
    other fast ones use all of them by threads unless TOKENIZERS_PARALLELISM=false.
    """
    columns = texts.column_names
    encode: dict[str, Any]
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        if backend.truncation or backend.padding:
            # What earlier calls set is left out; it would also give every run another fingerprint.
            backend = copy.deepcopy(backend)
            backend.no_truncation()
            backend.no_padding()
        encode = {"backend": backend.to_str(), "split_special_tokens": tokenizer.split_special_tokens}
        # Made here, so that forked processes have it already.
        _encoder(**encode)
    else:
        encode = {"tokenizer": tokenizer}
    if num_proc is not None:
        num_proc = max(1, min(num_proc, len(texts)))
    tokens = texts.with_format("arrow").map(
        _encode_fast if tokenizer.is_fast else _encode_slow,
        batched=True,
        num_proc=num_proc,
        remove_columns=columns,
        fn_kwargs={"made_by": made_by(), **encode},
        desc="tokenizing",
    )
    return tokens.with_format(None)


class _Encoder:
    """A fast tokenizer's backend, with a memory of the words it has seen where words can be encoded apart.

    GPT-2's pre-tokenizer never joins a non-space with a space after it, and never looks to the left. So a text cut
    before each space that follows a word encodes to the ids of its pieces, and most pieces have been seen before:
    several times faster than the backend, with its ids.
    """

    def __init__(self, backend: str, split_special_tokens: bool) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel

        self._backend = Tokenizer.from_str(backend)
        # Not part of the serialised tokenizer.
        self._backend.encode_special_tokens = split_special_tokens
        words, model = self._backend.pre_tokenizer, self._backend.model
        self._by_word = (
            isinstance(words, ByteLevel)
            and not words.add_prefix_space
            and words.use_regex
            and self._backend.normalizer is None
            and isinstance(model, BPE)
            and not model.dropout
        )
        # Added tokens are found before words are, and other spaces than ASCII's are not the same set everywhere.
        added = [re.escape(token.content) for token in self._backend.get_added_tokens_decoder().values()]
        self._whole = re.compile("|".join([*added, r"[^\S\t-\r ]", "\u180e"]))
        self._words: dict[str, bytes] = {}  # the ids, int32: joined at once where lists go id by id

    def encode(self, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        """The ids of each text, int32."""
        import numpy as np

        pieces = [None if not self._by_word or self._whole.search(text) else _WORD.findall(text) for text in texts]
        whole = iter(self._encode(text for text, words in zip(texts, pieces, strict=True) if words is None))
        known = self._words
        if len(known) > REMEMBERED_WORDS:
            known.clear()
        new = list({word for words in pieces if words for word in words} - known.keys())
        known.update(zip(new, self._encode(new), strict=True))
        encoded = [
            np.frombuffer(next(whole) if words is None else b"".join(map(known.__getitem__, words)), np.int32)
            for words in pieces
        ]
        for word in new:
            if len(word) > REMEMBERED_LENGTH:
                del known[word]
        return encoded

    def _encode(self, texts: Iterable[str]) -> Iterator[bytes]:
        # The fast variant leaves out the offsets, which nobody reads here.
        for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield array("i", encoding.ids).tobytes()


_encoder = functools.lru_cache(maxsize=2)(_Encoder)


def _encode_fast(table: pa.Table, made_by: Any, **encode: Any) -> pa.Table:
    encoder = _encoder(**encode)  # by name, as above: else it is another entry of the cache
    ids: list[np.ndarray[Any, Any]] = []
    group: list[str] = []
    size = 0
    for text in table["text"].to_pylist():
        group.append(text)
        size += len(text)
        if size >= GROUP_CHARACTERS:
            ids += encoder.encode(group)
            group, size = [], 0
    return _table(ids + encoder.encode(group))


def _encode_slow(table: pa.Table, made_by: Any, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    import numpy as np

    encoded = tokenizer(
        table["text"].to_pylist(),
        add_special_tokens=False,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    return _table([np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]])


def _table(ids: list[np.ndarray[Any, Any]]) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    values = np.concatenate([np.empty(0, np.int32), *ids])
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
