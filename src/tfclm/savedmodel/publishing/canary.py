"""The canary: before a version is published, a new process loads it with the settings of an unmodified server.

As in TFX's InfraValidator, it replays the warm-up records. Prompts must give the tokens of the Python model, and texts
the ids of the fast tokenizer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfclm.compat import disable_xla, import_tensorflow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

__all__ = ["CanaryFailed", "Prompt", "Text", "make_prompts", "make_texts", "peak_memory_mib", "validate"]

NEW_TOKENS = 8
MAX_TOKENS = 2048  # prompt and new tokens; the attention scores of more take gigabytes
QUANTIZED_OPS = ("_QuantizedMatMul", "_FusedQuantizedConv2D")  # of graph/int8.py, which would import TensorFlow
TIE = 1e-3  # two logits that differ by less may change places by rounding
TIMEOUT = 3600.0  # seconds; XLA compiles every size in the warm-up records

# English with digits and indented code; other scripts, spaces and emoji; bytes that are not UTF-8.
TEXTS = (
    b"It's 12,345.67 today, isn't it?\n\n    def f(x):\n\treturn x + 1  # they'll see\n",
    "Größe, naïve cafe\u0301 \u00a0 数値は１２３。 Ελλάδα, русский; العربية हिन्दी 한국어\u2003👩‍👩‍👧 🇯🇵!".encode(),
    b"caf\xe9 \xff\xfe and so on",
)


class CanaryFailed(RuntimeError):
    """A finished version does not behave as the Python model does; it was not published."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the new tokens that the Python model gives for it.

    Attributes:
        ids: token ids of the prompt.
        new: number of new tokens to ask for.
        allowed: per new token, the ids that are right: several where their logits nearly tie, the model's first.
    """

    ids: list[int]
    new: int
    allowed: list[list[int]]


@dataclass(frozen=True)
class Text:
    """A text, perhaps not UTF-8, and the ids that the fast tokenizer gives for it."""

    text: bytes
    ids: list[int]


def make_texts(tokenizer: PreTrainedTokenizerBase, context: int) -> list[Text]:
    """Texts in several scripts, cut to a context of this many tokens."""
    texts = []
    for raw in TEXTS:
        # The tokenizer in the graph replaces what is not UTF-8 as Python does.
        while len(ids := tokenizer(raw.decode(errors="replace"), verbose=False)["input_ids"]) > context and raw:
            raw = raw[: len(raw) // 2]
        if len(ids) > 1:
            texts.append(Text(raw, ids))
    return texts


def make_prompts(
    model: TFPreTrainedModel,
    vocab_size: int,
    context: int,
    eos_ids: Sequence[int],
    limit: int = NEW_TOKENS,
    rounding: float = 0.0,
) -> list[Prompt]:
    """Random prompts of several lengths, with at most `limit` new tokens of transformers' greedy `generate`.

    The longest prompt and its new tokens fill the context, up to 2048 tokens. A token is right if its logit is the
    highest, or less by rounding: 1e-3, or the fraction `rounding` of the logits' range.
    """
    import tensorflow as tf

    rng = np.random.default_rng(0)
    new = min(NEW_TOKENS, limit, context - 1)
    prompts = []
    for length in sorted({min(length, context - new) for length in (1, 7, 40, MAX_TOKENS - new)}):
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
        allowed = [
            np.flatnonzero(row >= row[token] - max(TIE, rounding * np.ptp(row[np.isfinite(row)]))).tolist()
            for row, token in zip(logits, tokens, strict=True)
        ]
        prompts.append(Prompt(ids[0].tolist(), new, allowed))
    return prompts


def validate(
    version: Path,
    prompts: Sequence[Prompt] = (),
    texts: Sequence[Text] = (),
    *,
    xla: bool,
    timeout: float = TIMEOUT,
    library: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Loads a version in a new process, replays its warm-up records and compares its answers.

    Args:
        version: its directory.
        prompts: requests to `generate_tokens`, with the expected tokens.
        texts: requests to `score`, with the expected ids.
        xla: whether to allow ops that compile, as servers with `xla_cpu_compilation_enabled` do.
        timeout: seconds until the process is ended.
        library: directory of TensorFlow's library, where XLA is turned off; the installed TensorFlow's if None.
        log: gets a line if XLA could not be turned off, so that less was checked.

    Returns:
        Times in seconds, peak memory in MiB and the number of records.

    Raises:
        CanaryFailed: the version does not load, a record fails, a token differs from the Python model's or an id from
            the tokenizer's, or the time is over.
    """
    request = {
        "version": str(version),
        "xla": xla,
        "library": None if library is None else str(library),
        "prompts": [(prompt.ids, prompt.new) for prompt in prompts],
        # JSON has no bytes: each becomes the character of the same number.
        "texts": [text.text.decode("latin-1") for text in texts],
    }
    answer = _run_child(request, timeout)
    warning = answer.pop("warning")
    if warning is not None:
        log(warning)
    for number, (prompt, tokens) in enumerate(zip(prompts, answer.pop("tokens"), strict=True)):
        _check_tokens(f"canary prompt {number}", prompt, tokens)
    for number, (text, ids) in enumerate(zip(texts, answer.pop("ids"), strict=True)):
        if ids != text.ids:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, text.ids, strict=False)))
            given, wanted = ids[same : same + 4], text.ids[same : same + 4]
            raise CanaryFailed(f"canary text {number}: ids {given} at {same}, where the tokenizer gives {wanted}")
    return answer


