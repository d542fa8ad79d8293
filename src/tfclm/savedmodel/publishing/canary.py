"""The canary: a finished version, loaded in a new process with a server's stock settings, before it is published.

As TFX's InfraValidator does: warm-up records are replayed, prompts must give the tokens of the Python model, and texts
the ids of the fast tokenizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tfclm.compat import disable_xla, import_tensorflow
from tfclm.terminal import log

__all__ = ["CanaryFailed", "Prompt", "Text", "make_prompts", "make_texts", "peak_memory_mib", "validate"]

NEW_TOKENS = 8
LONGEST = 2048  # tokens of a context that is filled; the attention of more takes gigabytes
TIE = 1e-3  # difference of two logits below which rounding may choose either token
TIMEOUT = 3600.0  # seconds; XLA compiles every size that is warmed up

# English with digits and indented code; other scripts, spaces and emoji; and bytes that are no UTF-8.
TEXTS = (
    b"It's 12,345.67 today, isn't it?\n\n    def f(x):\n\treturn x + 1  # they'll see\n",
    "Größe, naïve cafe\u0301 \u00a0 数値は１２３。 Ελλάδα, русский; العربية हिन्दी 한국어\u2003👩‍👩‍👧 🇯🇵!".encode(),
    b"caf\xe9 \xff\xfe and so on",
)


class CanaryFailed(RuntimeError):
    """A finished version does not do what the Python model does; it was not published."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, how many new ones are asked for, and what the Python model may give: several ids at a near-tie."""

    ids: list[int]
    new: int
    allowed: list[list[int]]


@dataclass(frozen=True)
class Text:
    """A text, and the ids that the fast tokenizer gives for it."""

    text: bytes
    ids: list[int]


