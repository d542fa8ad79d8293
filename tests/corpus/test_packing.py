"""Blocks: every id once, in order, against a naive reference."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from tfclm.corpus import Packed, check_block_size, check_vocabulary, pack, tokenize
from tfclm.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def naive(documents: list[list[int]], block_size: int, separator: list[int]) -> tuple[list[list[int]], int]:
    """The blocks and the number of tokens, one token at a time."""
    stream = [token for document in documents for token in [*document, *separator]]
    blocks = [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
    return blocks, len(stream)


def check(packed: Packed, documents: list[list[int]], block_size: int, separator: list[int]) -> None:
    """Compare with the naive reference."""
    blocks, count = naive(documents, block_size, separator)
    assert list(packed.blocks["input_ids"]) == blocks
    assert packed.tokens == count
    assert packed.dropped_tokens == count - len(blocks) * block_size
    assert packed.dropped_tokens < block_size
    assert packed.largest_id == max(token for document in [*documents, separator] for token in document)


def dataset(documents: list[list[int]], batch: int | None = None) -> datasets.Dataset:
    """Documents in record batches of `batch` rows."""
    table = pa.table({"input_ids": pa.array(documents, pa.list_(pa.int32()))})
    return datasets.Dataset(pa.Table.from_batches(table.to_batches(batch)) if batch else table)


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_naive_reference(seed: int) -> None:
    """Catches any id lost, doubled or moved: at batch ends, around empty documents, in slices and shuffles."""
    draw = random.Random(seed)
    documents = [
        [draw.randrange(50_000) for _ in range(draw.choice([0, 0, 1, 2, 7, 30, 300]))]
        for _ in range(draw.randint(3, 60))
    ]
    documents.append([1, 2])
    block_size = draw.choice([2, 3, 8, 64])
    separator = draw.choice([[], [7], [50_256], [3, 4, 5]])
    documents.append([9] * block_size)
    rows = dataset(documents, draw.choice([None, 1, 2, 5]))
    kind = draw.choice(["whole", "slice", "select", "shuffle", "offset"])
    if kind == "slice":
        rows = rows.select(range(1, len(rows)))
        documents = documents[1:]
    elif kind == "select":
        chosen = [*draw.sample(range(len(rows)), len(rows) // 2), len(rows) - 1, len(rows) - 1]
        rows, documents = rows.select(chosen), [documents[i] for i in chosen]
    elif kind == "shuffle":
        rows = rows.shuffle(seed=seed)
        documents = list(rows["input_ids"])
    elif kind == "offset":
        padded = pa.array([[0, 0, 0], *documents, [1]], pa.list_(pa.int32())).slice(1, len(documents))
        assert padded.offset == 1
        rows = datasets.Dataset(pa.table({"input_ids": padded}))
    check(pack(rows, block_size, separator), documents, block_size, separator)


def naive_with_prefix(
    documents: list[list[int]], block_size: int, separator: list[int], prefix: list[int]
) -> tuple[list[list[int]], list[list[int]], int]:
    """The blocks, their labels and the number of dropped tokens, one token at a time."""
    begins_with_separator = separator[-len(prefix) :] == prefix
    blocks, labels = [], []
    block, block_labels = [*prefix], [-100] * len(prefix)
    for document in documents:
        head = [] if begins_with_separator else [(token, -100) for token in prefix]
        for token, label in [*head, *((token, token) for token in [*document, *separator])]:
            if label == -100 and len(block) == len(prefix):
                continue  # the block begins with the document, and has its prefix
            block.append(token)
            block_labels.append(label)
            if len(block) == block_size:
                blocks.append(block)
                labels.append(block_labels)
                block, block_labels = [*prefix], [-100] * len(prefix)
    return blocks, labels, sum(label != -100 for label in block_labels)


@pytest.mark.parametrize("seed", range(30))
def test_prefix_equals_the_naive_reference(seed: int) -> None:
    """Catches a block or document without its BOS, one with two, a BOS that is a target, or a token that is none."""
    draw = random.Random(seed)
    documents = [
        [draw.randrange(100, 50_000) for _ in range(draw.choice([0, 1, 2, 7, 30]))] for _ in range(draw.randint(3, 60))
    ]
    documents.append([100] * 64)
    prefix = draw.choice([[1], [1], [1, 2]])
    separator = draw.choice([[], [7], [5, *prefix], prefix])
    block_size = draw.choice([3, 8, 64])
    blocks, labels, dropped = naive_with_prefix(documents, block_size, separator, prefix)
    packed = pack(dataset(documents, draw.choice([None, 1, 5])), block_size, separator, prefix)
    assert list(packed.blocks["input_ids"]) == blocks
    assert list(packed.blocks["labels"]) == labels
    assert packed.dropped_tokens == dropped
    assert packed.tokens == sum(len(document) + len(separator) for document in documents)
    assert packed.predicted_tokens == sum(label != -100 for row in labels for label in row)


def test_blocks_without_a_prefix_have_no_labels() -> None:
    """Catches blocks of GPT-2 or Qwen that take twice the room, or those of a model with a BOS taken from the cache."""
    rows = dataset([[1, 2], [3, 4]])
    assert pack(rows, 2).blocks.column_names == ["input_ids"]
    assert list(pack(rows, 2, prefix=[9]).blocks["input_ids"]) == [[9, 1], [9, 2], [9, 3], [9, 4]]
    assert pack(rows, 2, prefix=[8]).blocks["input_ids"][0] == [8, 1]
    assert pack(rows, 2, prefix=[600]).largest_id == 600
    assert list(pack(rows, 2).blocks["input_ids"]) == [[1, 2], [3, 4]]


def test_block_size_with_a_prefix_is_checked() -> None:
    """Catches blocks that hold the prefix alone, and advice to give a block size that does not fit either."""
    with pytest.raises(InputError, match="`block_size` 2 leaves no token to predict: give 3 or more"):
        pack(dataset([[1, 2]]), 2, prefix=[8, 9])
    with pytest.raises(
        InputError, match="the text has 3 tokens, less than one block of 6: give `block_size` 5 or less"
    ):
        pack(dataset([[1, 2], [3]]), 6, prefix=[9])
    assert list(pack(dataset([[1, 2], [3]]), 5, prefix=[9]).blocks["input_ids"]) == [[9, 1, 2, 9, 3]]


def test_many_batches_leave_one_remainder(tmp_path: Path) -> None:
    """Catches a remainder dropped for every batch: here more than one batch is read."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 2_000, 9_000)
    values = draw.integers(0, 50_000, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = datasets.Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, values)}))
    packed = pack(rows, 1_000, [50_256])
    assert packed.blocks.data.column(0).num_chunks > 1
    found = np.concatenate([chunk.flatten().to_numpy() for chunk in packed.blocks.data.column(0).chunks])
    stream = np.insert(values, offsets[1:], 50_256)
    assert packed.tokens == len(stream)
    assert packed.dropped_tokens == len(stream) % 1_000
    np.testing.assert_array_equal(found, stream[: len(found)])


