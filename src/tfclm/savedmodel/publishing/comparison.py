"""Scores two versions on one text, each by its own `score` signature, in a separate process as a server would."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tfclm.compat import import_tensorflow
from tfclm.errors import InputError
from tfclm.savedmodel.publishing.canary import CanaryFailed
from tfclm.savedmodel.tokenizer.encoder import special_ids_around

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Comparison", "compare", "split_documents"]

MAX_CHARACTERS = 4096  # per text; longer documents are cut
ROWS = 8  # texts per call
TIMEOUT = 24 * 3600.0  # seconds for both versions


@dataclass(frozen=True)
class Comparison:
    """The perplexities of two versions on the same tokens; not finite where a version has diverged."""

    perplexity: float  # the new version's
    served: float
    tokens: int
    texts: int

    def record(self) -> dict[str, Any]:
        """The entries of a verdict."""
        return {
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "served_perplexity": self.served if math.isfinite(self.served) else None,
            "tokens": self.tokens,
            "texts": self.texts,
        }


@dataclass(frozen=True)
class _Score:
    loss: float  # summed negative log-likelihood
    tokens: int
    ids: str  # digest of the token ids

    @property
    def perplexity(self) -> float:
        mean = self.loss / self.tokens
        return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def split_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts to score, shortest first.

    Documents longer than 4096 characters are cut, at white space if there is any. Texts of one token, or of none after
    the tokens that are put before each, have nothing to score and are left out.
    """
    texts = [piece for document in documents for piece in _cut(document)]
    before, _ = special_ids_around(json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"])
    found = []
    for first in range(0, len(texts), 1000):
        batch = texts[first : first + 1000]
        ids = tokenizer(batch, verbose=False)["input_ids"]
        found += [text for text, row in zip(batch, ids, strict=True) if len(row) > max(1, len(before))]
    return sorted(found, key=len)


def _cut(document: str) -> Iterable[str]:
    while len(document) > MAX_CHARACTERS:
        space = max(document.rfind(each, 1, MAX_CHARACTERS) for each in (" ", "\n"))
        end = space if space > 0 else MAX_CHARACTERS
        yield document[:end]
        document = document[end:]
    yield document


def compare(version: str, served: str, texts: Sequence[str]) -> Comparison:
    """Scores texts with the new version and with the served one.

    Args:
        version: directory of the new version.
        served: directory or address of the version served now.
        texts: what `split_documents` gave.

    Raises:
        InputError: the served version cannot score the texts or has another tokenizer, or there is no text.
        CanaryFailed: the new version cannot score the texts.
    """
    if not texts:
        raise InputError(
            "`max_regression`: no text has the 2 tokens that a score needs; give another `dataset` or `file`"
        )
    command = [sys.executable, "-m", "tfclm.savedmodel.publishing.comparison"]
    request = json.dumps({"versions": [served, version], "texts": list(texts)})
    try:
        run = subprocess.run(command, input=request, capture_output=True, text=True, timeout=TIMEOUT)
        problem = run.stderr.strip().splitlines()[-1:] or [f"the process ended with code {run.returncode}"]
        answers = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    except subprocess.TimeoutExpired:
        problem, answers = [f"no answer within {TIMEOUT:g} seconds"], []
    if not answers:
        raise InputError(
            f"`max_regression`: the version served now, {served}, cannot score the text ({problem[0]}); leave it out "
            "once"
        )
    if len(answers) == 1:
        raise CanaryFailed(f"the exported model cannot score the text: {problem[0]}")
    theirs, ours = (_Score(**answer) for answer in answers)
    if ours.ids != theirs.ids:
        raise InputError(
            "`max_regression`: the version served now has another tokenizer, and perplexities of different tokens "
            "cannot be compared; leave it out once"
        )
    return Comparison(ours.perplexity, theirs.perplexity, ours.tokens, len(texts))


def _score_all() -> None:
    """Runs in the separate process: a JSON request on standard input, a JSON object per version on standard output."""
    request = json.load(sys.stdin)
    import_tensorflow()
    for version in request["versions"]:
        print(json.dumps(vars(_score_texts(version, request["texts"]))), flush=True)


def _score_texts(version: str, texts: Sequence[str]) -> _Score:
    import tensorflow as tf

    loaded = tf.saved_model.load(version)
    if "score" not in loaded.signatures:
        raise InputError("it has no signature score")
    loss, tokens, digest = 0.0, 0, hashlib.sha256()
    for first in range(0, len(texts), ROWS):
        outputs = loaded.signatures["score"](text=tf.constant([text.encode() for text in texts[first : first + ROWS]]))
        counts, ids = outputs["token_count"].numpy(), outputs["token_ids"].numpy()
        # Summed in float64: the signature's mean per row is float32.
        logprobs = outputs["token_logprobs"].numpy().astype(np.float64)
        for count, row, own in zip(counts, ids, logprobs, strict=True):
            loss -= float(own.sum())  # 0 for context and padding
            digest.update(row.astype("<i4").tobytes() + int(count).to_bytes(4, "little"))
        tokens += int(counts.sum())
    return _Score(loss, tokens, digest.hexdigest())


if __name__ == "__main__":
    try:
        _score_all()
    except InputError as problem:
        sys.exit(str(problem))
    except Exception as failure:
        # TensorFlow's messages have many lines, and the cause is somewhere in the middle.
        sys.exit(" ".join(f"{type(failure).__name__}: {failure}".split())[:400])
