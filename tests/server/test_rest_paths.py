"""Paths, methods, status, metadata, classify, regress and CORS: the rows of upstream's handler tests."""

from __future__ import annotations

import socket

import pytest


def test_predict_by_version_label_and_latest(rest):
    """A version or label in the path that is ignored."""
    for part in ("", "/versions/1", "/versions/2", "/labels/old"):
        answer = rest.ask("POST", f"/v1/models/half_plus_two{part}:predict", {"instances": [0, 1, 4]})
        assert answer.json == {"predictions": [2.0, 2.5, 4.0]}, part


def test_path_is_matched_without_regard_to_case(rest):
    """A path in capitals refused; a verb in capitals, which the real server refuses, accepted."""
    assert rest.ask("POST", "/V1/MODELS/m:predict", {"inputs": ["a"]}).status == 200
    assert rest.ask("POST", "/v1/models/m:PREDICT", {"inputs": ["a"]}).status == 400
    assert rest.ask("POST", "/v1/models/M:predict", {"inputs": ["a"]}).status == 404


def test_percent_encoded_name(rest):
    """A name with other than plain characters that cannot be asked for."""
    name = "modelname%21%23%24%25%26%27%28%29%2A%2B%2C%2F%3A%3B%3D%3F%40%5B%5D"
    assert rest.predict({"inputs": ["a"]}, name).json == {"outputs": ["a world"]}
    assert rest.get(f"/v1/models/{name}").status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/foo"),
        ("POST", "/v1/foo"),
        ("GET", "/v1/models/m/model_name"),
        ("POST", "/v1/models"),
        ("GET", "/v1/models/m:predict"),
        ("PUT", "/v1/models/m:predict"),
        ("DELETE", "/v1/models/m:predict"),
        ("GET", "/v1/models/m/version/50"),
        ("GET", "/v1/models/m/versions/HELLO"),
        ("POST", "/v1/models/m/metadata"),
        ("GET", "/v1/models/m/label/some"),
        ("GET", "/v1/models/m/versions/1/labels/some"),
        ("GET", "/v1/models/m/versions/some_label"),
        ("POST", "/v1/models/m:predict?x=1"),
        ("POST", "/v1/models/m:predict/"),
        ("GET", "/v1/models/m/"),
        ("POST", "/v1/models/m:generate"),
    ],
)
def test_malformed_request(rest, method, path):
    """A path that is nearly right being served, or refused with another message."""
    answer = rest.ask(method, path)
    assert (answer.status, answer.error) == (400, f"Malformed request: {method} {path}")


def test_head(rest):
    """HEAD answered as GET, or with a body that breaks the connection."""
    answer = rest.ask("HEAD", "/v1/models/m")
    assert (answer.status, answer.body) == (400, b"")


def test_outside_of_the_api(rest):
    """Another path than /v1 being answered as the API, in JSON."""
    for path in ("/foo", "/", "/statuspage", "/index"):
        answer = rest.get(path)
        assert answer.status == 404
        assert answer.headers["Content-Type"].startswith("text/html")


def test_absolute_url(rest):
    """A request as proxies send it, with the whole URL, being refused or answered as another path."""
    answer = rest.ask("POST", f"http://{rest.host}:{rest.port}/v1/models/m:predict", {"inputs": ["a"]})
    assert answer.json == {"outputs": ["a world"]}
    answer = rest.ask("POST", "http://other/v1/foo", {"inputs": ["a"]})
    assert answer.error == "Malformed request: POST /v1/foo"
    for url in ("http://other", "http://other/foo", "//v1/models/m"):
        assert rest.get(url).status == 404


@pytest.mark.parametrize("name", ["q%zz", "q%", "q%4", '"', "[", "\\", "\xff"])
def test_path_that_is_no_uri(rest, name):
    """A character that no path may hold being taken for a model's name."""
    with socket.create_connection((rest.host, rest.port), timeout=10) as connection:
        connection.sendall(f"GET /v1/models/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1"))
        assert connection.recv(1000).split()[1] == b"400"


