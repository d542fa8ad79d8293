"""The engine under random traffic: requests that join, continue texts, time out, or are too many."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from conftest import LONG

from tfclm.savedmodel.graph.engine import Engine, EngineLimits
from tfclm.savedmodel.graph.key_value_cache import CompiledSizes, Writer, row_of, zeros
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.sampling import PARAM_TYPES, SamplingParams

CONTEXT = 160
NEW = 120
REQUESTS = 2000 if LONG else 120


class Request(NamedTuple):
    """Rows with the same parameters."""

    prompts: tuple[tuple[int, ...], ...]
    new: int = 8
    temperature: float = 0.0
    seed: int = 0


@pytest.fixture(scope="module")
def network() -> Network:
    """A tiny model."""
    from conftest import tiny_config
    from tf_keras.utils import set_random_seed

    from tfclm.checkpoint import create

    # As in the process of `fit`, where TensorFlow refuses operations whose results may differ.
    tf.config.experimental.enable_op_determinism()
    set_random_seed(3)
    model = create(tiny_config("gpt2", context=CONTEXT, layers=2))
    # Initial weights are so small that all logits are nearly equal.
    model.set_weights([3 * weight for weight in model.get_weights()])
    return Network(model)


Complete = Callable[[Request], list[list[int]]]


def completer(network: Network, limits: EngineLimits, sizes: CompiledSizes | None = None) -> tuple[Engine, Complete]:
    """An engine, and a function that returns the new tokens of each row of a request."""
    engine = Engine(network, limits, eos_ids=range(0, 512, 40), pad_id=0, sizes=sizes)

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None], tf.int32),
            SamplingParams(*(tf.TensorSpec([None], kind) for kind in PARAM_TYPES)),
        ],
    )
    def traced(ids: tf.Tensor, lengths: tf.Tensor, params: SamplingParams) -> Any:
        return engine.complete(ids, lengths, params)

    def complete(request: Request) -> list[list[int]]:
        values = (request.new, request.temperature, 0, 1.0, 1.0, request.seed)
        rows = len(request.prompts)
        params = SamplingParams(
            *(tf.constant([value] * rows, kind) for value, kind in zip(values, PARAM_TYPES, strict=True))
        )
        ids = tf.ragged.constant(request.prompts, tf.int32).to_tensor()
        out = traced(ids, tf.constant([len(prompt) for prompt in request.prompts]), params)
        pairs = zip(out.output_ids.numpy(), out.count.numpy(), strict=True)
        return [tokens[:count].tolist() for tokens, count in pairs]

    return engine, complete


@pytest.fixture(scope="module")
def plain(network: Network) -> Complete:
    """An engine without a prefix cache, which tests call with one request at a time."""
    return completer(network, EngineLimits(4, NEW, 4 * CONTEXT, prefix_cache=False))[1]


@pytest.fixture(scope="module")
def engine(network: Network) -> tuple[Engine, Complete]:
    """An engine whose prefix cache is too small for the rows of the tests."""
    return completer(network, EngineLimits(4, NEW, 6 * CONTEXT, waiting=24))


def test_a_text_continued_in_several_requests(engine: tuple[Engine, Complete], plain: Complete) -> None:
    """Random numbers that depend on the request, or keys and values of the prefix cache that are not the row's."""
    complete = engine[1]
    rng = np.random.default_rng(0)
    for number, temperature in enumerate([0.0, 0.8, 1.2, 2.0]):
        prompt = tuple(rng.integers(1, 512, 20).tolist())
        whole = plain(Request((prompt,), 70, temperature, number))[0]
        text = prompt
        while len(text) < len(prompt) + len(whole):
            new = complete(Request((text,), int(rng.integers(1, 30)), temperature, number))[0]
            text += tuple(new)
        # The last request may have gone beyond the end of the first one.
        assert text[len(prompt) :][: len(whole)] == tuple(whole)