def peak_memory_mib() -> float | None:
    """The peak memory of this process in MiB; None where the system does not report it."""
    # Not getrusage: a new process inherits its parent's peak there.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def _run_child(request: dict[str, Any], timeout: float) -> dict[str, Any]:
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
        raise CanaryFailed(f"the exported model cannot be served: {_missing_op(lines[-1]) or lines[-1]}")
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def _missing_op(error: str) -> str | None:
    """What a version needs that this build of TensorFlow does not contain, by TensorFlow's own error."""
    found = re.search(r"Op type not registered '(\w+)'|No OpKernel was registered to support Op '(\w+)'", error)
    if found is None:
        return None
    op = found[1] or found[2]
    needed = ", which `weights` int8 needs: builds for Linux on x86-64 have it" if op in QUANTIZED_OPS else ""
    return f"this build of TensorFlow lacks the op {op}{needed}"


def _check_tokens(name: str, prompt: Prompt, tokens: Sequence[int]) -> None:
    for place, (token, allowed) in enumerate(zip(tokens, prompt.allowed, strict=False)):
        if token not in allowed:
            raise CanaryFailed(f"{name}: new token {place} is {token}, where the Python model gives {allowed[0]}")
        if len(allowed) > 1:
            return  # after a near-tie, the tokens may differ
    if len(tokens) != len(prompt.allowed):
        wanted = f"where the Python model gives {len(prompt.allowed)}"
        raise CanaryFailed(f"{name}: {len(tokens)} new tokens, {wanted}")


def _answer() -> None:
    """Runs in the new process: one JSON request on standard input, one JSON answer on standard output."""
    request = json.load(sys.stdin)
    import_tensorflow()
    import tensorflow as tf

    warning = None if request["xla"] else _disable_xla(request["library"])
    started = time.monotonic()
    loaded = tf.saved_model.load(request["version"])
    load_seconds, started = time.monotonic() - started, time.monotonic()
    records = _replay_warmup(loaded, request["version"])
    answer = {
        "warning": warning,
        "load_seconds": load_seconds,
        "records": records,
        "warmup_seconds": time.monotonic() - started,
        "tokens": [_generate(loaded, ids, new) for ids, new in request["prompts"]],
        "ids": [_score(loaded, text.encode("latin-1")) for text in request["texts"]],
        "peak_memory_mib": peak_memory_mib(),
    }
    print(json.dumps(answer))


def _disable_xla(library: str | None) -> str | None:
    """Refuses ops that compile, as a server without --xla_cpu_compilation_enabled does; a warning if that fails."""
    problem = disable_xla(None if library is None else Path(library))
    if problem is None:
        return None
    return (
        f"XLA cannot be turned off in this build of TensorFlow ({problem}): an export with an op that compiles passes "
        "here, but a server without xla_cpu_compilation_enabled refuses it"
    )


def _replay_warmup(loaded: Any, version: str) -> int:
    """Replays the warm-up records of a version as a server does when it loads it; returns their number."""
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    from tfclm.savedmodel.warmup import PATH

    path = f"{version}/{PATH}"
    if not Path(path).exists():  # as in a version of another exporter
        return 0
    count = 0
    for record in tf.data.TFRecordDataset(path):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        loaded.signatures[request.model_spec.signature_name](**inputs)
        count += 1
    return count


def _generate(loaded: Any, ids: list[int], new: int) -> list[int]:
    """The new tokens of `generate_tokens` for one prompt, greedy."""
    import tensorflow as tf

    signature = loaded.signatures["generate_tokens"]
    # TensorFlow in Python fills in no defaults. All other parameters of all versions are off if they are 0 or empty.
    given = {
        "input_ids": [ids],
        "attention_mask": [[1] * len(ids)],
        "max_new_tokens": [new],
        "top_p": [1.0],
        "repetition_penalty": [1.0],
        "stop": [[""]],
    }
    specs = signature.structured_input_signature[1]
    outputs = signature(
        **{
            name: tf.constant(given.get(name, [[0]] if name.startswith("logit_bias") else [0]), spec.dtype)
            for name, spec in specs.items()
        }
    )
    tokens: list[int] = outputs["output_ids"][0, : int(outputs["completion_tokens"][0])].numpy().tolist()
    return tokens


def _score(loaded: Any, text: bytes) -> list[int]:
    """The token ids of `score` for one text."""
    import tensorflow as tf

    outputs = loaded.signatures["score"](text=tf.constant([text]))
    # `token_count` leaves out the first token, which is only context.
    ids: list[int] = outputs["token_ids"][0, : int(outputs["token_count"][0]) + 1].numpy().tolist()
    return ids


if __name__ == "__main__":
    try:
        _answer()
    except Exception as failure:
        # TensorFlow's messages have many lines, and the cause is somewhere in the middle.
        sys.exit(" ".join(f"{type(failure).__name__}: {failure}".split()))
