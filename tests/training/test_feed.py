"""The feed: the batches of transformers' pipeline, in a given order."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tensorflow as tf
from transformers import DataCollatorForLanguageModeling

from tfclm.corpus import pack
from tfclm.training.feed import collator, feed
from tfclm.training.order import RunOrder, WorkerOrder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_blocks(count: int, block_size: int = 16) -> datasets.Dataset:
    """Blocks whose ids are all different from block to block, with an EOS (0) in each and at many ends."""
    ids = np.random.default_rng(0).integers(1, 512, (count, block_size))
    ids[:, 5] = 0
    ids[::3, -1] = 0
    tokens = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    return pack(tokens, block_size).blocks


def assert_same(found: tf.data.Dataset, wanted: tf.data.Dataset) -> None:
    """Equal structure, types and values, batch for batch."""
    found_batches, wanted_batches = list(found), list(wanted)
    assert len(found_batches) == len(wanted_batches)
    for one, other in zip(found_batches, wanted_batches, strict=True):
        tf.nest.assert_same_structure(one, other)
        for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mistral"])
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_batches_equal_those_of_transformers(architecture: str, drop_remainder: bool, make_model, tokenizer) -> None:
    """Catches a value, type or shape that differs from `prepare_tf_dataset` with transformers' collator."""
    model, blocks = make_model(architecture), make_blocks(75)
    order = np.random.default_rng(1).permutation(75)
    their_collator = DataCollatorForLanguageModeling(collator(tokenizer).tokenizer, mlm=False, return_tensors="tf")
    theirs = model.prepare_tf_dataset(
        blocks.select(order), batch_size=8, shuffle=False, drop_remainder=drop_remainder, collate_fn=their_collator
    )
    ours = feed(model, blocks, tokenizer, batch_size=8, order=order, drop_remainder=drop_remainder)
    assert_same(ours, theirs)
    assert ours.element_spec == theirs.element_spec
    assert int(ours.cardinality()) == int(theirs.cardinality()) == (9 if drop_remainder else 10)


def test_batches_equal_those_of_transformers_with_a_padding_token(make_model, tokenizer) -> None:
    """Catches a private pad token that changes the batches of a model whose pad is none of the text's ids."""
    model, blocks = make_model("opt"), make_blocks(20)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    their_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False, return_tensors="tf")
    theirs = model.prepare_tf_dataset(blocks, batch_size=8, shuffle=False, collate_fn=their_collator)
    assert_same(feed(model, blocks, tokenizer, batch_size=8), theirs)


def test_many_fetches_and_record_batches(make_model, tokenizer) -> None:
    """Catches rows taken from the wrong record batch, or lost where one fetch ends: 5 fetches, 3 record batches."""
    ids = np.random.default_rng(0).integers(0, 512, (20_480, 16)).astype(np.int32)
    parts = [make_table(ids[a:b]) for a, b in ((0, 7_000), (7_000, 7_001), (7_001, 20_480))]
    blocks = datasets.concatenate_datasets(parts)
    assert blocks.data.column(0).num_chunks == 3
    order = np.random.default_rng(1).integers(0, len(ids), 20_480)
    found = np.concatenate(
        [x["input_ids"] for x, _ in feed(make_model(), blocks, tokenizer, batch_size=24, order=order)]
    )
    np.testing.assert_array_equal(found, ids[order])


def make_table(ids: np.ndarray) -> datasets.Dataset:
    """Blocks in one record batch, not on disk."""
    import pyarrow as pa

    rows = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), ids.shape[1])
    return datasets.Dataset(pa.table({"input_ids": rows}))


@pytest.mark.parametrize("kind", ["slice", "shuffle"])
def test_feed_of_a_selection_of_blocks(kind: str, make_model, tokenizer) -> None:
    """Catches a feed that reads the whole table although the blocks are a part of it."""
    blocks = make_blocks(30)
    blocks = blocks.select(range(5, 25)) if kind == "slice" else blocks.shuffle(seed=3)
    rows = np.array(list(blocks["input_ids"]))
    order = np.arange(len(rows))[::-1]
    found = np.concatenate(
        [x["input_ids"] for x, _ in feed(make_model(), blocks, tokenizer, batch_size=8, order=order)]
    )
    np.testing.assert_array_equal(found, rows[::-1])