@pytest.fixture
def counting(network: Network, monkeypatch: pytest.MonkeyPatch) -> tuple[Complete, list[tuple[int, ...]]]:
    """A function that runs requests, and the number of rows and tokens of each chunk of prompts that it reads."""
    chunks: list[tuple[int, ...]] = []
    extend = network.extend

    def note(*sizes: np.ndarray) -> np.int32:
        chunks.append(tuple(map(int, sizes)))
        return np.int32(0)

    def counted(rows: Any, start: Any, count: Any, *others: Any) -> Any:
        with tf.control_dependencies([tf.numpy_function(note, [tf.shape(rows)[0], count], tf.int32)]):
            return extend(rows, start, tf.identity(count), *others)

    monkeypatch.setattr(network, "extend", counted)
    return completer(network, EngineLimits(4, NEW, 6 * CONTEXT))[1], chunks


def test_a_text_that_is_continued_is_not_read_again(counting: tuple[Complete, list[tuple[int, ...]]]) -> None:
    """A row whose keys and values reach the prefix cache after the request that continues it has begun."""
    complete, chunks = counting
    text = tuple(np.random.default_rng(5).integers(1, 512, 30).tolist())
    # The last token of a prompt is read by the step that adds the first new one.
    for new_text, expected in [((), 29), ((), 0), ((7, 8, 9), 3), ((), 0)]:
        text += new_text
        text += tuple(complete(Request((text,), 11))[0])
        assert sum(tokens for _, tokens in chunks) == expected
        chunks.clear()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((15, 10, 18, 15), [(4, 17)]),
        ((60, 50, 80, 101), [(3, 79), (1, 256 - 3 * 79), (1, 81)]),
        # Much shorter than the others.
        ((40, 10, 9), [(1, 39), (2, 9)]),
    ],
)
def test_short_prompts_are_read_together(
    counting: tuple[Complete, list[tuple[int, ...]]],
    plain: Complete,
    lengths: tuple[int, ...],
    expected: list[tuple[int, int]],
) -> None:
    """Prompts that are read one after another, too many of them at once, or another row's keys and values."""
    complete, chunks = counting
    rng = np.random.default_rng(len(lengths))
    prompts = [tuple(rng.integers(1, 512, length).tolist()) for length in lengths]
    answers = complete(Request(tuple(prompts), 20))
    assert chunks == expected
    assert answers == [plain(Request((prompt,), 20))[0] for prompt in prompts]