@pytest.mark.parametrize("method", ["BREW", "get", "TRACE", "PROPFIND"])
def test_unknown_method(rest, method):
    """A method that is not HTTP's, or not this API's, being answered as a malformed request."""
    with socket.create_connection((rest.host, rest.port), timeout=10) as connection:
        connection.sendall(f"{method} /v1/models/m HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(1000).split()[1] == b"501"


def test_expectation_that_is_unknown(rest):
    """A request that is run although its condition was not understood."""
    answer = rest.predict({"inputs": ["a"]}, Expect="nothing")
    assert answer.status == 417
    assert rest.predict({"inputs": ["a"]}).status == 200


def test_version_above_int64(rest):
    """A number too large for a version failing as an internal error; the real server sends no body."""
    for number in (2**63, 2**64 - 1, 10**4000):
        answer = rest.ask("POST", f"/v1/models/m/versions/{number}:predict", {"inputs": ["a"]})
        assert (answer.status, answer.body) == (400, b"")
        answer = rest.get(f"/v1/models/m/versions/{number}")
        assert (answer.status, answer.body) == (400, b"")
    assert rest.ask("POST", "/v1/models/m/versions/00000000000000000000001:predict", {"inputs": ["a"]}).status == 200


def test_unknown_model_version_and_label(rest):
    """What is not there answered with another status or message, on which routing may rely."""
    answer = rest.predict({"inputs": ["a"]}, "foo")
    assert (answer.status, answer.error) == (404, "Servable not found for request: Latest(foo)")
    answer = rest.ask("POST", "/v1/models/m/versions/99:predict", {"inputs": ["a"]})
    assert (answer.status, answer.error) == (404, "Servable not found for request: Specific(m, 99)")
    answer = rest.ask("POST", "/v1/models/m/labels/stable:predict", {"inputs": ["a"]})
    assert (answer.status, answer.error) == (400, "Unrecognized servable version label: stable")


def test_get_status(rest):
    """A status that a rollout script cannot read: the version is a string, the newest comes first."""
    available = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    first, second = {"version": "1", **available}, {"version": "2", **available}
    assert rest.get("/v1/models/half_plus_two").json == {"model_version_status": [second, first]}
    assert rest.get("/v1/models/half_plus_two/versions/1").json == {"model_version_status": [first]}
    assert rest.get("/v1/models/half_plus_two/labels/old").json == {"model_version_status": [second, first]}


def test_get_status_of_what_is_not_there(rest):
    """A status of an unknown model or version that looks like a state."""
    answer = rest.get("/v1/models/m/versions/7")
    assert (answer.status, answer.error) == (404, "Could not find version 7 of model m")
    answer = rest.get("/v1/models/foo")
    assert (answer.status, answer.error) == (404, "Could not find any versions of model foo")
    answer = rest.get("/v1/models")
    assert (answer.status, answer.error) == (400, "Missing model name in request.")


def test_get_metadata(rest):
    """Metadata without the signatures, their defaults or the version."""
    document = rest.get("/v1/models/m/metadata").json
    assert document["model_spec"] == {"name": "m", "signature_name": "", "version": "1"}
    signatures = document["metadata"]["signature_def"]["signature_def"]
    prompt = signatures["serving_default"]["inputs"]["prompt"]
    assert prompt["dtype"] == "DT_STRING"
    assert prompt["tensor_shape"] == {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"
    assert signatures["params"]["defaults"]["n"]["int_val"] == [7]
    assert rest.get("/v1/models/half_plus_two/labels/old/metadata").json["model_spec"]["version"] == "1"
    assert rest.get("/v1/models/foo/metadata").error == "Servable not found for request: Latest(foo)"


def test_classify(rest):
    """Classes and scores that come out of step, or without the label."""
    body = {"signature_name": "classify", "examples": [{"x": 1.0}, {"x": 2.0}]}
    answer = rest.ask("POST", "/v1/models/half_plus_two:classify", body)
    assert answer.body == b'{\n    "results": [[["y", 2.5]], [["y", 3.0]]\n    ]\n}'


def test_regress(rest):
    """A regression that is nested a list too deep."""
    body = {"signature_name": "regress", "examples": [{"x": [80.0]}, {"x": 90.0}]}
    answer = rest.ask("POST", "/v1/models/half_plus_two:regress", body)
    assert answer.body == b'{\n    "results": [42.0, 47.0]\n}'


def test_context_is_part_of_every_example(rest):
    """A context that is dropped: the examples would lack the feature."""
    body = {"signature_name": "regress", "context": {"x": 80.0}, "examples": [{"other": "a"}, {"x": 90.0}]}
    answer = rest.ask("POST", "/v1/models/half_plus_two:regress", body)
    assert answer.json == {"results": [42.0, 47.0]}


@pytest.mark.parametrize("verb", ["classify", "regress"])
@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"signature_name": ["a"], "examples": [{}]}, "'signature_name' key must be a string value."),
        ({"context": [{}]}, "Example must be JSON object but got JSON Array"),
        ({"examples": {"a": 1}}, "Expecting 'examples' value to be an list/array"),
        ({"examples": []}, "'examples' value is an empty array"),
        ({}, "When method is classify, key 'examples' is expected and was not found"),
        ({"examples": [[{"a": 1}]]}, "Example must be JSON object but got JSON Array"),
        ({"examples": [{"a": [10, None]}]}, "Feature: a has element with unexpected JSON type: Null"),
        ({"examples": [{"a": [10, 10.0]}]}, "Unexpected element type in feature: a expecting type: int64"),
        ({"examples": [{"a": [10, {"b": 1}]}]}, "Feature: a has element with unexpected JSON type: Object"),
        ({"examples": [{"a": [[10], 20]}]}, "Feature: a has element with unexpected JSON type: Array"),
        ({"examples": [{"a": [20, 2**64 - 13]}]}, "Feature: a has uint64_t element. Only int64_t is supported."),
        ({"examples": [{"a": 1}]}, "Expected one or two output Tensors"),
        ({"signature_name": "nope", "examples": [{"a": 1}]}, "No signature was found with the name: nope"),
    ],
)
def test_classify_and_regress_errors(rest, verb, body, error):
    """An example that is not one being run, or failing as an internal error."""
    answer = rest.ask("POST", f"/v1/models/half_plus_two:{verb}", body)
    assert answer.status == 400
    if "output Tensors" in error:
        assert answer.error.startswith(("No classification inputs found", "No regression inputs found"))
    else:
        assert answer.error.endswith(error)


