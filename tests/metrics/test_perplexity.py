"""Perplexity: known answers, and equality with a plain loop in float64."""

from __future__ import annotations

import json
import math
import tracemalloc
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tensorflow as tf
from conftest import ARCHITECTURES, put_bos

from tfclm.cli.evaluation import evaluate
from tfclm.corpus import pack, read_split, tokenize
from tfclm.corpus.settings import SourceSettings
from tfclm.metrics.bits import bits_per_byte
from tfclm.metrics.perplexity import Perplexity, TokenLoss, perplexity, sum_losses, token_losses

TIMES = 40  # how much longer the longer text is whose memory is measured


def reference(model, windows) -> tuple[float, int, float]:
    """Mean loss, count and standard error by a plain loop: one row at a time, log-softmax in float64."""
    losses = []
    for ids, scored in windows:
        logits = model(input_ids=tf.constant([ids]), training=False).logits.numpy()[0].astype(np.float64)
        for position in range(1, len(ids)):
            if position >= len(ids) - scored:
                row = logits[position - 1]
                losses.append(np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[ids[position]])
    return float(np.mean(losses)), len(losses), float(np.std(losses, ddof=1) / math.sqrt(len(losses)))


@pytest.mark.parametrize(
    "architecture", ["gpt2", *(pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES if name != "gpt2")]
)
def test_blocks_equal_a_plain_loop(make_model, architecture: str):
    """A mean of batch means: with 7 blocks in batches of 3 the last block would count three times."""
    model = make_model(architecture)
    blocks = np.random.default_rng(0).integers(2, 512, (7, 24))
    loss, tokens, error = reference(model, [(row, 24) for row in blocks])
    for batch_size in (1, 3, 7, 100):
        score = perplexity(model, blocks, batch_size=batch_size)
        assert score.tokens == tokens == 7 * 23
        # Logits in float32 leave about 1e-6 of a loss near 6.
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert score.loss_standard_error == pytest.approx(error, rel=1e-4)
        assert score.standard_error == pytest.approx(math.exp(loss) * error, rel=1e-4)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 32, 16), (33, 32, 1), (64, 32, 31), (20, 32, 8), (96, 32, 32)]
)
def test_strided_equals_the_fixed_length_protocol(make_model, length: int, window: int, stride: int):
    """A token scored twice or never, or with less context than the protocol gives it."""
    model = make_model("gpt2")
    ids = np.random.default_rng(length).integers(0, 512, length)
    windows, end_before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        windows.append((ids[begin:end], end - end_before))
        end_before = end
        if end == length:
            break
    loss, tokens, _ = reference(model, windows)
    score = perplexity(model, ids, window=window, stride=stride, batch_size=3)
    assert score.tokens == tokens
    if stride < window:
        assert tokens == length - 1
    assert score.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("prefix", [[7], [7, 8]])
@pytest.mark.parametrize(("length", "stride"), [(100, 16), (30, 4), (90, None)])
def test_each_window_begins_with_the_prefix(make_model, prefix: list[int], length: int, stride: int | None):
    """Windows without the BOS, one that takes no room in the context, or a prefix that is scored or there twice."""
    model, text = make_model("gpt2"), np.random.default_rng(length).integers(9, 512, length).tolist()
    room = 32 - len(prefix)
    windows, end_before = [], 0
    for begin in range(0, length, stride or room):
        end = min(begin + room, length)
        windows.append((prefix + text[begin:end], end - end_before))
        end_before = end
        if end == length:
            break
    loss, tokens, _ = reference(model, windows)
    assert tokens == length
    for ids in (text, prefix + text):
        score = perplexity(model, ids, window=32, stride=stride, prefix=prefix, batch_size=3)
        assert score.tokens == tokens
        assert score.loss == pytest.approx(loss, rel=1e-5)


def test_each_block_begins_with_the_prefix(make_model):
    """A BOS that is missing, scored or there twice, in blocks that have it and in blocks that do not."""
    model, blocks = make_model("gpt2"), np.random.default_rng(0).integers(9, 512, (5, 20))
    rows = [[7, 8, *block] for block in blocks.tolist()]
    loss, tokens, _ = reference(model, [(row, 20) for row in rows])
    for given in (blocks, np.array(rows), datasets.Dataset.from_dict({"input_ids": rows})):
        score = perplexity(model, given, prefix=[7, 8], batch_size=3)
        assert score.tokens == tokens == 100
        assert score.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("window", [None, 24])
