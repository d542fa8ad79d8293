"""The client and its command, asking a real exported model over real sockets, and servers that misbehave."""

from __future__ import annotations

import dataclasses
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import SERVED, SERVED_CONTEXT

from tfclm import query as query_command
from tfclm.client import Client, Completion, ServerError, messages
from tfclm.errors import InputError

PROMPTS = ["The import statement", 'A é 😀 "quoted"\n$HOME', "x"]
# Values that are none of the defaults, and sampling that near-uniform logits would betray.
PARAMETERS: dict[str, Any] = {
    "max_new_tokens": 7,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "seed": 11,
    "stop": "zzz",
}
# The same of the parameters that `generate_tokens` alone has.
EXTRAS: dict[str, Any] = {
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "min_new_tokens": 3,
    "top_logprobs": 2,
}
NO_EXTRAS: dict[str, Any] = {**dict.fromkeys(EXTRAS, 0), "logit_bias_ids": -1, "logit_bias": 0}


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server serves: version 1 of its model, and its addresses by their protocol."""

    path: Path
    urls: dict[str, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, servable_dir: Path) -> Iterator[Served]:
    """A server with two versions of a tiny model under the name `tiny`."""
    from tfclm.server.server import Server
    from tfclm.server.settings import ServeSettings

    folder = tmp_path_factory.mktemp("served")
    for version in ("1", "2"):
        shutil.copytree(servable_dir, folder / "tiny" / version)
    # The newest one is what the first request meets.
    shutil.rmtree(folder / "tiny" / "1" / "assets.extra")
    config = folder / "models.config"
    config.write_text(
        f"""model_config_list {{ config {{ name: "tiny" base_path: "{folder}/tiny" model_platform: "tensorflow"
        model_version_policy {{ all {{}} }} version_labels {{ key: "stable" value: 1 }} }} }}"""
    )
    flags: dict[str, Any] = {"port": -1, "rest_api_port": -1, "shutdown_grace_seconds": 5.0}
    flags["allow_version_labels_for_unavailable_models"] = True
    server = Server(ServeSettings(model_config_file=str(config), **flags))
    server.start()
    urls = {"rest": f"http://127.0.0.1:{server.rest_port}", "grpc": f"grpc://127.0.0.1:{server.grpc_port}"}
    yield Served(folder / "tiny" / "1", urls)
    server.stop()


@pytest.mark.slow
def test_first_answers_are_as_quick_as_later_ones(served):
    """Warm-up that prepares for other calls than the clients': the first answer took the seconds of a preparation."""
    times = []
    # Another limit of time for each, as clients have them; the first of all tests' requests to this server.
    for number in range(8):
        for url in served.urls.values():
            with Client(url, "tiny", timeout=60 + number) as client:
                client.signatures()
                start = time.perf_counter()
                client.generate("The", max_new_tokens=2)
                client.score("The import")
                times.append(time.perf_counter() - start)
    assert max(times) < 0.5 + 5 * sorted(times)[len(times) // 2], times


@pytest.fixture(scope="module")
def signatures(served) -> Any:
    """The SavedModel's own signatures, in this process."""
    import tensorflow as tf

    return tf.saved_model.load(str(served.path)).signatures


@pytest.fixture(params=["rest", "grpc"])
def client(request: pytest.FixtureRequest, served) -> Iterator[Client]:
    """A client over REST, then over gRPC."""
    with Client(served.urls[request.param], "tiny") as client:
        yield client


def called(signature: Any, **inputs: Any) -> list[dict[str, Any]]:
    """A signature's outputs, one object per row."""
    import tensorflow as tf

    types = {name: spec.dtype for name, spec in signature.structured_input_signature[1].items()}
    defaults = {"repetition_penalty": 1, "seed": -1, "stop": "", **NO_EXTRAS, **SERVED} if "seed" in types else {}
    given = {name: value for name, value in {**defaults, **inputs}.items() if name in types}
    outputs = signature(
        **{
            name: tf.constant(value if isinstance(value, list) else [value], types[name])
            for name, value in given.items()
        }
    )
    return [dict(zip(outputs, row, strict=True)) for row in zip(*(v.numpy() for v in outputs.values()), strict=True)]


def as_completion(row: dict[str, Any]) -> Completion:
    """A row of the signature `generate`."""
    return Completion(
        row["generated_text"].decode(),
        row["completion"].decode(),
        row["completion_bytes"],
        row["finish_reason"].decode(),
        int(row["prompt_tokens"]),
        int(row["completion_tokens"]),
    )


def test_generate_is_the_signature(client, signatures):
    """A parameter sent under another name or type, rows mixed up or bytes decoded wrongly."""
    expected = called(signatures["generate"], prompt=PROMPTS, **PARAMETERS)
    assert client.generate(PROMPTS, **PARAMETERS) == [as_completion(row) for row in expected]
    assert client.generate(PROMPTS[1], **PARAMETERS) == as_completion(expected[1])


def test_parameters_of_each_row(client):
    """One value for all rows where each has its own."""
    seeds, tokens = [1, 2, 3], [2, 4, 6]
    together = client.generate(PROMPTS, seed=seeds, max_new_tokens=tokens)
    alone = [client.generate(p, seed=s, max_new_tokens=n) for p, s, n in zip(PROMPTS, seeds, tokens, strict=True)]
    assert together == alone
    assert [answer.completion_tokens for answer in together] == tokens


def test_defaults_are_those_of_the_export(client, signatures):
    """Defaults of the client's own, or none: REST fills in nothing, so what was exported has to be sent."""
    assert client.generate("The", seed=5) == as_completion(called(signatures["generate"], prompt=["The"], seed=[5])[0])
    defaults = client.signatures()["generate"].defaults
    expected = {**SERVED, "repetition_penalty": 1.0, "seed": -1, "stop": b""}
    assert {name: pytest.approx(value) for name, value in defaults.items() if name != "stop"} | {
        "stop": b""
    } == expected


def test_score_is_the_signature(client, signatures):
    """Padding handed out as tokens, or log-probabilities of another row."""
    texts = ["The import statement is a statement.", "def"]
    for text, score, row in zip(texts, client.score(texts), called(signatures["score"], text=texts), strict=True):
        count = row["token_count"]
        assert score.token_count == count == len(score.token_ids) - 1
        assert score.token_ids == tuple(row["token_ids"][: count + 1].tolist())
        assert score.greedy_ids == tuple(row["greedy_ids"][: count + 1].tolist())
        # The decimals of a reply say a float32 exactly; gRPC sends it as it is.
        for ours, its in ((score.loss, row["loss"]), (score.perplexity, row["perplexity"])):
            assert np.float32(ours) == its
        assert np.array_equal(np.float32(score.token_logprobs), row["token_logprobs"][: count + 1])
        # Alone, the same products have another shape and round differently.
        assert client.score(text).loss == pytest.approx(score.loss, abs=1e-5)


def test_any_signature(client, signatures):
    """A signature's only output comes without its name over REST."""
    (row,) = called(signatures["generate_tokens"], input_ids=[[3, 4]], attention_mask=[[1, 1]], seed=[3])
    outputs = client.predict("generate_tokens", {"input_ids": [[3, 4]], "attention_mask": [[1, 1]], "seed": 3})
    assert outputs.keys() == row.keys()
    exactly = ("output_ids", "completion_tokens", "finish_reason", "completion_bytes", "top_ids", "top_logprobs")
    assert {name: outputs[name] for name in exactly} == {name: [np.array(row[name]).tolist()] for name in exactly}
    assert outputs["token_logprobs"] == [pytest.approx(row["token_logprobs"].tolist(), abs=1e-5)]
    (text,) = client.predict("serving_default", {"prompt": ["The"]})["generated_text"]
    assert text.startswith(b"The")


def test_parameters_of_generate_tokens(client, signatures):
    """A parameter sent under another name, rows mixed up, padding handed out as tokens, stop strings of another row."""
    ids = [called(signatures["tokenize"], text=[prompt])[0]["token_ids"].tolist() for prompt in PROMPTS]
    assert client.tokenize(PROMPTS) == [tuple(row) for row in ids]
    params = {name: value for name, value in PARAMETERS.items() if name != "stop"}
    stops, biases = [["e", "t"], ["the"], [""]], [{5: 3.0, 7: -100.0}, {}, {11: 1.5}]
    answers = client.generate(PROMPTS, **params, **EXTRAS, stop=stops, logit_bias=biases)
    for number, answer in enumerate(answers):
        (row,) = called(
            signatures["generate_tokens"],
            input_ids=[ids[number]],
            attention_mask=[[1] * len(ids[number])],
            stop=[stops[number]],
            logit_bias_ids=[[*biases[number], -1]],
            logit_bias=[[*biases[number].values(), 0.0]],
            **params,
            **EXTRAS,
        )
        count = row["completion_tokens"]
        assert answer.token_ids == tuple(row["output_ids"][:count].tolist())
        assert (answer.completion_bytes, answer.finish_reason.encode()) == (
            row["completion_bytes"],
            row["finish_reason"],
        )
        assert answer.generated_text == PROMPTS[number] + answer.completion
        assert (answer.prompt_tokens, answer.completion_tokens) == (len(ids[number]), count)
        np.testing.assert_allclose(answer.token_logprobs, row["token_logprobs"][:count], atol=1e-5)
        assert [list(top) for top in answer.top_logprobs] == row["top_ids"][:count].tolist()
        np.testing.assert_allclose(
            [[*top.values()] for top in answer.top_logprobs], row["top_logprobs"][:count], atol=1e-5
        )
    # Several stop strings of one prompt alone.
    alone = client.generate(PROMPTS[0], **params, **EXTRAS, stop=stops[0], logit_bias=biases[0])
    assert (alone.token_ids, alone.completion_bytes) == (answers[0].token_ids, answers[0].completion_bytes)
    # Without any of them, `generate` itself answers.
    plain = client.generate(PROMPTS[0], **PARAMETERS)
    same = client.generate(PROMPTS[0], **PARAMETERS, top_logprobs=0)
    assert (plain.token_ids, same.completion_bytes) == ((), plain.completion_bytes)
    assert len(same.token_ids) == len(same.token_logprobs) == same.completion_tokens == len(same.top_logprobs)


def test_tokens_and_description(client, signatures):
    """Padding handed out as tokens or text, or a row's ids read as rows."""
    (row,) = called(signatures["describe"], query=[""])
    assert client.describe() == json.loads(row["description"])
    texts = ["The import", "é"]
    ids = client.tokenize(texts)
    assert client.tokenize(texts[1]) == ids[1]
    assert client.detokenize(ids) == texts
    assert client.detokenize(ids[1]) == "é"
    assert client.detokenize(list(ids[0])) == "The import"


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_an_old_export(served, old: dict[str, str], protocol: str):
    """An export from before some signatures and outputs, which is not served, not asked, or fails in the server."""
    with Client(served.urls[protocol], "tiny") as new, Client(old[protocol], "old") as client:
        assert client.generate(PROMPTS, **PARAMETERS) == new.generate(PROMPTS, **PARAMETERS)
        score, expected = client.score("The import"), new.score("The import")
        assert score.greedy_ids == ()
        assert (score.token_ids, score.perplexity) == (expected.token_ids, pytest.approx(expected.perplexity, rel=1e-5))
        with pytest.raises(InputError, match="does not offer `min_p`, `stop`: export it again, with this version"):
            client.generate("a", min_p=0.1, stop=["a", "b"])
        with pytest.raises(InputError, match="no signature tokenize; it has generate, score, serving_default"):
            client.tokenize("a")
        with pytest.raises(InputError, match="no signature describe"):
            client.describe()


@pytest.fixture(scope="module")
def old(servable_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of a server whose model `old` has the signatures of an earlier export."""
    from tensorflow.core.protobuf import saved_model_pb2

    from tfclm.server.server import Server
    from tfclm.server.settings import ServeSettings

    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(servable_dir, folder / "1")
    shutil.rmtree(folder / "1" / "assets.extra")
    path = folder / "1" / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    definitions = model.meta_graphs[0].signature_def
    for name in ("generate_tokens", "tokenize", "detokenize", "describe"):
        del definitions[name]
    del definitions["score"].outputs["greedy_ids"]
    path.write_bytes(model.SerializeToString())
    server = Server(
        ServeSettings(
            model_name="old",
            model_base_path=str(folder),
            port=-1,
            rest_api_port=-1,
            rest_api_timeout_in_ms=120_000,
            shutdown_grace_seconds=5.0,
        )
    )
    server.start()
    yield {"rest": f"http://127.0.0.1:{server.rest_port}", "grpc": f"grpc://127.0.0.1:{server.grpc_port}"}
    server.stop()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.generate("a", min_p=2.0), r"min_p\[0\] is 2.0*: give 0 \(off\) to 1"),
        (lambda client: client.generate("a", stop=list("abcde")), "stop has 5 values per row: give at most 4"),
        (lambda client: client.generate("a", logit_bias=[3]), "`logit_bias` is .3.: give a mapping from token ids"),
        (lambda client: client.generate("a", logit_bias={9999: 1}), r"logit_bias_ids\[0\] has 9999: give 0 to 511"),
        (lambda client: client.generate(["a", "b"], top_logprobs=[1, 99]), r"top_logprobs\[1\] is 99: give 0 to 20"),
        (lambda client: client.generate("", top_logprobs=1), r"input_ids\[0\] has no token"),
        (lambda client: client.detokenize([600]), r"token_ids\[0\] has an id that is no token"),
        (lambda client: client.generate(""), r"prompt\[0\] is empty: give a text"),
        (lambda client: client.generate(["a", ""]), r"prompt\[1\] is empty: give a text"),
        (lambda client: client.generate([]), "`prompt` is empty: give at least one row"),
        (lambda client: client.generate("a", temperature=-1), r"temperature\[0\] is -1"),
        (lambda client: client.generate("a", temperature="hot"), "`temperature` is 'hot': give a number"),
        (lambda client: client.generate("a", top_k=2.5), "`top_k` is 2.5: give a whole number"),
        (lambda client: client.generate("a", top_k=2**31), "`top_k` is 2147483648: give a number that fits 32 bits"),
        (lambda client: client.generate("a", top_p=0), r"top_p\[0\] is 0"),
        (
            lambda client: client.generate("a", max_new_tokens=1000),
            r"max_new_tokens\[0\] is 1000: give 1 to 127",
        ),
        (lambda client: client.generate(["a", "b", "c"], seed=[1, 2]), "`seed` has 2 values for 3 rows"),
        (
            lambda client: client.generate("a", beams=3),
            "there is no parameter beams; there are frequency_penalty, logit_bias, ",
        ),
        (lambda client: client.generate("\udce9"), "`prompt` is not UTF-8"),
        (lambda client: client.generate(3), "`prompt` is 3: give a text"),
        (lambda client: client.score("a b"[:1]), r"text\[0\] has fewer than 2 tokens"),
        (lambda client: client.predict("nope", {}), "no signature nope; it has describe, detokenize, generate, "),
        (lambda client: client.predict("score", {}), "signature score needs the input text"),
        (
            lambda client: client.generate("word " * 200),
            rf"prompt\[0\] has \d+ tokens, and the context holds {SERVED_CONTEXT}",
        ),
    ],
)
def test_what_is_refused(client, call: Callable[[Client], Any], message: str):
    """A refusal that does not name the input, has a second line, or is an error of another type."""
    with pytest.raises(InputError, match=message) as refusal:
        call(client)
    assert "\n" not in str(refusal.value)
    assert "function_node" not in str(refusal.value)


def test_versions_and_labels(served):
    """Another version asked than the one named; a label in the wrong place of the path or the message."""
    for url in served.urls.values():
        texts = {
            Client(url, "tiny", **which).generate("The", seed=1)
            for which in ({}, {"version": 1}, {"version": 2}, {"version_label": "stable"})
        }
        assert len(texts) == 1
        with pytest.raises(InputError, match=r"no version 7 of model tiny: version 2 is AVAILABLE, version 1 is AVAIL"):
            Client(url, "tiny", version=7).generate("a")
        with pytest.raises(InputError, match="Unrecognized servable version label: canary"):
            Client(url, "tiny", version_label="canary").generate("a")
        with pytest.raises(
            InputError, match="serves no model named 'other': give the name that the server was started with"
        ):
            Client(url, "other").generate("a")


def test_threads_share_a_client(client):
    """Connections that mix up the answers of concurrent callers."""
    expected = {prompt: client.generate(prompt, seed=3) for prompt in PROMPTS}
    with futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: (prompt, client.generate(prompt, seed=3)), PROMPTS * 6))
    assert all(expected[prompt] == answer for prompt, answer in answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8501"}, "`url` localhost:8501: give http://HOST:PORT for REST, or grpc://HOST:PORT"),
        ({"url": "http://localhost:8501/v1/models/m:predict"}, "give the server alone, such as http://localhost:8501"),
        ({"url": "http://"}, "give the server alone"),
        ({"url": "grpc://localhost"}, "give host and port, such as grpc://localhost:8500"),
        ({"model_name": ""}, "`model_name` is empty"),
        ({"version": 1, "version_label": "stable"}, "`version` and `version_label` are mutually exclusive"),
        ({"timeout": 0}, "`timeout` 0: give seconds"),
        ({"retries": -1}, "`retries` -1: give 0 or more"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str):
    """An address that is only found wrong when it is asked."""
    with pytest.raises(InputError, match=message):
        Client(**arguments)


def test_messages_are_those_of_tensorflow():
    """A field number or type that is another than TensorFlow's: the bytes of one are read by the other."""
    import tensorflow as tf
    from tensorflow.core.framework import tensor_pb2
    from tensorflow_serving.apis import get_model_status_pb2, predict_pb2

    dtypes = messages.DTYPES
    for dtype, values in {
        "DT_FLOAT": [[0.1, -1e30], [3.0, float("inf")]],
        "DT_DOUBLE": [0.1],
        "DT_INT32": [-(2**31), 5],
        "DT_INT64": [[2**63 - 1]],
        "DT_STRING": [b"a\0\xff", b""],
        "DT_BOOL": [True, False],
    }.items():
        ours = messages.to_tensor(values, dtype)
        theirs = tensor_pb2.TensorProto.FromString(ours.SerializeToString())
        expected = tf.make_tensor_proto(np.array(values, tf.as_dtype(dtypes[dtype]).as_numpy_dtype))
        assert np.array_equal(tf.make_ndarray(theirs), tf.make_ndarray(expected))
        back = messages.message("tensorflow.TensorProto").FromString(expected.SerializeToString())
        assert messages.from_tensor(back) == tf.make_ndarray(expected).tolist()
    # Fewer values than the shape has: the last one stands for the rest.
    short = tensor_pb2.TensorProto(dtype=1, float_val=[2.5])
    short.tensor_shape.dim.add(size=3)
    back = messages.message("tensorflow.TensorProto").FromString(short.SerializeToString())
    assert messages.from_tensor(back) == [2.5, 2.5, 2.5]
    request = messages.message("tensorflow.serving.PredictRequest")()
    request.model_spec.name, request.model_spec.signature_name = "m", "s"
    request.model_spec.version.value = 3
    request.inputs["x"].CopyFrom(messages.to_tensor([1], "DT_INT32"))
    theirs = predict_pb2.PredictRequest.FromString(request.SerializeToString())
    assert (theirs.model_spec.name, theirs.model_spec.signature_name, theirs.model_spec.version.value) == ("m", "s", 3)
    assert list(theirs.inputs) == ["x"]
    states = get_model_status_pb2.ModelVersionStatus.State
    assert all(states.Value(name) == number for name, number in messages.STATES.items())


# Servers that misbehave


@contextmanager
def http_server(answer: Callable[[Any, int], None]) -> Iterator[str]:
    """A server that hands request number n to `answer(handler, n)`; gives its URL."""
    count = iter(range(1000))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self, next(count))

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def reply(handler: Any, status: int, body: str, **headers: str) -> None:
    """Sends a reply; a header's name has _ for -."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body.encode())


_STRING = {"dtype": "DT_STRING"}
METADATA = json.dumps(
    {"metadata": {"signature_def": {"signature_def": {"s": {"inputs": {"x": _STRING}, "outputs": {"y": _STRING}}}}}}
)


def test_503_is_asked_again_and_nothing_else():
    """A request sent twice that may have run, or a busy server taken for a broken one."""
    for status, seen in ((503, 3), (500, 1), (429, 1), (504, 1), (400, 1)):
        asked = []

        def answer(handler: Any, number: int, status: int = status, asked: list[float] = asked) -> None:
            if handler.path.endswith("/metadata"):
                return reply(handler, 200, METADATA)
            asked.append(time.monotonic())
            if len(asked) < 3:
                return reply(handler, status, '{"error": "busy"}', Retry_After="1")
            return reply(handler, 200, '{"predictions": ["done"]}')

        with http_server(answer) as url, Client(url, "m") as client:
            if status == 503:
                assert client.predict("s", {"x": ["a"]}) == {"y": [b"done"]}
                assert asked[1] - asked[0] >= 1  # as Retry-After says
            else:
                with pytest.raises(InputError if status == 400 else ServerError, match="busy"):
                    client.predict("s", {"x": ["a"]})
        assert len(asked) == seen, status


def test_what_is_cancelled_with_another_request_is_asked_again():
    """An innocent request that fails with another one in its batch, or one that is sent for ever."""
    for status, error in ((499, "Loop execution was cancelled."), (500, "Missing 0-th output from {{node x}}")):
        asked = []

        def answer(handler: Any, number: int, status: int = status, error: str = error, asked: list = asked) -> None:
            if handler.path.endswith("/metadata"):
                return reply(handler, 200, METADATA)
            asked.append(number)
            if len(asked) % 3:
                return reply(handler, status, json.dumps({"error": error}))
            return reply(handler, 200, '{"predictions": ["done"]}')

        with http_server(answer) as url, Client(url, "m") as client:
            assert client.predict("s", {"x": ["a"]}) == {"y": [b"done"]}
        fails = pytest.raises(ServerError, match=error[:20])
        with http_server(answer) as url, Client(url, "m", retries=1) as client, fails:
            client.predict("s", {"x": ["a"]})
        assert len(asked) == 5


def test_overload_ends():
    """A client that asks for ever."""
    with (
        http_server(lambda handler, number: reply(handler, 503, '{"error": "full"}')) as url,
        Client(url, "m", retries=2) as client,
        pytest.raises(ServerError, match="answered HTTP 503, too many requests: full"),
    ):
        client.generate("a")


@pytest.mark.parametrize(
    ("status", "body", "headers", "message"),
    [
        (404, "<html>", {"Content_Type": "text/html"}, "is not TensorFlow Serving's REST API: .* HTTP 404, text/html"),
        (200, "[]", {}, "is not TensorFlow Serving's"),
        (200, "{", {}, "is not TensorFlow Serving's"),
        (200, '{"metadata": {}}', {}, "metadata that is not TensorFlow Serving's"),
        (200, '{"metadata": {"signature_def": 3}}', {}, "metadata that is not TensorFlow Serving's"),
        (200, "{", {"Content_Length": "9999"}, "http://127"),
    ],
)
def test_not_a_serving_server(status: int, body: str, headers: dict[str, str], message: str):
    """A traceback where another program listens, or where the answer is incomplete."""
    with (
        http_server(lambda handler, number: reply(handler, status, body, **headers)) as url,
        pytest.raises(ServerError, match=message),
    ):
        Client(url).generate("a")


def test_a_server_that_hangs():
    """A client that waits for ever."""
    release = threading.Event()
    with http_server(lambda handler, number: release.wait(20)) as url:
        with pytest.raises(ServerError, match=r"did not answer within 0\.3 s"):
            Client(url, timeout=0.3).generate("a")
        release.set()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_an_absent_server(scheme: str):
    """Minutes of waiting, or an error that names no remedy."""
    began = time.monotonic()
    with pytest.raises(ServerError, match=f"no server answers at {scheme}://127.0.0.1:.*start one"):
        Client(f"{scheme}://127.0.0.1:{free_port()}").generate("a")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED"])
def test_grpc_asks_again_where_unavailable(code: str):
    """A request sent twice that may have run, or a busy server taken for a broken one."""
    asked = []
    metadata = messages.message("tensorflow.serving.GetModelMetadataResponse")()
    signatures = messages.message("tensorflow.serving.SignatureDefMap")()
    signatures.signature_def["s"].inputs["x"].dtype = 7
    signatures.signature_def["s"].outputs["y"].dtype = 7
    metadata.metadata["signature_def"].Pack(signatures)
    done = messages.message("tensorflow.serving.PredictResponse")()
    done.outputs["y"].CopyFrom(messages.to_tensor([b"done"], "DT_STRING"))

    def predict(request: bytes, context: Any) -> bytes:
        asked.append(request)
        if len(asked) < 3:
            context.abort(grpc.StatusCode[code], "busy")
        return done.SerializeToString()

    handlers = {"GetModelMetadata": lambda request, context: metadata.SerializeToString(), "Predict": predict}
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "tensorflow.serving.PredictionService",
                {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()},
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"grpc://127.0.0.1:{port}", "m") as client:
        if code == "UNAVAILABLE":
            assert client.predict("s", {"x": ["a"]}) == {"y": [b"done"]}
            assert len(asked) == 3
        else:
            with pytest.raises(ServerError):
                client.predict("s", {"x": ["a"]})
            assert len(asked) == 1
    server.stop(None).wait()


# The command


def arguments(served, *flags: str, grpc: bool = False) -> list[str]:
    """The arguments of a command that asks the server."""
    port = ["--grpc", "--url", served.urls["grpc"].removeprefix("grpc://")] if grpc else ["--url", served.urls["rest"]]
    return ["--model-name", "tiny", *port, *flags]


def query(served, *flags: str, stdin: bytes = b"", grpc: bool = False) -> Any:
    """The command in a process of its own, where TensorFlow cannot be imported."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('tensorflow', 'transformers', 'datasets'))); "
        "from tfclm.query import main; main()"
    )
    command = [sys.executable, "-c", program, *arguments(served, *flags, grpc=grpc)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60)