def make_texts(tokenizer: Any, context: int) -> list[Text]:
    """Texts that `score` takes, of several scripts, cut to what the context holds."""
    texts = []
    for raw in TEXTS:
        # Where bytes are no UTF-8, the graph's tokenizer sees what Python does.
        while len(ids := tokenizer(raw.decode(errors="replace"), verbose=False)["input_ids"]) > context and raw:
            raw = raw[: len(raw) // 2]
        if len(ids) > 1:
            texts.append(Text(raw, ids))
    return texts


def make_prompts(
    model: Any, vocab_size: int, context: int, eos_ids: Sequence[int], limit: int = NEW_TOKENS
) -> list[Prompt]:
    """Prompts of several lengths, with the tokens, `limit` at most, that transformers' greedy `generate` gives.

    The longest one and its tokens fill the context.
    """
    import tensorflow as tf

    rng = np.random.default_rng(0)
    new = min(NEW_TOKENS, limit, context - 1)
    prompts = []
    for length in sorted({min(length, context - new) for length in (1, 7, 40, LONGEST - new)}):
        ids = rng.integers(0, vocab_size, [1, length]).astype(np.int32)
        given = model.generate(
            tf.constant(ids),
            attention_mask=tf.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=eos_ids[0] if eos_ids else 0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = given.sequences[0, length:].numpy()
        logits = [scores[0].numpy().astype(np.float32) for scores in given.scores]
        allowed = [np.flatnonzero(row >= row[token] - TIE).tolist() for row, token in zip(logits, tokens, strict=True)]
        prompts.append(Prompt(ids[0].tolist(), new, allowed))
    return prompts


def validate(
    version: Path,
    prompts: Sequence[Prompt] = (),
    texts: Sequence[Text] = (),
    *,
    xla: bool,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Loads the version in a fresh process, replays its warm-up records and asks it the prompts and texts.

    Args:
        version: its folder.
        prompts: what `generate_tokens` is asked.
        texts: what `score` is asked.
        xla: whether the server is one that compiles.
        timeout: seconds that all of it may take.

    Returns:
        Times in seconds, peak memory in MiB and the number of records.

    Raises:
        CanaryFailed: it does not load, a record fails, a token differs from the Python model's or an id from the
            tokenizer's, or it takes too long.
    """
    request = {
        "version": str(version),
        "xla": xla,
        "prompts": [(prompt.ids, prompt.new) for prompt in prompts],
        # JSON has no bytes; these are characters of the same numbers.
        "texts": [text.text.decode("latin-1") for text in texts],
    }
    answer = _ask(request, timeout)
    for number, (prompt, tokens) in enumerate(zip(prompts, answer.pop("tokens"), strict=True)):
        _check_tokens(f"canary prompt {number}", prompt, tokens)
    for number, (text, ids) in enumerate(zip(texts, answer.pop("ids"), strict=True)):
        if ids != text.ids:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, text.ids, strict=False)))
            given, wanted = ids[same : same + 4], text.ids[same : same + 4]
            raise CanaryFailed(f"canary text {number}: ids {given} at {same}, where the tokenizer gives {wanted}")
    return answer


def peak_memory_mib() -> float | None:
    """The most memory that this process has held, in MiB; None where the system does not tell."""
    # Not getrusage, by which a new process begins with its parent's peak.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def _ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    try:
        run = subprocess.run(
            [sys.executable, "-m", "tfclm.savedmodel.publishing.canary"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise CanaryFailed(f"the exported model cannot be served: no answer within {timeout:g} seconds") from error
    if run.returncode != 0:
        lines = [line for line in run.stderr.splitlines() if line.strip()] or [f"it ended with code {run.returncode}"]
        raise CanaryFailed(f"the exported model cannot be served: {lines[-1]}")
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def _check_tokens(name: str, prompt: Prompt, tokens: Sequence[int]) -> None:
    for place, (token, allowed) in enumerate(zip(tokens, prompt.allowed, strict=False)):
        if token not in allowed:
            raise CanaryFailed(f"{name}: new token {place} is {token}, where the Python model gives {allowed[0]}")
        if len(allowed) > 1:
            return  # behind a near-tie the texts may part
    if len(tokens) != len(prompt.allowed):
        wanted = f"where the Python model gives {len(prompt.allowed)}"
        raise CanaryFailed(f"{name}: {len(tokens)} new tokens, {wanted}")


def _serve() -> None:
    """The fresh process: one JSON request on standard input, one JSON answer on standard output."""
    import time

    request = json.load(sys.stdin)
    import_tensorflow()
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    from tfclm.savedmodel.warmup import PATH

    if not request["xla"]:
        # As a server does that was not started with --xla_cpu_compilation_enabled.
        problem = disable_xla()
        if problem is not None:
            log(f"XLA cannot be turned off in this build of TensorFlow ({problem}): ops that need it are not found")
    began = time.monotonic()
    loaded = tf.saved_model.load(request["version"])
    times = {"load_seconds": time.monotonic() - began}
    began = time.monotonic()
    records = 0
    path = f"{request['version']}/{PATH}"
    # Somebody else's version may have none.
    for record in tf.data.TFRecordDataset(path) if Path(path).exists() else ():
        warm_up = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in warm_up.inputs.items()}
        loaded.signatures[warm_up.model_spec.signature_name](**inputs)
        records += 1
    times["warmup_seconds"] = time.monotonic() - began
    tokens = []
    for ids, new in request["prompts"]:
        outputs = loaded.signatures["generate_tokens"](
            input_ids=tf.constant([ids]),
            attention_mask=tf.ones([1, len(ids)], tf.int32),
            max_new_tokens=tf.constant([new]),
            temperature=tf.constant([0.0]),
            top_k=tf.constant([0]),
            top_p=tf.constant([1.0]),
            repetition_penalty=tf.constant([1.0]),
            seed=tf.constant([-1], tf.int64),
        )
        tokens.append(outputs["output_ids"][0, : int(outputs["completion_tokens"][0])].numpy().tolist())
    scored = []
    for text in request["texts"]:
        outputs = loaded.signatures["score"](text=tf.constant([text.encode("latin-1")]))
        # The first token is only context and not counted.
        scored.append(outputs["token_ids"][0, : int(outputs["token_count"][0]) + 1].numpy().tolist())
    peak = peak_memory_mib()
    print(json.dumps({"tokens": tokens, "ids": scored, "records": records, **times, "peak_memory_mib": peak}))


if __name__ == "__main__":
    try:
        _serve()
    except Exception as failure:
        # TensorFlow says what is wrong somewhere in the middle of many lines.
        sys.exit(" ".join(f"{type(failure).__name__}: {failure}".split()))