def test_evaluation_with_a_bos_equals_a_plain_loop(tmp_path, make_model, tokenizer, documents, monkeypatch, window):
    """Blocks or windows without the BOS, whose perplexity is far too high, and a protocol that does not name it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, tokenizer = make_model("mistral", vocab_size=513), put_bos(tokenizer)
    texts = [document[:200] for document in documents[30:36]]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    losses = []

    def score(row: list[int], targets: list[bool]) -> None:
        logits = model(input_ids=tf.constant([[512, *row]]), training=False).logits.numpy()[0].astype(np.float64)
        for logit, token, target in zip(logits, row, targets, strict=False):
            if target:
                losses.append(np.log(np.sum(np.exp(logit - logit.max()))) + logit.max() - logit[token])

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    stride = window and 10
    if window:
        ids, end_before = encode("\n\n".join(texts)), 0
        for begin in range(0, len(ids), stride):
            end = min(begin + window - 1, len(ids))
            score(ids[begin:end], [place >= end_before for place in range(begin, end)])
            end_before = end
            if end == len(ids):
                break
        size = len("\n\n".join(texts).encode())
    else:
        # Text ids are True; a document's BOS is there unless a block begins with the document.
        stream = [pair for text in texts for pair in [(512, False), *((id, True) for id in [*encode(text), 0])]]
        row, dropped = [], 0
        for pair in stream:
            if row or pair[1]:
                row.append(pair)
            if len(row) == 31:
                score([id for id, _ in row], [is_text for _, is_text in row])
                row = []
        dropped = [id for id, is_text in row if is_text]
        size = len("".join(texts).encode()) - len(tokenizer.decode(dropped, skip_special_tokens=True))
    result = evaluate(
        model,
        tokenizer,
        SourceSettings(block_size=None if window else 32),
        split="",
        files=[str(tmp_path / "text.jsonl")],
        stride=stride,
        window=window,
    )
    assert result["tokens"] == len(losses)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["protocol"]["prefix"] == ["<s>"]
    assert result["bytes"] == size
    assert result["bits_per_byte"] == pytest.approx(np.sum(losses) / np.log(2) / size, rel=1e-5)
    assert window or result["protocol"]["dropped_tokens"] == len(dropped)


def test_bits_per_byte():
    """Nats, or bits per token, called bits per byte; a division by no bytes."""
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
    assert bits_per_byte(math.log(4), 30, 15) == pytest.approx(4)
    assert bits_per_byte(1.0, 10, None) is None
    assert bits_per_byte(1.0, 10, 0) is None


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    """A shift by one, or a log of another base."""

    def uniform(input_ids, training):
        return SimpleNamespace(logits=tf.zeros([*tf.unstack(tf.shape(input_ids)), 50]))

    score = perplexity(uniform, np.arange(40).reshape(4, 10))
    assert score.perplexity == pytest.approx(50, rel=1e-6)
    assert score.loss_standard_error == pytest.approx(0, abs=1e-6)


def test_ignored_labels_count_for_nothing():
    """A label of -100 that is scored as token 0, or counted."""
    logits = tf.random.stateless_normal((2, 4, 9), seed=(1, 2))
    labels = tf.constant([[1, 2, -100, 3], [4, -100, -100, -100]])
    losses, mask = token_losses(logits, labels)
    assert mask.numpy().tolist() == [[True, False, True], [False] * 3]
    expected = -tf.nn.log_softmax(logits).numpy()[0, [0, 2], [2, 3]]
    np.testing.assert_allclose(losses.numpy()[mask.numpy()], expected, rtol=1e-6)
    assert not losses.numpy()[~mask.numpy()].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_the_loss_is_that_of_tensorflow(compiled: bool):
    """A gradient for labels of -100, for the last position, or of another scale."""
    logits = 20 * tf.random.stateless_normal((2, 5, 9), seed=(1, 2))
    labels = tf.constant([[1, 2, -100, 3, 8], [4, -100, -100, -100, 0]])

    @tf.function(jit_compile=compiled)
    def compute_gradient(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses, _ = token_losses(logits, labels)
            loss = tf.reduce_sum(losses * losses)
        return tape.gradient(loss, logits)

    with tf.GradientTape() as tape:
        tape.watch(logits)
        targets = tf.maximum(labels[:, 1:], 0)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits[:, :-1])
        loss = tf.reduce_sum(tf.where(labels[:, 1:] == -100, 0.0, losses * losses))
    np.testing.assert_allclose(compute_gradient(logits), tape.gradient(loss, logits), rtol=1e-5, atol=1e-6)


def test_loss_of_bfloat16_logits_is_float32():
    """A loss in bfloat16 moves in steps of 1/16 near 10."""
    logits = tf.cast(tf.random.stateless_normal((1, 50, 40000), seed=(1, 2)), tf.bfloat16)
    losses, _ = token_losses(logits, tf.range(50)[None])
    exact, _ = token_losses(tf.cast(logits, tf.float64), tf.range(50)[None])
    assert losses.dtype == tf.float32
    np.testing.assert_allclose(losses, exact, rtol=1e-6)


def test_metric_sums_over_batches():
    """Keras' own mean of batch means."""
    metric = TokenLoss()
    assert math.isnan(metric.result())
    metric.update_state(sum_losses(tf.constant([[1.0, 2.0, 6.0]]), tf.constant([[True, True, True]])))
    metric.update_state(sum_losses(tf.constant([[1.0, 0.0, 0.0]]), tf.constant([[True, False, False]])))
    assert metric.result().numpy() == 2.5
    metric.reset_state()
    metric.update_state(sum_losses(tf.constant([[4.0]]), tf.constant([[True]])))
    assert metric.result().numpy() == 4.0