def test_resumed_order_continues_where_the_run_stopped(make_model, tokenizer) -> None:
    """Catches a resumed run that sees other batches than the uninterrupted one."""
    model, blocks = make_model(), make_blocks(21)
    all_batches, rest = (
        list(feed(model, blocks, tokenizer, batch_size=4, order=RunOrder(21, 4, 3, 5, start), drop_remainder=True))
        for start in (0, 7 * 4)
    )
    assert len(all_batches) == 15
    assert len(rest) == 8
    for (_, one), (_, other) in zip(all_batches[7:], rest, strict=True):
        np.testing.assert_array_equal(one, other)


def test_blocks_with_labels_keep_them(make_model, tokenizer) -> None:
    """Catches a BOS that is trained on although its label says that it is only context, or labels of other rows."""
    ids = np.random.default_rng(0).integers(2, 512, (20, 16))
    tokens = datasets.Dataset.from_dict({"input_ids": [*ids.tolist()]})
    blocks = pack(tokens, 8, prefix=[1]).blocks.shuffle(seed=1)
    rows = {name: np.array(list(blocks[name])) for name in ("input_ids", "labels")}
    assert (rows["labels"][:, 1:] == -100).any()
    order = np.random.default_rng(1).permutation(len(blocks))
    batches = list(feed(make_model(), blocks, tokenizer, batch_size=8, order=order))
    np.testing.assert_array_equal(
        np.concatenate([inputs["input_ids"] for inputs, _ in batches]), rows["input_ids"][order]
    )
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), rows["labels"][order])


def test_eos_keeps_its_label_and_the_tokenizer_is_left_alone(make_model, tokenizer) -> None:
    """Catches pad == EOS, which takes every EOS out of the loss, so that the model never learns to stop."""
    blocks = make_blocks(16)
    tokenizer.pad_token = tokenizer.eos_token
    length = len(tokenizer)
    for inputs, labels in feed(make_model(), blocks, tokenizer, batch_size=8):
        np.testing.assert_array_equal(labels, inputs["input_ids"])
        assert np.all(labels[:, 5] == 0)
        assert np.all(inputs["attention_mask"] == 1)
    assert (tokenizer.pad_token, len(tokenizer)) == ("<|endoftext|>", length)


def test_collator_pads_rows_of_unequal_length_as_transformers_does(tokenizer) -> None:
    """Catches the short way taken for rows that need padding; padding must be out of the loss, EOS in it."""
    own = collator(tokenizer)
    batch = own([{"input_ids": [5, 0]}, {"input_ids": [6, 7, 0]}])
    assert batch["labels"].numpy().tolist() == [[5, 0, -100], [6, 7, 0]]
    assert batch["attention_mask"].numpy().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["input_ids"][0, 2] == own.tokenizer.pad_token_id == len(tokenizer)


@pytest.mark.parametrize("rows", [[[5, 0], [6, 7]], [np.array([5, 0], np.int32), np.array([6, 7], np.int32)]])
def test_collator_alone_gives_tensors_as_transformers_does(tokenizer: Any, rows: list[Any]) -> None:
    """Catches a short way that hands out another kind of batch than return_tensors="tf" promises."""
    own = collator(tokenizer)
    examples = [{"input_ids": row} for row in rows]
    wanted = DataCollatorForLanguageModeling(own.tokenizer, mlm=False, return_tensors="tf")(examples)
    found = own(examples)
    assert found.keys() == wanted.keys()
    for name in found:
        assert isinstance(found[name], tf.Tensor)
        np.testing.assert_array_equal(found[name], wanted[name])


def test_model_trains_on_the_feed(make_model, tokenizer) -> None:
    """Catches a structure that Keras takes for something else than inputs and labels, or an unknown number of steps."""
    model, blocks = make_model("gpt2", context=16), make_blocks(12)
    model.compile(optimizer="sgd")
    order = RunOrder(12, 4, epochs=2, seed=0)
    batches = feed(model, blocks, tokenizer, batch_size=4, order=order, drop_remainder=True)
    history = model.fit(batches, epochs=2, steps_per_epoch=3, verbose=0)
    assert len(history.history["loss"]) == 2
    assert np.isfinite(history.history["loss"]).all()