def test_a_pass_that_fails_does_not_fail_forever(
    network: Network, plain: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that makes each pass fail, and that nobody waits for any more."""
    step = network.step
    # Long enough for its row to be in the state of a pass that has succeeded.
    prompts = (((3, number),) for number in range(512))
    bad = next(Request(each, 100) for each in prompts if len(plain(Request(each, 100))[0]) == 100)

    def check(starts: np.ndarray) -> np.int32:
        if max(starts) > 80:
            raise MemoryError
        return np.int32(0)

    def checked(tokens: Any, starts: Any, *others: Any) -> Any:
        with tf.control_dependencies([tf.numpy_function(check, [starts], tf.int32)]):
            return step(tokens, tf.identity(starts), *others)

    monkeypatch.setattr(network, "step", checked)
    complete = completer(network, EngineLimits(4, NEW, 6 * CONTEXT))[1]
    with pytest.raises(tf.errors.ResourceExhaustedError):
        complete(bad)
    good = Request(((3, 4, 5),), 4)
    for _ in range(20):
        with contextlib.suppress(tf.errors.ResourceExhaustedError):
            complete(good)
    assert complete(good) == plain(good)


def test_rows_at_the_original_context_of_a_longrope() -> None:
    """A row whose prompt fills the original context, for whose next token there is no room, alone or beside others."""
    from tf_keras.utils import set_random_seed
    from transformers import Phi3Config

    from tfclm.checkpoint import create

    original, context = 30, 64
    set_random_seed(4)
    model = create(
        Phi3Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=context,
            original_max_position_embeddings=original,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.set_weights([5 * weight for weight in model.get_weights()])
    complete = completer(Network(model), EngineLimits(4, 50, 4 * context))[1]
    rng = np.random.default_rng(6)
    prompts = [tuple(rng.integers(1, 512, original + more).tolist()) for more in (-1, 0, 1)]

    def expected(prompt: tuple[int, ...]) -> list[int]:
        text, end = list(prompt), original + 1 if len(prompt) <= original else context
        while len(text) < end:
            text.append(int(np.argmax(model(tf.constant([text])).logits[0, -1])))
            if text[-1] % 40 == 0:  # an EOS of `completer`
                break
        return text[len(prompt) :]

    answers = [expected(prompt) for prompt in prompts]
    assert [len(answer) for answer in answers[:2]] == [2, 1]
    assert len(answers[2]) > 4
    assert [complete(Request((prompt,), 50))[0] for prompt in prompts] == answers
    assert complete(Request(tuple(prompts), 50)) == answers


def test_keys_and_values_of_a_whole_row_are_copied() -> None:
    """An entry of the prefix cache that has the memory of the rows that were decoded beside it."""

    @tf.function(autograph=False)
    def row_before_a_write(length: tf.Tensor) -> tf.Tensor:
        (buffer,) = zeros([2, 1, 3, 16], 1)
        (row,) = row_of([buffer], tf.constant(1), length)
        with tf.control_dependencies([row]):
            written = Writer(buffer, tf.constant([[0], [0]])).write(buffer, tf.ones([2, 1, 1, 16]))
        with tf.control_dependencies([written]):
            return tf.identity(row)

    for length in (2, 3):
        assert not row_before_a_write(tf.constant(length)).numpy().any()


def random_request(rng: random.Random, texts: list[tuple[int, ...]]) -> Request:
    """One to three rows, half of which begin like an earlier text."""
    prompts = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        begin = rng.choice(texts)[: rng.randrange(100)] if texts and rng.random() < 0.5 else ()
        prompts.append(begin + tuple(rng.randrange(512) for _ in range(rng.randrange(1, 40))))
    return Request(tuple(prompts), rng.choice([1, 3, 10, 40]), rng.choice([0.0, 1.0]), rng.randrange(1000))


@pytest.mark.parametrize("sizes", [None, pytest.param(CompiledSizes((2, 4), (64, CONTEXT)), marks=pytest.mark.long)])
def test_random_traffic(
    engine: tuple[Engine, Complete], plain: Complete, network: Network, sizes: CompiledSizes | None
) -> None:
    """Another request's tokens, keys or values, or those of an entry of the prefix cache that was overwritten."""
    if sizes is not None:
        engine = completer(network, EngineLimits(4, NEW, 6 * CONTEXT, waiting=24), sizes)
        plain = completer(network, EngineLimits(4, NEW, 4 * CONTEXT, prefix_cache=False), sizes)[1]
    rng, texts, requests, expected = random.Random(0), [], [], []
    for _ in range(REQUESTS):
        requests.append(random_request(rng, texts))
        expected.append(plain(requests[-1]))
        texts += [prompt + tuple(new) for prompt, new in zip(requests[-1].prompts, expected[-1], strict=True)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(engine[1], requests))
    assert answers == expected
    # They differ enough for the comparison to mean something.
    assert len({str(answer) for answer in answers}) > 0.9 * REQUESTS
    assert engine[0].row_count().numpy() == 0


def test_short_requests_do_not_wait_for_long_ones(engine: tuple[Engine, Complete]) -> None:
    """Rows that wait until others are done or others' prompts are read, or prompts that are starved by shorter ones."""
    complete, done, lock = engine[1], [], threading.Lock()
    short, long = Request(((5, 6, 7),), 3), Request((tuple(range(1, 30)),), NEW)
    # More than are read at the same time.
    prompts = [Request((tuple(range(first, first + 150)),), 1) for first in range(2, 8)]
    complete(short)

    def run(name: str, request: Request) -> None:
        complete(request)
        with lock:
            done.append(name)

    threads = [threading.Thread(target=run, args=("long", long._replace(seed=seed))) for seed in range(3)]
    threads += [threading.Thread(target=run, args=("prompt", prompt)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for _ in range(3):
        run("short", short)
    for thread in threads:
        thread.join()
    last = {name: max(place for place, each in enumerate(done) if each == name) for name in done}
    assert last["short"] < last["prompt"] < last["long"]
    assert done.index("long") > last["short"]


def test_the_queue_is_bounded(network: Network) -> None:
    """Requests that are accepted without limit, or a refused one that disturbs the others."""
    _, complete = completer(network, EngineLimits(1, NEW, CONTEXT, waiting=2))
    request = Request((tuple(range(1, 20)),), 60)
    expected, outcomes = complete(request), []

    def run(_: int) -> None:
        try:
            outcomes.append(complete(request) == expected)
        except tf.errors.UnavailableError:
            outcomes.append(None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    assert outcomes.count(None) >= 1
    assert outcomes.count(True) >= 2
    assert False not in outcomes
    assert complete(request) == expected


def test_memory_does_not_grow(engine: tuple[Engine, Complete]) -> None:
    """Rows, entries or buffers that are kept after their requests ended."""

    def resident() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    complete, rng = engine[1], random.Random(1)
    before = 0.0
    count = 10_000 if LONG else 300
    for number in range(count):
        if number == count // 3:
            before = resident()
        complete(Request((tuple(rng.randrange(512) for _ in range(rng.randrange(1, 60))),), 4))
    # MiB; the state of one row takes 0.1.
    assert resident() - before < 20


@pytest.fixture(scope="module")
def session(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that runs a request of one row in TensorFlow's own session, as a server does."""
    engine = Engine(network, EngineLimits(4, NEW, 8 * CONTEXT), eos_ids=[], pad_id=0)
    module = tf.Module()
    module.weights = network.variables

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([1, None], tf.int32), tf.TensorSpec([1], tf.int32)])
    def complete(ids: tf.Tensor, new: tf.Tensor) -> dict[str, Any]:
        zeros = tf.zeros([1])
        params = SamplingParams(new, zeros, tf.zeros([1], tf.int32), zeros + 1, zeros + 1, tf.zeros([1], tf.int64))
        return {"tokens": engine.complete(ids, tf.shape(ids)[1:], params).output_ids}

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([1], tf.int32)])
    def rows(ignored: tf.Tensor) -> dict[str, Any]:
        return {"count": engine.row_count() + 0 * ignored}

    module.complete, module.rows = complete, rows
    folder = str(tmp_path_factory.mktemp("session"))
    tf.saved_model.save(module, folder, {"complete": complete, "rows": rows})
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], folder).signature_def

        def run(signature: str, inputs: dict[str, Any], milliseconds: int | None = None) -> Any:
            given = signatures[signature]
            options = tf.compat.v1.RunOptions(timeout_in_ms=milliseconds or 0)
            feed = {given.inputs[name].name: value for name, value in inputs.items()}
            (fetch,) = (output.name for output in given.outputs.values())
            return session.run(fetch, feed, options=options)

        yield run


def test_rows_of_requests_that_timed_out_are_dropped(session: Any) -> None:
    """A request that times out and takes others with it, or whose rows are decoded to their end."""
    ids = [list(range(1, 20))]
    expected = session("complete", {"ids": ids, "new": [NEW]}).tolist()
    outcomes: list[Any] = []

    def run(milliseconds: int | None) -> None:
        try:
            tokens = session("complete", {"ids": ids, "new": [NEW]}, milliseconds).tolist()
            outcomes.append(tokens == expected)
        except tf.errors.DeadlineExceededError:
            outcomes.append(None)

    threads = [threading.Thread(target=run, args=(ms,)) for ms in [None, None, *([1, 4, 12, 30] * 6)]]
    for thread in threads:
        thread.start()
        time.sleep(0.004)
    for thread in threads:
        thread.join()
    assert outcomes.count(None) >= 10
    assert outcomes.count(True) >= 2
    assert False not in outcomes
    # Rows of requests that are gone end with one of the next passes.
    until = time.monotonic() + 20
    while session("rows", {"ignored": [0]})[0]:
        assert time.monotonic() < until
        assert session("complete", {"ids": ids, "new": [NEW]}).tolist() == expected