class Table:
    """The cheapest of models: the logits of a token's successor are a row of a table."""

    base_model_prefix = "table"

    def __init__(self, logits: np.ndarray):
        self.logits = tf.constant(logits, tf.float32)
        self.config = SimpleNamespace(max_position_embeddings=64, vocab_size=len(logits))

    def __call__(self, input_ids, training):
        return SimpleNamespace(logits=tf.gather(self.logits, input_ids))


def test_a_dataset_of_blocks_has_the_score_of_its_array():
    """Rows that are lost, doubled or batched differently when they are read a thousand at a time."""
    random = np.random.default_rng(0)
    model = Table(random.normal(size=(512, 512)))
    blocks = random.integers(2, 512, (2103, 4)).astype(np.int32)
    dataset = datasets.Dataset.from_dict({"input_ids": blocks})
    for batch_size in (7, 64):
        assert perplexity(model, dataset, batch_size=batch_size) == perplexity(model, blocks, batch_size=batch_size)
    chosen = dataset.select([5, 3, 3])
    assert perplexity(model, chosen) == perplexity(model, blocks[[5, 3, 3]])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    """A text of gigabytes whose tokens are all in memory before the first of them is scored."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = Table(np.zeros((len(tokenizer), len(tokenizer))))
    peaks = []
    for times in (1, 1, TIMES):  # what the first run makes, once and for all, is not counted
        path = tmp_path / f"{times}.txt"
        path.write_text("To be, or not to be, that is the question.\n" * 2000 * times)
        settings = SourceSettings(block_size=64)
        texts = read_split(files=[str(path)]).texts
        pack(tokenize(texts, tokenizer), 64, settings.separator_ids(tokenizer))  # in the cache now
        tracemalloc.start()
        result = evaluate(model, tokenizer, settings, split="", files=[str(path)], batch_size=64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result["perplexity"] == pytest.approx(len(tokenizer), rel=1e-6)
    tokens = result["tokens"] * 4
    assert tokens > 1e5 * TIMES
    assert peaks[2] - peaks[1] < tokens / 4, (peaks, tokens)


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"window": 1}, {"window": 8, "stride": 9}, {"window": 8, "stride": 0}),
        *({"window": 1, "prefix": [1]}, {"window": 8, "stride": 8, "prefix": [1]}),
    ],
)
def test_what_cannot_be_scored_is_refused(make_model, options):
    """A window without a token to predict, or a stride that leaves tokens out, must not give a number."""
    with pytest.raises(ValueError, match=r"window|stride"):
        perplexity(make_model("gpt2"), np.arange(20), **options)


def test_one_token_is_no_text(make_model):
    """0 / 0 must not be reported as a perplexity of NaN."""
    with pytest.raises(ValueError, match="no token to score"):
        perplexity(make_model("gpt2"), np.array([5]), window=8)
    assert Perplexity(loss=1e4, tokens=1, loss_standard_error=0.0).perplexity == math.inf