def test_feed_outlives_the_names_of_what_it_reads(make_model, tokenizer) -> None:
    """Catches buffers that are unmapped while tf.data still reads them, and a second pass that finds nothing."""
    blocks = make_blocks(10)
    rows = np.array(list(blocks["input_ids"]))
    batches = feed(make_model(), blocks, tokenizer, batch_size=4)
    del blocks
    gc.collect()
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), rows)


def test_a_strategy_of_one_replica_gets_the_same_batches(make_model, tokenizer) -> None:
    """Catches all rows in one batch: TensorFlow's sharding for such a strategy leaves out `rebatch`."""
    batches = feed(make_model(), make_blocks(45), tokenizer, batch_size=14)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    found = list(strategy.experimental_distribute_dataset(batches))
    for (_, labels), (_, wanted) in zip(found, batches, strict=True):
        np.testing.assert_array_equal(labels, wanted)


def whole(order: RunOrder) -> np.ndarray:
    """All of an order."""
    return order[np.arange(len(order))]


def test_run_order_is_a_cut_permutation_each_epoch() -> None:
    """Catches a block seen twice in an epoch, and the same order or the same remainder in each."""
    epochs = whole(RunOrder(23, 5, epochs=3, seed=1)).reshape(3, 20)
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) <= set(range(23))
    left_out = [frozenset(range(23)) - set(epoch) for epoch in epochs]
    assert len(set(left_out)) > 1
    assert not np.array_equal(epochs[0], epochs[1])


def test_run_order_depends_on_seed_and_epoch_alone() -> None:
    """Catches an order that a longer run, a resumed run, another version or NumPy's global state would change."""
    order = whole(RunOrder(23, 5, epochs=3, seed=1))
    np.random.seed(99)
    np.testing.assert_array_equal(whole(RunOrder(23, 5, epochs=5, seed=1))[:60], order)
    np.testing.assert_array_equal(whole(RunOrder(23, 5, epochs=3, seed=1, start=27)), order[27:])
    assert not np.array_equal(whole(RunOrder(23, 5, epochs=3, seed=2)), order)
    assert len(RunOrder(23, 5, epochs=0, seed=1)) == 0
    # States that were saved by earlier versions resume in this order.
    generators = [np.random.default_rng([1, epoch]) for epoch in range(3)]
    permutations = [generator.permutation(np.arange(23, dtype=np.int32))[:20] for generator in generators]
    np.testing.assert_array_equal(order, np.concatenate(permutations))


def test_run_order_of_fewer_blocks_than_a_batch() -> None:
    """Catches an epoch of no steps when the text is small."""
    assert sorted(whole(RunOrder(3, 16, epochs=1, seed=0))) == [0, 1, 2]


def test_run_order_ends() -> None:
    """Catches a feed that goes on with epochs that the run does not have."""
    order = RunOrder(23, 5, epochs=3, seed=1, start=20)
    for positions in ([39, 40], [-1, 0]):
        with pytest.raises(IndexError, match="an order of 40 blocks"):
            order[np.array(positions)]


@pytest.mark.parametrize("count", [21, 22, 27])
def test_parts_of_workers(count: int) -> None:
    """Catches rows that two workers share or leave out, also in a short last batch, which may leave one without any."""
    order = np.random.default_rng(0).permutation(count)
    parts = [WorkerOrder(order, 7, replicas=3, first=first, local=local) for first, local in ((0, 1), (1, 2))]
    taken = [part[np.arange(len(part))] for part in parts]
    for start in range(0, count, 7):
        batch = order[start : start + 7]
        own = [len(each) for each in np.array_split(batch, 3)]
        for part, rows in enumerate((own[0], own[1] + own[2])):
            found, taken[part] = taken[part][:rows], taken[part][rows:]
            np.testing.assert_array_equal(found, batch[:rows] if part == 0 else batch[-rows:] if rows else [])
    assert [len(each) for each in taken] == [0, 0]
