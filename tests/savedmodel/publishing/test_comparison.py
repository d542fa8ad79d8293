"""The gate by a text: two versions are scored on it, each by its own signature."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_config

from tfclm.errors import InputError
from tfclm.savedmodel import saving
from tfclm.savedmodel.publishing.canary import CanaryFailed
from tfclm.savedmodel.publishing.comparison import Comparison, compare, split_documents
from tfclm.savedmodel.publishing.gate import Gate, can_be_measured, decide_by_text, served_record


class Constant(tf.Module):
    """A model whose every byte is a token of the same log-probability: its perplexity is known."""

    def __init__(self, logprob: float, first_id: int = 0, name_of_signature: str = "score") -> None:
        super().__init__()
        self.logprob, self.first_id, self.name_of_signature = logprob, first_id, name_of_signature

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
    def score(self, text: Any) -> Any:
        joined = tf.io.decode_raw(tf.strings.reduce_join(text)[None], tf.uint8)[0]
        bytes_of = tf.RaggedTensor.from_row_lengths(tf.cast(joined, tf.int32), tf.strings.length(text))
        ids = bytes_of.to_tensor(-1) + self.first_id
        place, length = tf.range(tf.shape(ids)[1]), tf.strings.length(text)
        logprobs = tf.where((place > 0) & (place < length[:, None]), self.logprob, 0.0)
        return {"token_count": length - 1, "token_ids": ids, "token_logprobs": logprobs}


def version(folder: Path, *arguments: Any) -> str:
    """Such a model as a version."""
    model = Constant(*arguments)
    tf.saved_model.save(model, str(folder), signatures={model.name_of_signature: model.score})
    return str(folder)


def test_perplexities_of_both_are_known(tmp_path: Path):
    """A mean of the texts' means, padding or first tokens that count, or the two versions taken for each other."""
    new, served = version(tmp_path / "2", -math.log(8)), version(tmp_path / "1", -math.log(10))
    texts = ["ab", "größe", "x" * 300, *["words of some length"] * 20]
    compared = compare(new, served, texts)
    assert compared.perplexity == pytest.approx(8, rel=1e-6)
    assert compared.served == pytest.approx(10, rel=1e-6)
    assert (compared.tokens, compared.texts) == (sum(len(text.encode()) - 1 for text in texts), 23)


@pytest.mark.long
def test_what_cannot_be_compared(tmp_path: Path):
    """Perplexities of different tokens compared, or a traceback for a version that scores nothing."""
    good = version(tmp_path / "1", -1.0)
    with pytest.raises(InputError, match="the version served now has another tokenizer"):
        compare(good, version(tmp_path / "other", -1.0, 1), ["text"])
    mute = version(tmp_path / "mute", -1.0, 0, "other")
    with pytest.raises(InputError, match=r"/mute, cannot score the text \(it has no signature score\); leave it out"):
        compare(good, mute, ["text"])
    with pytest.raises(CanaryFailed, match="the exported model cannot score the text: it has no signature score"):
        compare(mute, good, ["text"])
    with pytest.raises(InputError, match="no text has the 2 tokens"):
        compare(good, good, [])
    assert not can_be_measured({})
    assert not can_be_measured({"signatures": ["generate_tokens"]})
    assert can_be_measured({"perplexity": None})


def test_a_diverged_model_is_not_published(tmp_path: Path):
    """A comparison with NaN, which is false whichever way it is asked."""
    nan, good = version(tmp_path / "2", math.nan), version(tmp_path / "1", -1.0)
    limits = Gate(max_regression=10.0)
    verdict = decide_by_text(limits, {"passed": True}, compare(nan, good, ["text"]))
    assert not verdict["passed"]
    assert verdict["reason"] == "the model has diverged and has no perplexity: train it again"
    assert json.loads(json.dumps(verdict, allow_nan=False))["compared"]["perplexity"] is None
    with pytest.raises(InputError, match="no finite perplexity on this text"):
        decide_by_text(limits, {"passed": True}, Comparison(5.0, math.nan, 3, 1))


