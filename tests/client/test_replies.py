"""What a server sends is checked: the caller gets a right result, or one line that says what is wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from tfclm.client import Client, Completion, Score, ServerError, messages
from tfclm.errors import InputError

from .doubles import (
    GENERATED,
    SCORED,
    grpc_metadata,
    grpc_predictions,
    grpc_server,
    http_reply,
    rest_metadata,
    rest_predictions,
    rest_server,
)

STATUS = b'{"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK"}}]}'
ERROR = b'{"error": "prompt[0] is empty: give a text"}'
ROUNDS = 300


class Sick:
    """A server whose next replies are `metadata` and `predictions`, over both protocols."""

    def __init__(self, metadata: bytes, predictions: bytes) -> None:
        self.metadata, self.predictions, self.status = metadata, predictions, "200 OK"
        self.code: Any = None

    def answer(self, path: str, body: bytes) -> bytes:
        """REST's reply."""
        if path.endswith("/metadata"):
            return http_reply(self.metadata)
        if path.endswith(":predict"):
            return http_reply(self.predictions, self.status)
        return http_reply(STATUS)

    def predict(self, request: bytes, context: Any) -> bytes:
        """The reply of gRPC's Predict."""
        if self.code is not None:
            context.abort(self.code, self.predictions.decode("latin-1"))
        return self.predictions


@contextmanager
def sick_server(scheme: str, score: bool = False) -> Iterator[tuple[Sick, Client]]:
    """A server that is well yet, and a client of it."""
    outputs = SCORED if score else GENERATED
    if scheme == "http":
        sick = Sick(rest_metadata(), rest_predictions(outputs, 2))
        with rest_server(sick.answer) as url, Client(url, timeout=10, retries=0) as client:
            yield sick, client
        return
    sick = Sick(grpc_metadata(), grpc_predictions(outputs, 2))
    handlers = {"GetModelMetadata": lambda request, context: sick.metadata, "Predict": sick.predict}
    with (
        grpc_server(handlers) as port,
        Client(f"grpc://127.0.0.1:{port}", timeout=10, retries=0) as client,
    ):
        yield sick, client


def is_right(results: Any, kind: type) -> bool:
    """Whether results are of the documented types, for each row."""
    assert isinstance(results, list)
    assert len(results) == 2
    for result in results:
        assert type(result) is kind
        if isinstance(result, Completion):
            assert isinstance(result.generated_text, str)
            assert isinstance(result.completion, str)
            assert isinstance(result.completion_bytes, bytes)
            assert isinstance(result.finish_reason, str)
            assert type(result.prompt_tokens) is int
            assert type(result.completion_tokens) is int
            (result.generated_text + result.completion + result.finish_reason).encode()
        elif isinstance(result, Score):
            assert type(result.loss) is float
            assert type(result.perplexity) is float
            assert len(result.token_ids) == len(result.token_logprobs) == result.token_count + 1
            assert all(type(token) is int for token in result.token_ids)
            assert all(type(value) is float for value in result.token_logprobs)
    return True


# Values that Python, JSON or protobuf do not expect where they stand.
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1.5,
    math.nan,
    math.inf,
    "",
    "x",
    "\ud800",
    "\x1b[31m",
    [],
    [[]],
    {},
    {"b64": "#"},
    {"b64": 3},
    {"b64": "AA=="},
    {"size": "2147483648"},
    ["a", 1],
    [None],
]


def changed_json(body: bytes, dice: random.Random) -> bytes:
    """A good JSON reply with one value replaced, one key or item less or more, or bytes changed."""
    kind = dice.randrange(4)
    if kind == 0:
        return changed_bytes(body, dice)
    document = json.loads(body)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            places.append((value, key))
            if isinstance(item, dict | list):
                walk(item)

    walk(document)
    holder, key = dice.choice(places)
    if kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.append(dice.choice([holder[key], dice.choice(STRANGE)]))
    elif kind == 2:
        holder[dice.choice(["b64", "error", "x", "\ud800"])] = dice.choice(STRANGE)
    else:
        holder[key] = dice.choice(STRANGE)
    return json.dumps(document, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")


def changed_bytes(body: bytes, dice: random.Random) -> bytes:
    """Bytes with some replaced, left out, or put in."""
    changed = bytearray(body)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(changed))
        end = place + dice.choice([0, 1, 1, 8])
        changed[place:end] = dice.randbytes(dice.choice([0, 1, 1, 4]))
        if not changed:
            break
    return bytes(changed[: dice.choice([len(changed), len(changed), dice.randrange(len(changed) + 1)])])


def changed_tensors(body: bytes, dice: random.Random) -> bytes:
    """A good PredictResponse with a tensor's type, shape or values changed."""
    if dice.random() < 0.4:
        return changed_bytes(body, dice)
    response = messages.message("tensorflow.serving.PredictResponse").FromString(body)
    name = dice.choice(sorted(response.outputs))
    tensor = response.outputs[name]
    kind = dice.randrange(6)
    if kind == 0:
        tensor.dtype = dice.choice([0, 1, 2, 3, 4, 7, 9, 10, 19, 101])
    elif kind == 1:
        tensor.tensor_shape.dim.add(size=dice.choice([-1, 0, 1, 2, 2**40, 2**62]))
    elif kind == 2 and tensor.tensor_shape.dim:
        dice.choice(tensor.tensor_shape.dim).size = dice.choice([-1, 0, 1, 3, 2**31, 2**62])
    elif kind == 3:
        tensor.tensor_content = dice.randbytes(dice.choice([1, 4, 8, 16, 24]))
    elif kind == 4:
        del response.outputs[name]
    else:
        for field in ("float_val", "int_val", "string_val", "int64_val"):
            del getattr(tensor, field)[dice.randrange(3) :]
        tensor.string_val.extend([b"\xff"] * dice.randrange(3))
    return bytes(response.SerializeToString())