def flags_of(params: dict[str, Any]) -> list[str]:
    """Knobs as the flags that say the same."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in params.items()]


@pytest.mark.parametrize("over_grpc", [False, True])
def test_the_command(served, over_grpc: bool, tmp_path: Path):
    """A parameter that is not passed on, output that a program cannot read, an import of TensorFlow."""
    with Client(served.urls["rest"], "tiny") as client:
        expected = client.generate(PROMPTS[1], **PARAMETERS)
        score = client.score("The import statement")
    run = query(served, f"--prompt={PROMPTS[1]}", *flags_of(PARAMETERS), grpc=over_grpc)
    assert (run.returncode, run.stdout.decode(), run.stderr) == (0, expected.generated_text + "\n", b"")
    (tmp_path / "prompt.txt").write_text(PROMPTS[1] + "\n")
    run = query(served, "--prompt-file", str(tmp_path / "prompt.txt"), "--json", *flags_of(PARAMETERS), grpc=over_grpc)
    printed = json.loads(run.stdout)
    assert printed.pop("completion_bytes").keys() == {"b64"}
    fields = dataclasses.asdict(expected).items()
    assert printed == {name: value for name, value in fields if value != () and name != "completion_bytes"}
    run = query(served, "--signature=score", stdin=b"The import statement\n", grpc=over_grpc)
    assert float(run.stdout) == pytest.approx(score.perplexity, rel=1e-5)
    run = query(served, "--signature=score", "--json", stdin=b"The import statement\n", grpc=over_grpc)
    printed = json.loads(run.stdout)
    assert printed == {k: pytest.approx(v) for k, v in dataclasses.asdict(score).items()}


def test_a_batch(served):
    """Lines lost, mixed up, or beyond the first request."""
    prompts = [f"line {number}" for number in range(11)]
    with Client(served.urls["rest"], "tiny") as client:
        expected = [client.generate(prompt, seed=2).generated_text for prompt in prompts]
    run = query(served, "--batch", "--seed=2", "--json", stdin="\n".join(prompts).encode() + b"\n")
    assert [json.loads(line)["generated_text"] for line in run.stdout.splitlines()] == expected
    run = query(served, "--batch", "--seed=2", stdin=b"\n".join([b"one"] * 9 + [b"word " * 100, b"two"]))
    assert run.returncode == 2
    assert run.stderr.startswith(b"tfclm.query: line 10: prompt has ")
    assert run.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (["--signature=nope", "--prompt=a"], 2, "--signature nope: the served model has describe, detokenize, "),
        (
            ["--signature=score", "--prompt=a b", "--top-k=3"],
            2,
            "--top-k: signature score of the served model has no such",
        ),
        (["--prompt=a", "--temperature=hot"], 2, "argument --temperature: invalid float value: 'hot'"),
        (["--prompt=a", "--temprature=1"], 2, "unrecognized arguments: --temprature=1"),
        (["--prompt=a", "--temperature=-1"], 2, "temperature[0] is -1.000000: give 0 (greedy) or more"),
        (["--prompt=a", "--prompt-file=b"], 2, "--prompt and --prompt-file are mutually exclusive"),
        (["--prompt-file=/no/such/file"], 2, "--prompt-file /no/such/file: No such file or directory"),
        (["--prompt=a", "--url=localhost:8501"], 2, "--url localhost:8501: give http://HOST:PORT"),
        (["--prompt=a", "--grpc", "--url=http://localhost:8501"], 2, "--url http://localhost:8501 is for REST"),
        (["--signature=generate_tokens", "--prompt=a b"], 2, "the prompt of generate_tokens is not token ids"),
        (["--prompt=a", "--model-name=other"], 2, "serves no model named 'other'"),
        (["--prompt=a", "--url=http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9: start one"),
    ],
)
def test_the_command_says_what_is_wrong(
    served,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    line: str,
):
    """A traceback, two lines, or another exit code."""
    monkeypatch.setattr(sys, "argv", ["tfclm.query", *arguments(served, *flags)])
    with pytest.raises(SystemExit) as end:
        query_command.main()
    out, said = capfd.readouterr()
    assert end.value.code == code, said
    assert said.startswith("tfclm.query: ")
    assert line in said
    assert said.count("\n") == 1
    assert out == ""


def test_tokens_and_other_signatures(served, signatures):
    """Padding printed as tokens."""
    (row,) = called(signatures["generate_tokens"], input_ids=[[3, 4]], attention_mask=[[1, 1]], seed=[3])
    run = query(served, "--signature=generate_tokens", "--prompt=3 4", "--seed=3")
    assert list(map(int, run.stdout.split())) == row["output_ids"][: row["completion_tokens"]].tolist()
    run = query(served, "--signature=serving_default", "--prompt=The")
    assert run.stdout.startswith(b"The")
    tokens = query(served, "--signature=tokenize", "--prompt=The import").stdout
    (row,) = called(signatures["tokenize"], text=["The import"])
    assert list(map(int, tokens.split())) == row["token_ids"].tolist()
    assert query(served, "--signature=detokenize", stdin=tokens).stdout == b"The import\n"
    assert json.loads(query(served, "--signature=describe", "--prompt=x").stdout)["context"] == SERVED_CONTEXT