@pytest.mark.parametrize(("new", "limit", "passed"), [(10.2, 0.02, True), (10.21, 0.02, False), (9.1, -0.1, False)])
def test_verdicts_by_text(new: float, limit: float, passed: bool):
    """A limit compared the wrong way round, or a verdict on the rest that is lost."""
    compared = Comparison(new, 10.0, 1000, 7)
    verdict = decide_by_text(Gate(max_regression=limit), {"passed": True, "perplexity": 20.0}, compared)
    assert verdict["passed"] is passed
    assert ("reason" in verdict) is not passed
    assert (verdict["perplexity"], verdict["max_regression"]) == (20.0, limit)
    expected = {"perplexity": new, "served_perplexity": 10.0, "tokens": 1000, "texts": 7}
    assert verdict["compared"] == expected


def test_split_documents_hold_the_whole_text(tokenizer: Any):
    """Text that is lost where a document is cut, or one token alone, which no version can score."""
    long = "some words and more " * 1000
    found = split_documents(["one document", long, "", "a", "y" * 9000], tokenizer)
    assert all(len(piece) <= 4096 for piece in found)
    assert [len(piece) for piece in found] == sorted(len(piece) for piece in found)
    assert sum(map(len, found)) == len("one document") + len(long) + 9000
    assert "a" not in found
    assert {piece[:5] for piece in found if "words" in piece} <= {"some ", " some", " word", " and ", " more"}


def make_model(seed: int) -> Any:
    """A tiny GPT-2."""
    import tf_keras

    from tfclm.checkpoint import create

    tf_keras.utils.set_random_seed(seed)
    return create(tiny_config("gpt2"))


@pytest.mark.long
def test_second_training_on_other_data_is_compared_on_one_text(
    tmp_path: Path, tokenizer: Any, documents: list[str], monkeypatch: pytest.MonkeyPatch
):
    """The gate's most natural use refused, because the served version was measured on another text."""
    from tfclm import export
    from tfclm.checkpoint import save
    from tfclm.metrics.perplexity import perplexity
    from tfclm.savedmodel.graph.signatures import GenerationModule
    from tfclm.savedmodel.settings import ServableSettings

    old, new = make_model(1), make_model(2)
    served = tmp_path / "m" / "1"
    served.mkdir(parents=True)
    saving.write(GenerationModule(old, tokenizer, ServableSettings()), served)
    saving.write_record(served, {"perplexity": 1.5, "tokens": 7, "protocol": {"source": "another text"}})
    save(new, tokenizer, tmp_path / "second")
    texts = [text[:100].replace("\n", " ") for text in documents[:12]]
    (tmp_path / "tickets.txt").write_text("\n\n".join(texts))
    (tmp_path / "second" / "results.json").write_text(
        json.dumps({"perplexity": 500.0, "tokens": 90, "protocol": {"source": "tickets"}})
    )
    monkeypatch.chdir(tmp_path)
    common = {"model": "second", "serving_dir": "m", "max_regression": 0.5}
    with pytest.raises(InputError, match=r"measured differently .*: give `dataset` or `file`, on which both are"):
        export.run(export.ExportSettings(**common))
    settings = export.ExportSettings(**common, file=("tickets.txt",), block_size=32)
    assert export.run(settings) == 0
    entries = served_record("m", Gate(max_regression=0.5))
    compared = entries["gate"]["compared"]
    scored = split_documents(export.documents(settings), tokenizer)

    def expected(model: Any) -> float:
        losses = [(perplexity(model, np.array([ids])), len(ids) - 1) for ids in tokenizer(scored)["input_ids"]]
        return math.exp(sum(score.loss * count for score, count in losses) / sum(count for _, count in losses))

    assert compared["perplexity"] == pytest.approx(expected(new), rel=1e-4)
    assert compared["served_perplexity"] == pytest.approx(expected(old), rel=1e-4)
    assert compared["perplexity"] != compared["served_perplexity"]
    # `max_perplexity` and the record use the perplexity by blocks.
    assert entries["protocol"]["block_size"] == 32
    assert entries["gate"]["perplexity"] == entries["perplexity"] != compared["perplexity"]