@pytest.mark.parametrize("num_proc", [None, 2, 3])
@pytest.mark.parametrize("batch", [1, 7, None])
def test_blocks_do_not_depend_on_how_the_text_was_tokenized(
    tokenizer,
    documents: list[str],
    num_proc: int | None,
    batch: int | None,
) -> None:
    """Catches blocks that change with the number of processes or the layout of the file."""
    table = pa.table({"text": documents[:30]})
    texts = datasets.Dataset(pa.Table.from_batches(table.to_batches(batch)))
    ids = [tokenizer(text)["input_ids"] for text in documents[:30]]
    check(pack(tokenize(texts, tokenizer, num_proc), 64, [0]), ids, 64, [0])


def test_blocks_are_int32_of_fixed_length_on_disk() -> None:
    """Catches blocks held in memory, or widened to int64 with offsets: twice the room and slower reads."""
    blocks = pack(dataset([[1, 2, 3, 4, 5]]), 2).blocks
    assert blocks.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=2)})
    assert len(blocks.cache_files) == 1


def test_int64_ids_are_accepted() -> None:
    """Catches a crash on a dataset that was tokenized elsewhere, where ids are int64."""
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]})
    assert list(pack(rows, 2, [9]).blocks["input_ids"]) == [[1, 2], [9, 3]]


def test_cache_knows_rows_block_size_and_separator() -> None:
    """Catches blocks of another setting, or of other text, handed out from the cache; and a cache never hit."""
    rows = dataset([[1, 2, 3, 4, 5, 6]])
    first = pack(rows, 2, [9])
    assert pack(rows, 2, [9]).blocks.cache_files == first.blocks.cache_files
    assert pack(rows, 2, [9]).dropped_tokens == first.dropped_tokens == 1
    assert list(pack(rows, 3, [9]).blocks["input_ids"]) == [[1, 2, 3], [4, 5, 6]]
    assert list(pack(rows, 2, [8]).blocks["input_ids"]) == list(first.blocks["input_ids"])
    assert pack(rows, 2, [8]).largest_id == 8
    assert list(pack(rows.select([0, 0]), 2).blocks["input_ids"])[3] == [1, 2]


def test_text_shorter_than_a_block() -> None:
    """Catches a run with no blocks at all; the way out must be a block size that fits."""
    with pytest.raises(
        InputError, match=r"the text has 5 tokens, less than one block of 6: give `block_size` 5 or less"
    ):
        pack(dataset([[1, 2], [3]]), 6, [9])
    assert len(pack(dataset([[1, 2], [3]]), 5, [9]).blocks) == 1
    with pytest.raises(InputError, match=r"0 tokens.*give more text"):
        pack(dataset([[], []]), 6)


@pytest.mark.parametrize("block_size", [1, 0, -5])
def test_block_without_a_prediction(block_size: int) -> None:
    """Catches a division by zero, or a loss over no token."""
    with pytest.raises(InputError, match=f"`block_size` {block_size} "):
        pack(dataset([[1, 2]]), block_size)


def test_block_size_must_fit_the_context() -> None:
    """Catches position ids beyond the model's table, which a GPU answers with zeros instead of an error."""
    with pytest.raises(InputError, match=r"`block_size` 2048 .*context of 1024 tokens: give 1024 or less"):
        check_block_size(2048, 1024)
    check_block_size(1024, 1024)
    check_block_size(2048, None)


def test_ids_must_fit_the_vocabulary() -> None:
    """Catches a tokenizer of another model, whose ids an embedding on a GPU looks up as zeros."""
    with pytest.raises(InputError, match=r"token id 512, .* 512 entries"):
        check_vocabulary(512, 512)
    check_vocabulary(511, 512)