@pytest.mark.parametrize("part", ["metadata", "predictions", "score", "error"])
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_changed_replies(scheme: str, part: str):
    """Any error but the client's own, or a result of other types than documented, from a reply that was changed."""
    dice = random.Random(f"{scheme} {part}")
    kind = Score if part == "score" else Completion
    right, refusals = 0, []
    with sick_server(scheme, part == "score") as (sick, client):
        metadata, predictions = sick.metadata, sick.predictions
        if part == "error":
            predictions = ERROR

        def ask() -> Any:
            return client.score(["a b", "c"]) if part == "score" else client.generate(["a", "b"])

        if part != "error":
            assert is_right(ask(), kind)
        for _ in range(ROUNDS):
            if part == "metadata":
                sick.metadata = (changed_json if scheme == "http" else changed_bytes)(metadata, dice)
            elif part == "error":
                sick.status = dice.choice(["400 Bad", "404 Not Found", "200 OK", "500 Broken", "503 Busy", "302 Found"])
                sick.code = dice.choice([code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE")])
                sick.predictions = changed_json(predictions, dice)
            else:
                sick.predictions = (changed_json if scheme == "http" else changed_tensors)(predictions, dice)
            try:
                assert is_right(ask(), kind)
                right += 1
            except (ServerError, InputError) as error:
                refusals.append(str(error))
    for said in refusals:
        assert len(said.splitlines()) <= 1
        assert len(said) < 3000
        said.encode()
    assert len(refusals) > ROUNDS / 10
    assert part == "error" or right > 0


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (b'{"predictions": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "is not TensorFlow Serving's|cannot be read"),
        (b'{"predictions": ' + b"[" * 900 + b"]" * 900 + b"}", "cannot be read"),
        (b'{"predictions": [{}, {}]}', "a row without the outputs completion, "),
        (b'{"predictions": [1, 2]}', "a row without the outputs"),
        (b'{"predictions": []}', "no prediction for each of 2 rows"),
        (b"{}", "no prediction for each of 2 rows"),
        (b'{"predictions": ' + b"9" * 10_000 + b"}", "is not TensorFlow Serving's"),
    ],
)
def test_replies_that_are_none(predictions: bytes, message: str):
    """RecursionError, KeyError and others where the server sends JSON of another kind."""
    with sick_server("http") as (sick, client):
        sick.predictions = predictions
        with pytest.raises(ServerError, match=message):
            client.generate(["a", "b"])


def test_bytes_that_are_no_text():
    """TensorFlow Serving sends a string's bytes as they are: those of another signature are no reason to refuse all."""
    with sick_server("http") as (sick, client):
        body = rest_predictions(GENERATED, 2)
        sick.predictions = body.replace("The é".encode(), b"The \xff\xc3")
        outputs = client.predict("generate", {"prompt": ["a", "b"]})
        assert outputs["generated_text"] == [b"The \xff\xc3", b"x y"]
        with pytest.raises(ServerError, match=r"a completion that cannot be read: .*utf-8"):
            client.generate(["a", "b"])


@pytest.mark.parametrize(
    ("shape", "values", "expected"),
    [
        ([2], [1.5], [1.5, 1.5]),
        ([2], [], [0.0, 0.0]),
        ([2], [1.0, 2.0, 3.0], None),
        ([2**20, 2**20], [1.0], None),
        ([2**40, 0], [], None),
        ([0, 2**40], [], []),
        ([-1], [1.0], None),
        ([2**63 - 1, 2**63 - 1], [1.0], None),
        ([1] * 40, [1.0], None),
    ],
)
def test_shapes_and_values(shape: list[int], values: list[float], expected: Any):
    """A shape of a few bytes that makes the client allocate terabytes, or whose product overflows into a small one."""
    tensor = messages.message("tensorflow.TensorProto")(dtype=1, float_val=values)
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    if expected is None:
        with pytest.raises(ValueError, match="a tensor"):
            messages.from_tensor(tensor)
    else:
        assert messages.from_tensor(tensor) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda url: Client(url, "\udcff"), "`model_name` is not UTF-8"),
        (lambda url: Client(url, version_label="\udcff"), "`version_label` is not UTF-8"),
        (lambda url: Client(url, version=2**70), "`version` 1180591620717411303424: give the number of a version"),
        (lambda url: Client(url, max_reply_bytes=0), "`max_reply_bytes` 0: give 1 or more"),
        (lambda url: Client("http://host:99999"), "`url` http://host:99999: .*give the server"),
        (lambda url: Client("http://[::1"), "`url` http://.*give the server"),
        (lambda url: Client("grpc://host:x"), "give host and port"),
        (lambda url: Client(url).predict("generate", {"prompt": [["a", "b"], ["c"]]}), "different lengths"),
    ],
)
def test_what_the_caller_gave(call: Callable[[str], Any], message: str):
    """UnicodeEncodeError, ValueError and others from deep inside, for what the caller can correct."""
    handlers = {"GetModelMetadata": lambda request, context: grpc_metadata()}
    with grpc_server(handlers) as port, pytest.raises(InputError, match=message):
        call(f"grpc://127.0.0.1:{port}")