def test_options(rest):
    """A preflight that is taken for a request; without CORS support it gets no CORS headers."""
    answer = rest.ask("OPTIONS", "/v1/models/m:predict")
    assert (answer.status, answer.body) == (400, b"")
    answer = rest.ask("OPTIONS", "/v1/models/m:predict", headers={"Origin": "https://example.com"})
    assert (answer.status, answer.body) == (200, b"")
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_cors_flag(models, start_server, client):
    """The flag without effect: a web page's request would be refused by its browser."""
    server = start_server(model_base_path=str(models / "m"), rest_api_enable_cors_support=True, port=0)
    for answer in (
        client(server).predict({"inputs": ["a"]}, "model"),
        client(server).ask("OPTIONS", "/v1/models/model:predict", headers={"Origin": "http://example.com"}),
    ):
        assert answer.status == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["Access-Control-Allow-Methods"] == "POST, GET"
        assert answer.headers["Access-Control-Allow-Headers"] == "Content-Type"
    assert client(server).get("/monitoring/prometheus/metrics").status == 404


def test_prometheus_endpoint(rest, server):
    """Metrics under other names or types than dashboards for TensorFlow Serving expect."""
    rest.predict({"inputs": ["a"]})
    rest.predict({"inputs": [1]})
    answer = rest.get("/monitoring/prometheus/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain")
    lines = answer.body.decode().splitlines()
    assert "# TYPE :tensorflow:serving:request_count counter" in lines
    assert "# TYPE :tensorflow:serving:request_latency histogram" in lines
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(counts[':tensorflow:serving:request_count{model_name="m",status="OK"}']) > 0
    assert int(counts[':tensorflow:serving:request_count{model_name="m",status="INVALID_ARGUMENT"}']) > 0
    labels = 'model_name="m",API="predict",entrypoint="REST"'
    count = counts[f":tensorflow:serving:request_latency_count{{{labels}}}"]
    assert counts[f':tensorflow:serving:request_latency_bucket{{{labels},le="+Inf"}}'] == count
    assert int(count) > 0
    answer = rest.get("/monitoring/prometheus/metrics?x=1")
    assert (answer.status, answer.headers["Content-Type"]) == (400, "text/plain")
    assert answer.body.startswith(b"Unexpected path: ")


def test_timeout(models, start_server, client):
    """A run that never ends, or a timeout that looks like an error of the server."""
    server = start_server(model_base_path=str(models / "slow"), rest_api_timeout_in_ms=300, port=0)
    answer = client(server).predict({"inputs": 10**9}, "model")
    assert (answer.status, answer.error) == (504, "Timed out waiting for notification")
