"""Turns texts into token ids."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tfclm.corpus.cache import code_versions

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

# Characters per call of the tokenizer, whose internal record of a token takes a hundred times the memory of its id.
GROUP_CHARACTERS = 1 << 20
CACHED_WORDS = 1 << 18  # about 50 MB per process
CACHED_WORD_LENGTH = 64  # longer words are hardly ever repeated
# A word with the white space before it, or the white space at the end of a text.
_WORD = re.compile(r"\s*\S+|\s+")


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that a tokenizer puts before a text: the BOS of Llama, Gemma and Mistral; none for GPT-2 or Qwen.

    Example:
        >>> prefix_ids(AutoTokenizer.from_pretrained("mistralai/Mistral-7B-v0.1"))
        [1]
    """
    encoding = tokenizer("a", return_special_tokens_mask=True)
    return [
        number
        for number, _ in itertools.takewhile(
            lambda pair: pair[1], zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
        )
    ]


def tokenize(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None
) -> datasets.Dataset:
    """Tokenizes every text.

    The ids are those of `tokenizer(text, add_special_tokens=False)`: no BOS or EOS, because `pack` puts them where they
    belong. Nothing is truncated or padded, whatever the tokenizer is set to; the tokenizer is not changed.

    Args:
        texts: a dataset with a column "text".
        tokenizer: a tokenizer of transformers.
        num_proc: number of processes, each on one core. If None, a byte-level BPE tokenizer such as GPT-2's uses
            about one core; other fast tokenizers use all cores unless TOKENIZERS_PARALLELISM=false.

    Returns:
        A dataset in the datasets cache with one row per text and one column `input_ids`, a list of int32.

    Example:
        >>> list(tokenize(Dataset.from_dict({"text": ["Hello world"]}), tokenizer)["input_ids"])
        [[15496, 995]]
    """
    columns = texts.column_names
    encode: dict[str, Any] = encoder_arguments(tokenizer) if tokenizer.is_fast else {"tokenizer": tokenizer}
    if tokenizer.is_fast:
        # Built here, so that forked processes inherit it.
        fast_encoder(**encode)
    if num_proc is not None:
        num_proc = max(1, min(num_proc, len(texts)))
    tokens = texts.with_format("arrow").map(
        _encode_fast if tokenizer.is_fast else _encode_slow,
        batched=True,
        num_proc=num_proc,
        remove_columns=columns,
        fn_kwargs={"versions": code_versions(), **encode},
        desc="tokenizing",
    )
    return tokens.with_format(None)


def encoder_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments of the `FastEncoder` that gives the ids of a fast tokenizer."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:
        # Set by earlier calls; they would also give every run its own fingerprint.
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return {"backend": backend.to_str(), "split_special_tokens": tokenizer.split_special_tokens}


class FastEncoder:
    """The backend of a fast tokenizer, with a cache of words where words can be encoded independently.

    GPT-2's pre-tokenizer splits before every space that follows a word, whatever comes earlier in the text. So the ids
    of a text are those of its words, each with the white space before it, and most words are in the cache: the same
    ids as the backend's, several times faster.
    """

    def __init__(self, backend: str, split_special_tokens: bool) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel

        self._backend = Tokenizer.from_str(backend)
        # Not part of the serialized tokenizer.
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
        # Texts with added tokens, which are split off before words, or with white space beyond ASCII, which the regex
        # engines of Python and the tokenizer define differently, go to the backend whole.
        added = [re.escape(token.content) for token in self._backend.get_added_tokens_decoder().values()]
        self._not_by_word = re.compile("|".join([*added, r"[^\S\t-\r ]", "\u180e"]))
        self._words: dict[str, bytes] = {}  # int32 ids as bytes, which join faster than lists

    def encode(self, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        """The ids of each text, int32."""
        import numpy as np

        # The words of each text; None for a text that the backend encodes whole.
        split = [_WORD.findall(text) if self._can_split(text) else None for text in texts]
        whole = iter(self._encode(text for text, words in zip(texts, split, strict=True) if words is None))
        cached = self._words
        if len(cached) > CACHED_WORDS:
            cached.clear()
        missing = list({word for words in split if words for word in words} - cached.keys())
        cached.update(zip(missing, self._encode(missing), strict=True))
        encoded = [
            np.frombuffer(next(whole) if words is None else b"".join(map(cached.__getitem__, words)), np.int32)
            for words in split
        ]
        for word in missing:
            if len(word) > CACHED_WORD_LENGTH:
                del cached[word]
        return encoded

    def _can_split(self, text: str) -> bool:
        return self._by_word and not self._not_by_word.search(text)

    def _encode(self, texts: Iterable[str]) -> Iterator[bytes]:
        # The fast variant leaves out the offsets, which are not needed here.
        for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield array("i", encoding.ids).tobytes()


# Each process builds an encoder once.
fast_encoder = functools.lru_cache(maxsize=2)(FastEncoder)


def _encode_fast(table: pa.Table, versions: Any, **encode: Any) -> pa.Table:
    encoder = fast_encoder(**encode)  # keyword arguments, as in `tokenize`: lru_cache tells them from positional ones
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


def _encode_slow(table: pa.Table, versions: Any, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
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
