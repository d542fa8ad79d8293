"""Two versions on one text, each by its own `score` signature and in a separate process, as a server would run it."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfclm.compat import import_tensorflow
from tfclm.errors import InputError
from tfclm.savedmodel.publishing.canary import CanaryFailed

__all__ = ["Compared", "compare", "pieces"]

LONGEST = 4096  # characters of a text that is scored at once; longer documents are cut
ROWS = 8  # texts of a call
TIMEOUT = 24 * 3600.0  # seconds that one version may take


@dataclass(frozen=True)
class Compared:
    """The perplexities of two versions on one text, of the same tokens; not finite where a version has diverged."""

    perplexity: float  # the new version's
    served: float
    tokens: int
    texts: int

    def record(self) -> dict[str, Any]:
        """As a verdict holds it."""
        return {
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "served_perplexity": self.served if math.isfinite(self.served) else None,
            "tokens": self.tokens,
            "texts": self.texts,
        }


@dataclass(frozen=True)
class _Scored:
    loss: float  # negative log-likelihood, summed
    tokens: int
    ids: str  # digest of the token ids

    @property
    def perplexity(self) -> float:
        mean = self.loss / self.tokens
        return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def pieces(documents: Iterable[str], tokenizer: Any) -> list[str]:
    """What both versions score, each text on its own, the shortest first.

    Documents longer than 4096 characters are cut, at white space if there is any. A text of one token has nothing to
    score, and is left out.
    """
    texts = [piece for document in documents for piece in _cut(document)]
    found = []
    for first in range(0, len(texts), 1000):
        some = texts[first : first + 1000]
        ids = tokenizer(some, verbose=False)["input_ids"]
        found += [text for text, row in zip(some, ids, strict=True) if len(row) > 1]
    return sorted(found, key=len)


def _cut(document: str) -> Iterable[str]:
    while len(document) > LONGEST:
        space = max(document.rfind(each, 1, LONGEST) for each in (" ", "\n"))
        end = space if space > 0 else LONGEST
        yield document[:end]
        document = document[end:]
    yield document


def compare(version: str, served: str, texts: Sequence[str]) -> Compared:
    """Scores the texts with the new version and with the one that is served.

    Args:
        version: the new version's folder.
        served: the folder or address of the one served now.
        texts: what `pieces` gave.

    Raises:
        InputError: the served version cannot score them, or counts other tokens; or there is no text to score.
        CanaryFailed: the new version cannot.
    """
    if not texts:
        raise InputError(
            "--max-regression: no text has the 2 tokens that a score needs; give another --dataset or --file"
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
            f"--max-regression: the version served now, {served}, cannot score the text ({problem[0]}); leave it out "
            "once"
        )
    if len(answers) == 1:
        raise CanaryFailed(f"the exported model cannot score the text: {problem[0]}")
    theirs, ours = (_Scored(**answer) for answer in answers)
    if ours.ids != theirs.ids:
        raise InputError(
            "--max-regression: the version served now has another tokenizer, and perplexities of other tokens cannot "
            "be compared; leave it out once"
        )
    return Compared(ours.perplexity, theirs.perplexity, ours.tokens, len(texts))


def _score_all() -> None:
    """The separate process: a JSON request on standard input, a JSON object for each version on standard output."""
    request = json.load(sys.stdin)
    import_tensorflow()
    for version in request["versions"]:
        print(json.dumps(vars(_score(version, request["texts"]))), flush=True)


def _score(version: str, texts: Sequence[str]) -> _Scored:
    import tensorflow as tf

    loaded = tf.saved_model.load(version)
    if "score" not in loaded.signatures:
        raise InputError("it has no signature score")
    loss, tokens, digest = 0.0, 0, hashlib.sha256()
    for first in range(0, len(texts), ROWS):
        outputs = loaded.signatures["score"](text=tf.constant([text.encode() for text in texts[first : first + ROWS]]))
        counts, ids = outputs["token_count"].numpy(), outputs["token_ids"].numpy()
        # In float64, and not by the float32 mean of each row.
        logprobs = outputs["token_logprobs"].numpy().astype(np.float64)
        for count, row, own in zip(counts, ids, logprobs, strict=True):
            loss -= float(own[1 : count + 1].sum())
            digest.update(row[: count + 1].astype("<i4").tobytes() + b"\xff" * 4)
        tokens += int(counts.sum())
    return _Scored(loss, tokens, digest.hexdigest())


if __name__ == "__main__":
    try:
        _score_all()
    except InputError as problem:
        sys.exit(str(problem))
    except Exception as failure:
        # TensorFlow says what is wrong somewhere in the middle of many lines.
        sys.exit(" ".join(f"{type(failure).__name__}: {failure}".split())[:400])
