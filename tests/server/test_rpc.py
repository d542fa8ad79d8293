"""gRPC: the rows of upstream's predict tests and of its model server test."""

from __future__ import annotations

import json
import shutil
import subprocess

import grpc
import pytest
import tensorflow as tf
from google.protobuf import wrappers_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

TIMEOUT = 30


@pytest.fixture(scope="module")
def channel(server):
    """A channel to the server under test."""
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel


@pytest.fixture(scope="module")
def prediction(channel):
    """Its PredictionService."""
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def model_service(channel):
    """Its ModelService."""
    return model_service_pb2_grpc.ModelServiceStub(channel)


def _request(name: str, signature: str = "", **inputs) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(value if isinstance(value, TensorProto) else tf.make_tensor_proto(value))
    return request


def _examples(*values: float):
    return [
        tf.train.Example(features=tf.train.Features(feature={"x": _float(value)})).SerializeToString()
        for value in values
    ]


def _float(value: float) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))


def _fails(call, request, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        call(request, timeout=TIMEOUT)
    assert raised.value.code() is code, raised.value
    return raised.value.details()


def test_predict(prediction):
    """Values in another field than clients without TensorFlow read, or a reply that does not say who answered."""
    response = prediction.Predict(_request("half_plus_two", x=[2.0, 4.0]), timeout=TIMEOUT)
    assert list(response.outputs["y"].float_val) == [3.0, 4.0]
    assert [dim.size for dim in response.outputs["y"].tensor_shape.dim] == [2]
    assert response.model_spec.name == "half_plus_two"
    assert response.model_spec.version.value == 2
    assert response.model_spec.signature_name == "serving_default"


def test_predict_strings(prediction):
    """Bytes that are no UTF-8, or NULs at the end of a scalar, lost on the way."""
    response = prediction.Predict(_request("m", "raw", prompt=b"\xff\0"), timeout=TIMEOUT)
    assert list(response.outputs["raw"].string_val) == [b"\xff\0"]


def test_predict_by_version_and_label(prediction):
    """A version or a label in the ModelSpec that is ignored."""
    request = _request("half_plus_two", x=[2.0])
    request.model_spec.version_label = "old"
    assert prediction.Predict(request, timeout=TIMEOUT).model_spec.version.value == 1
    request.model_spec.version.value = 1
    assert prediction.Predict(request, timeout=TIMEOUT).model_spec.version.value == 1
    request.model_spec.version.value = 9
    details = _fails(prediction.Predict, request, grpc.StatusCode.NOT_FOUND)
    assert details == "Servable not found for request: Specific(half_plus_two, 9)"


def test_signature_defaults(prediction):
    """Defaults of a signature ignored over gRPC, where the real server fills them in."""
    outputs = prediction.Predict(_request("m", "params", prompt=["a"]), timeout=TIMEOUT).outputs
    assert list(outputs["n"].int_val) == [7]
    assert list(outputs["temp"].float_val) == [0.5]
    outputs = prediction.Predict(_request("m", "params", prompt=["a"], n=[1]), timeout=TIMEOUT).outputs
    assert list(outputs["n"].int_val) == [1]
    details = _fails(prediction.Predict, _request("m", "params", n=[1]), grpc.StatusCode.INVALID_ARGUMENT)
    assert "prompt" in details


def test_output_filter(prediction):
    """A filter that does not filter, or that takes any name."""
    request = _request("m", "params", prompt=["a"])
    request.output_filter.append("n")
    assert list(prediction.Predict(request, timeout=TIMEOUT).outputs) == ["n"]
    request.output_filter.append("n")
    details = _fails(prediction.Predict, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert details == "duplicate output tensor alias: n"
    request.output_filter[:] = ["nope"]
    details = _fails(prediction.Predict, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert details.startswith("output tensor alias not found in signature: nope")


def test_predict_errors(prediction):
    """A request that is not the signature's failing as an internal error, or being run."""
    wrong = grpc.StatusCode.INVALID_ARGUMENT
    call = prediction.Predict
    assert _fails(call, predict_pb2.PredictRequest(), wrong) == "Missing ModelSpec"
    assert _fails(call, _request("", x=[1.0]), wrong) == "ModelSpec has no name specified."
    assert _fails(call, _request("half_plus_two"), wrong) == (
        "input size does not match signature: 0!=1 len({}) != len({x}). Sent extra: {}. Missing but required: {x}."
    )
    assert "Sent extra: {z}" in _fails(call, _request("half_plus_two", x=[1.0], z=[1.0]), wrong)
    assert "not found in signature: z" in _fails(call, _request("half_plus_two", z=[1.0]), wrong)
    assert "string" in _fails(call, _request("half_plus_two", x=["a"]), wrong)
    details = _fails(call, _request("half_plus_two", "nope", x=[1.0]), grpc.StatusCode.FAILED_PRECONDITION)
    assert details == 'Serving signature key "nope" not found.'
    assert "at most 2 prompts" in _fails(call, _request("m", "guarded", prompt=["a"] * 3), wrong)
    _fails(call, _request("nobody", x=[1.0]), grpc.StatusCode.NOT_FOUND)


def test_tensor_that_is_not_well_formed(prediction):
    """A tensor whose shape and values disagree crashing the server, or a few bytes that ask for all memory."""
    for sizes in ([3], [-1], [2**40], [2**62, 2**62]):
        bad = tf.make_tensor_proto([1.0, 2.0])
        del bad.tensor_shape.dim[:]
        for size in sizes:
            bad.tensor_shape.dim.add(size=size)
        details = _fails(prediction.Predict, _request("half_plus_two", x=bad), grpc.StatusCode.INVALID_ARGUMENT)
        assert details == "tensor parsing error: x"


def test_classify_regress_and_multi_inference(prediction):
    """Examples that lose their order, or one signature's result given for another."""
    classify = classification_pb2.ClassificationRequest()
    regress = regression_pb2.RegressionRequest()
    for request in (classify, regress):
        request.model_spec.name = "half_plus_two"
        for example in _examples(2.0, 4.0):
            request.input.example_list.examples.add().ParseFromString(example)
    classify.model_spec.signature_name, regress.model_spec.signature_name = "classify", "regress"
    found = prediction.Classify(classify, timeout=TIMEOUT).result.classifications
    assert [(each.classes[0].label, each.classes[0].score) for each in found] == [("y", 3.0), ("y", 4.0)]
    found = prediction.Regress(regress, timeout=TIMEOUT).result.regressions
    assert [each.value for each in found] == [3.0, 4.0]
    both = inference_pb2.MultiInferenceRequest(input=classify.input)
    for request, method in ((classify, "classify"), (regress, "regress")):
        both.tasks.add(model_spec=request.model_spec, method_name=f"tensorflow/serving/{method}")
    results = prediction.MultiInference(both, timeout=TIMEOUT).results
    assert results[0].classification_result.classifications[1].classes[0].score == 4.0
    assert results[1].regression_result.regressions[0].value == 3.0
    both.tasks[1].CopyFrom(both.tasks[0])
    details = _fails(prediction.MultiInference, both, grpc.StatusCode.INVALID_ARGUMENT)
    assert details == "Duplicate evaluation of signature: classify"
    del regress.input.example_list.examples[:]
    assert _fails(prediction.Regress, regress, grpc.StatusCode.INVALID_ARGUMENT) == "Input is empty."


def test_get_model_metadata(prediction):
    """Signatures that a client cannot unpack."""
    request = get_model_metadata_pb2.GetModelMetadataRequest()
    request.model_spec.name = "half_plus_two"
    _fails(prediction.GetModelMetadata, request, grpc.StatusCode.INVALID_ARGUMENT)
    request.metadata_field.append("signature_def")
    response = prediction.GetModelMetadata(request, timeout=TIMEOUT)
    assert response.model_spec.version.value == 2
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    assert {"serving_default", "regress", "classify"} <= set(signatures.signature_def)
    request.metadata_field.append("other")
    details = _fails(prediction.GetModelMetadata, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert details == "Metadata field other is not supported"


def test_get_model_status(model_service):
    """A state that a rollout waits for and never sees."""
    request = get_model_status_pb2.GetModelStatusRequest()
    assert _fails(model_service.GetModelStatus, request, grpc.StatusCode.INVALID_ARGUMENT) == "Missing ModelSpec"
    request.model_spec.name = "half_plus_two"
    states = model_service.GetModelStatus(request, timeout=TIMEOUT).model_version_status
    available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
    assert [(each.version, each.state) for each in states] == [(2, available), (1, available)]
    request.model_spec.version.CopyFrom(wrappers_pb2.Int64Value(value=7))
    _fails(model_service.GetModelStatus, request, grpc.StatusCode.NOT_FOUND)


def test_long_message_is_cut(prediction):
    """A status so long that the transport refuses to carry it."""
    details = _fails(prediction.Predict, _request("x" * 3000, x=[1.0]), grpc.StatusCode.NOT_FOUND)
    assert details.endswith("...TRUNCATED")
    assert len(details) == 1024 + len("...TRUNCATED")


def test_health(channel):
    """A probe that takes a running server for a dead one."""
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "tensorflow.serving.PredictionService"):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_unix_socket(models, start_server, tmp_path_factory):
    """A socket path that is not listened on."""
    path = tmp_path_factory.mktemp("s") / "grpc"
    start_server(model_base_path=str(models / "half_plus_two"), grpc_socket_path=str(path), port=0, rest_api_port=0)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        response = stub.Predict(_request("model", x=[2.0]), timeout=TIMEOUT)
    assert list(response.outputs["y"].float_val) == [3.0]


def test_reload_config(models, start_server):
    """A new config that takes nothing in, leaves the old models on, or half applies though it is refused."""
    server = start_server(model_base_path=str(models / "m"), rest_api_port=0)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        request = model_management_pb2.ReloadConfigRequest()
        _fails(stub.HandleReloadConfigRequest, request, grpc.StatusCode.INVALID_ARGUMENT)
        config = request.config.model_config_list.config.add(name="other", base_path="relative")
        details = _fails(stub.HandleReloadConfigRequest, request, grpc.StatusCode.INVALID_ARGUMENT)
        assert "absolute path" in details
        config.base_path = str(models / "half_plus_two")
        assert "platform" in _fails(stub.HandleReloadConfigRequest, request, grpc.StatusCode.INVALID_ARGUMENT)
        config.model_platform = "tensorflow"
        config.version_labels["stable"] = 2
        details = _fails(stub.HandleReloadConfigRequest, request, grpc.StatusCode.FAILED_PRECONDITION)
        assert details == (
            "Request to assign label to version 2 of model other, which is not currently available for inference"
        )
        config.version_labels.clear()
        assert stub.HandleReloadConfigRequest(request, timeout=TIMEOUT).status.error_code == 0
        config.version_labels["stable"] = 2
        assert stub.HandleReloadConfigRequest(request, timeout=TIMEOUT).status.error_code == 0
        predict = _request("other", x=[2.0])
        predict.model_spec.version_label = "stable"
        prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        assert prediction.Predict(predict, timeout=TIMEOUT).model_spec.version.value == 2


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and keys and certificates by it: `server` for 127.0.0.1, and `client`."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout"]
    openssl(*new, "ca.key", "-x509", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(*new, f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.pem", "-days", "2"]
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-extfile", "names")
    return {path.name: path.read_text() for path in folder.glob("*.[pk]e[my]")}


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make certificates")
@pytest.mark.parametrize("verified", [False, True], ids=["server", "both"])
def test_tls(models, start_server, certificates, tmp_path, verified):
    """A server that answers without TLS, or that answers anybody where it is to know its clients."""
    config = {"server_key": certificates["server.key"], "server_cert": certificates["server.pem"]}
    lines = [f"{name}: {json.dumps(text)}" for name, text in config.items()]
    if verified:
        lines += [f"custom_ca: {json.dumps(certificates['ca.pem'])}", "client_verify: true"]
    (tmp_path / "ssl.config").write_text("\n".join(lines))
    base, flags = str(models / "m"), {"ssl_config_file": str(tmp_path / "ssl.config"), "rest_api_port": 0}
    server = start_server(model_base_path=base, model_name="m", **flags)

    def answers(credentials) -> bool:
        address = f"127.0.0.1:{server.grpc_port}"
        channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
        with channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            request = get_model_status_pb2.GetModelStatusRequest()
            request.model_spec.name = "m"
            try:
                return stub.GetModelStatus(request, timeout=10).model_version_status[0].version > 0
            except grpc.RpcError as error:
                return error.code() is not grpc.StatusCode.UNAVAILABLE

    trusting = certificates["ca.pem"].encode()
    known = grpc.ssl_channel_credentials(
        trusting, certificates["client.key"].encode(), certificates["client.pem"].encode()
    )
    assert not answers(None)
    assert not answers(grpc.ssl_channel_credentials())
    assert answers(grpc.ssl_channel_credentials(trusting)) is not verified
    assert answers(known)
