"""A server in its own process: no request, deadline, signal or folder ends it, stops it, or fills its memory."""

from __future__ import annotations

import concurrent.futures
import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import time

import grpc
import pytest
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

from server.processes import launcher
from server.serving_models import HalfPlusTwo, Slow, export

pytestmark = pytest.mark.slow

BUSY = 60  # seconds that an answer may take on a machine that does much else


class Heavy(tf.Module):
    """What takes long, or much memory for a session to prepare."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="n")])
    def kernel(self, n):
        """One kernel, which nothing can interrupt: a core for about a second if `n` is 1500, for a minute if 6000."""
        matrix = tf.random.stateless_normal([n, n], [1, 2])
        return {"norm": tf.linalg.svd(matrix, compute_uv=False)[0]}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="x")])
    def wide(self, x):
        outputs = {}
        for number in range(6):
            value = x + number
            for _ in range(100):
                value = tf.sin(value)
            outputs[f"y{number}"] = value
        return outputs

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
    def number(self, x):
        return {"y": tf.strings.to_number(x)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def first(self, inputs):
        return {"outputs": tf.cast(tf.strings.length(inputs), tf.float32)}

    def signatures(self) -> dict:
        """By their names in the SavedModel."""
        names = ("kernel", "wide", "number", "first")
        return {"serving_default": self.kernel, **{name: getattr(self, name) for name in names}}


def _entry(name, base, more=""):
    return f'config {{ name: "{name}" base_path: "{base}" model_platform: "tensorflow" {more} }}'


def _config(folder, *entries):
    config = folder / "models.config"
    config.write_text(f"model_config_list {{ {' '.join(entries)} }}")
    return f"--model_config_file={config}"


@pytest.fixture
def launch():
    """`launch(*flags)`: a server in its own process, killed after the test, with what still runs in it."""
    with launcher() as launch:
        yield launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base paths of the models named half, slow and heavy."""
    folder = tmp_path_factory.mktemp("heavy")
    export(HalfPlusTwo(), folder / "half", 1)
    export(Slow(), folder / "slow", 1)
    export(Heavy(), folder / "heavy", 1)
    return folder


@pytest.fixture(scope="module")
def process(folder):
    """The server that most tests here ask: few threads, so that few requests could take them all."""
    (folder / "monitoring.config").write_text("prometheus_config { enable: true }")
    entries = [_entry(name, folder / name) for name in ("half", "slow", "heavy")]
    with launcher() as launch:
        yield launch(
            _config(folder, *entries),
            f"--monitoring_config_file={folder / 'monitoring.config'}",
            "--grpc_max_threads=2",
            "--rest_api_num_threads=4",
            "--tensorflow_inter_op_parallelism=1",
            "--rest_api_timeout_in_ms=5000",
            "--no_access_log",
        ).listens()


@pytest.fixture(scope="module")
def channel(process):
    """A channel to it."""
    with grpc.insecure_channel(f"127.0.0.1:{process.grpc_port}") as channel:
        yield channel


@pytest.fixture(scope="module")
def predict(channel):
    """Its Predict."""
    return prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict


def _request(model, signature="", only=(), **inputs):
    request = predict_pb2.PredictRequest(output_filter=only)
    request.model_spec.name, request.model_spec.signature_name = model, signature
    for name, value in inputs.items():
        proto = value if isinstance(value, TensorProto) else tf.make_tensor_proto(value)
        request.inputs[name].CopyFrom(proto)
    return request


def _refused(call, request, code=grpc.StatusCode.INVALID_ARGUMENT, seconds=BUSY):
    with pytest.raises(grpc.RpcError) as raised:
        call(request, timeout=seconds)
    assert raised.value.code() is code, raised.value
    return raised.value.details()


def _half_answers(process, predict):
    began = time.monotonic()
    response = predict(_request("half", x=[2.0]), timeout=BUSY)
    assert list(response.outputs["y"].float_val) == [3.0]
    assert process.rest.predict({"inputs": [2.0]}, "half").json == {"outputs": [3.0]}
    return time.monotonic() - began


def test_few_bytes_do_not_ask_for_all_memory(process, predict, channel):
    """A message of some bytes whose tensors take gigabytes, by values that are repeated."""
    string = predict_pb2.PredictRequest().inputs["x"]
    string.dtype = types_pb2.DT_STRING
    string.string_val.append(b"a")
    string.tensor_shape.dim.add(size=2**27)
    before = process.rss()
    began = time.monotonic()
    assert "at most 16777216 bytes" in _refused(predict, _request("heavy", "number", x=string))
    # A long string is much even a few times, and so are many tensors of a request together.
    string.string_val[0] = b"a" * 1_000_000
    string.tensor_shape.dim[0].size = 10_000
    assert "at most 16777216 bytes" in _refused(predict, _request("heavy", "number", x=string))
    number = tf.make_tensor_proto(1.0, shape=[2**23])
    many = {f"x{index}": number for index in range(200)}
    assert "at most 16777216 bytes" in _refused(predict, _request("half", **many))
    # Dimensions whose product takes longer to compute than a request may take.
    endless = tf.make_tensor_proto(1.0)
    for _ in range(20_000):
        endless.tensor_shape.dim.add(size=2**62)
    assert _refused(predict, _request("half", x=endless)) == "tensor parsing error: x"
    # The context of examples stands for a part of each.
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name, request.model_spec.signature_name = "half", "classify"
    examples = request.input.example_list_with_context
    examples.context.features.feature["c"].bytes_list.value.append(b"c" * 1_000_000)
    for _ in range(10_000):
        examples.examples.add()
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    assert "at most 16777216 bytes may be repeated" in _refused(stub.Classify, request)
    assert time.monotonic() - began < BUSY
    assert process.peak() - before < 500
    # Constant tensors of clients still work.
    compact = tf.make_tensor_proto(1.0, shape=[1_000_000])
    assert len(compact.float_val) == 1
    outputs = predict(_request("half", x=compact), timeout=BUSY).outputs["y"]
    assert len(outputs.float_val) == 1_000_000
    assert set(outputs.float_val) == {2.5}
    string.string_val[0], string.tensor_shape.dim[0].size = b"7", 100_000
    outputs = predict(_request("heavy", "number", x=string), timeout=BUSY).outputs["y"]
    assert list(outputs.float_val) == [7.0] * 100_000


def test_types_that_cannot_be_fed(process, predict):
    """A tensor of a type without values answered as a fault of the server, with a traceback in the log."""
    for number in (*types_pb2.DataType.values(), 99, -1):
        for field, value in (
            ("string_val", b"1"),
            ("int_val", 300),
            ("float_val", 1.0),
            ("tensor_content", b"\0" * 16),
        ):
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "half"
            tensor = request.inputs["x"]
            tensor.dtype = number
            tensor.tensor_shape.dim.add(size=1)
            if field == "tensor_content":
                tensor.tensor_content = value
            else:
                getattr(tensor, field).append(value)
            code = predict.future(request, timeout=BUSY).code()
            allowed = {grpc.StatusCode.INVALID_ARGUMENT}
            if number == types_pb2.DT_FLOAT:
                allowed.add(grpc.StatusCode.OK)
            assert code in allowed, (number, field)
    assert "traceback" not in process.log


def test_error_that_carries_invalid_utf8(process, predict):
    """A graph's error with the request's own bytes in it answered as a fault of the server, over gRPC or REST."""
    details = _refused(predict, _request("heavy", "number", x=[b"\xff\xfe"]))
    assert "could not correctly convert string: \ufffd\ufffd" in details
    body = {"signature_name": "number", "inputs": [{"b64": "//4="}]}
    answer = process.rest.predict(body, "heavy")
    assert answer.status == 400
    assert "could not correctly convert string" in answer.error
    # Each byte that is not ASCII is sent as three: a status that is too long for a client is no status.
    details = _refused(predict, _request("heavy", "number", x=["\u20ac" * 5000]))
    assert details.endswith("...TRUNCATED")
    assert "traceback" not in process.log


def test_output_filter_makes_no_new_executor(process, predict):
    """Each new choice of outputs, or of tasks, keeping another copy of the model's graph and taking seconds."""

    def ask(*only):
        outputs = predict(_request("heavy", "wide", only, x=1.0), timeout=BUSY).outputs
        assert set(outputs) == set(only) or not only
        return {name: outputs[name].float_val[0] for name in outputs}

    whole = ask()
    assert len(set(whole.values())) == 6
    before, began = process.rss(), process.cpu()
    for bits in range(1, 63):
        only = [f"y{number}" for number in range(6) if bits >> number & 1]
        assert ask(*only) == {name: whole[name] for name in only}
    print("MiB:", process.rss() - before, "CPU seconds:", process.cpu() - began)
    assert process.rss() - before < 60
    assert process.cpu() - began < 2


def test_multi_inference_makes_no_new_executor(process, channel):
    """Several tasks whose answers differ from those of each task alone."""
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    request = inference_pb2.MultiInferenceRequest()
    for signature in ("regress", "classify"):
        task = request.tasks.add(method_name=f"tensorflow/serving/{signature}")
        task.model_spec.name, task.model_spec.signature_name = "half", signature
    for value in (2.0, 4.0):
        example = request.input.example_list.examples.add()
        example.features.feature["x"].float_list.value.append(value)
    regressed, classified = stub.MultiInference(request, timeout=BUSY).results
    assert [each.value for each in regressed.regression_result.regressions] == [3.0, 4.0]
    assert [each.classes[0].score for each in classified.classification_result.classifications] == [3.0, 4.0]


def test_request_count_of_models_that_do_not_exist(process, predict):
    """Names that requests make up taking the places of real ones in the metrics, or filling the memory."""

    def counts():
        lines = process.rest.get("/monitoring/prometheus/metrics").body.decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if line.startswith(":tensorflow:serving:request_count{"))

    for number in range(1100):
        with pytest.raises(grpc.RpcError):
            predict(_request(f"nobody{number}", x=[1.0]), timeout=BUSY)
    assert process.rest.predict({"inputs": [1]}, "none-at-all").status == 404
    assert process.rest.predict({"inputs": 1}, "slow").status == 200
    found = counts()
    assert int(found[':tensorflow:serving:request_count{model_name="slow",status="OK"}']) >= 1
    row = ':tensorflow:serving:request_count{model_name="(unknown)",status="NOT_FOUND"}'
    assert int(found[row]) == 1101
    assert len(found) < 20


def test_reloads_of_an_empty_folder(process, channel, predict, folder, tmp_path):
    """Configs with a folder that holds no version, each of which takes a thread of gRPC for good."""
    reload = model_service_pb2_grpc.ModelServiceStub(channel).HandleReloadConfigRequest
    request = model_management_pb2.ReloadConfigRequest()
    for name in ("half", "slow", "heavy"):
        request.config.model_config_list.config.add(
            name=name, base_path=str(folder / name), model_platform="tensorflow"
        )
    empty = request.config.model_config_list.config.add(base_path=str(tmp_path), model_platform="tensorflow")
    calls = []
    for number in range(12):
        empty.name = f"empty{number}"
        calls.append(reload.future(request, timeout=BUSY))
    codes = {call.code() for call in calls}
    assert codes <= {grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}, calls
    empty.name = "empty"
    details = _refused(reload, request, grpc.StatusCode.UNKNOWN)
    assert f"model empty has no version in {tmp_path}: no subdirectory is named with a number" in details
    assert process.rest.get("/v1/models/empty").error.startswith("Could not find any versions of model empty: ")
    assert _half_answers(process, predict) < BUSY
    # It was taken nevertheless, and a version is taken up when it comes.
    export(HalfPlusTwo(), tmp_path, 3)
    deadline = time.monotonic() + BUSY
    while process.rest.predict({"inputs": [2.0]}, "empty").status != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    del request.config.model_config_list.config[3]
    reload(request, timeout=BUSY)


def _drop_capabilities():
    """Lets permissions hold for root too. Has no effect, and needs none, for anybody else."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for number in range(3):  # effective, permitted and inheritable
        sets[number] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("kind", ["permission", "loop"])
def test_unreadable_version_folder(launch, folder, tmp_path, kind):
    """A folder that cannot be read keeping all models from being served, with ten tracebacks a second."""
    version = tmp_path / "bad" / "1"
    version.mkdir(parents=True)
    if kind == "permission":
        version.chmod(0)
    else:
        (version / "saved_model.pb").symlink_to("saved_model.pb")
    entries = [_entry("bad", tmp_path / "bad"), _entry("half", folder / "half")]
    process = launch(_config(tmp_path, *entries), "--no_access_log", first=_drop_capabilities).listens()
    assert process.rest.predict({"inputs": [2.0]}, "half").json == {"outputs": [3.0]}
    (status,) = process.rest.get("/v1/models/bad").json["model_version_status"]
    reason = "Permission denied" if kind == "permission" else "Too many levels of symbolic links"
    assert status["state"] == "END"
    assert reason in status["status"]["error_message"]
    time.sleep(3)
    said = [event for event in process.events if reason in event]
    assert len(said) == 1, process.log
    assert re.search(r"version 1 of model bad cannot be read: .*; tried again at each poll", said[0])
    assert "traceback" not in process.log
    # It is served once it can be read.
    version.chmod(0o700)
    shutil.rmtree(version)
    export(HalfPlusTwo(), tmp_path / "bad", 1)
    deadline = time.monotonic() + BUSY
    while process.rest.predict({"inputs": [2.0]}, "bad").status != 200:
        assert time.monotonic() < deadline, process.log
        time.sleep(0.1)


def test_sigterm_ends_it_whatever_runs(launch, folder):
    """A process that keeps running after SIGTERM until an abandoned kernel ends."""
    process = launch(
        f"--model_base_path={folder / 'heavy'}", "--shutdown_grace_seconds=1", "--rest_api_timeout_in_ms=500"
    ).listens()
    assert process.rest.predict({"inputs": 8000}, "model").status == 504
    began = time.monotonic()
    process.terminate()
    assert process.ends(30) == 0
    assert time.monotonic() - began < 30
    assert "1 run(s) did not end within the grace period of 1 s; not waiting for them" in process.events
    assert "traceback" not in process.log


def test_versions_change_during_a_run(launch, folder, tmp_path):
    """An abandoned run that blocks the loading of all versions, because its own version is to be unloaded."""
    shutil.copytree(folder / "heavy", tmp_path / "heavy")
    process = launch(f"--model_base_path={tmp_path / 'heavy'}", "--rest_api_timeout_in_ms=500").listens()
    assert process.rest.predict({"inputs": 8000}, "model").status == 504
    for version in ("2", "3"):
        shutil.copytree(tmp_path / "heavy" / "1", tmp_path / "heavy" / f".writing-{version}")
        (tmp_path / "heavy" / f".writing-{version}").rename(tmp_path / "heavy" / version)
        process.says(f"loaded version {version} of model model", 20)
    process.says("unloaded version 2 of model model", 20)
    body = {"signature_name": "number", "inputs": ["7"]}
    assert process.rest.predict(body, "model").json == {"outputs": [7.0]}


def test_second_signal_ends_it_at_once(launch, folder):
    """An operator who must wait for the grace period, or kill the process."""
    process = launch(f"--model_base_path={folder / 'slow'}", "--shutdown_grace_seconds=600").listens()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(process.rest.predict, {"inputs": 2**31 - 1}, "model")
        time.sleep(1)
        process.terminate()
        process.says('"stopping"')
        time.sleep(1)
        assert process.process.is_alive()
        process.terminate()
        assert process.ends(20) == 128 + signal.SIGTERM
        assert answer.exception() is not None


def test_sigterm_while_a_model_is_loaded(launch, folder, tmp_path):
    """A process that runs beyond its grace period until a load ends, or that claims to listen on port 0."""
    version = export(Heavy(), tmp_path / "model", 1)
    (version / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(version / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(_request("model", n=8000))
        writer.write(log.SerializeToString())
    entries = [_entry("model", tmp_path / "model"), _entry("half", folder / "half")]
    process = launch(_config(tmp_path, *entries), "--shutdown_grace_seconds=1")
    deadline = time.monotonic() + BUSY
    while len(os.listdir(f"/proc/{process.process.pid}/task")) < 20:
        # TensorFlow's threads, of which the session of a model has most.
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    process.terminate()
    assert process.ends(30) == 0
    assert "a version is still loading; not waiting for it" in process.events
    assert "listening" not in process.log
    assert "traceback" not in process.log


def test_empty_folder_is_waited_for(launch, tmp_path):
    """A server that does not listen, and does not say why, because its model has no version yet."""
    process = launch(f"--model_base_path={tmp_path}").listens()
    warning = f"model model has no version in {tmp_path}: no subdirectory is named with a number"
    assert f"{warning}; checked again at each poll" in process.events
    assert process.rest.predict({"inputs": [2.0]}, "model").status == 404
    export(HalfPlusTwo(), tmp_path, 1)
    process.says("loaded version 1 of model model")
    assert process.rest.predict({"inputs": [2.0]}, "model").json == {"outputs": [3.0]}
    process.terminate()
    assert process.ends(30) == 0


def test_taken_port_is_noticed_before_loading(folder, start_server, caplog):
    """Minutes of loading before the message that the port is in use."""
    from tfclm.errors import InputError

    caplog.set_level(logging.INFO, "tfclm.server")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for flag in ("port", "rest_api_port"):
            settings = {"port": 0, "rest_api_port": 0, flag: port}
            with pytest.raises(InputError, match=f"`{flag}`: cannot listen on 127.0.0.1:{port}"):
                start_server(model_base_path=str(folder / "half"), **settings)
    assert not [record for record in caplog.records if "loaded version" in record.getMessage()]


# The last ones, as their kernels go on.


def test_deadline_ends_the_run(process, predict):
    """A call that runs long after its client has given up."""
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as raised:
        predict(_request("slow", steps=2**31 - 1), timeout=1)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 10
    time.sleep(2)
    before = process.cpu()
    time.sleep(2)
    assert process.cpu() - before < 0.5


def test_queued_call_that_was_cancelled_is_not_run(process, predict):
    """Threads that do what nobody waits for any more, because it was given up before it began."""
    running = [predict.future(_request("slow", steps=2**31 - 1), timeout=4) for _ in range(2)]
    time.sleep(0.5)
    queued = [predict.future(_request("slow", steps=2**31 - 1), timeout=1) for _ in range(8)]
    for call in running + queued:
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert _half_answers(process, predict) < 10


def test_rest_limit_holds_though_a_kernel_runs(process):
    """A time limit that is noticed only when the kernel ends that ran as it passed."""
    began = time.monotonic()
    answer = process.rest.predict({"inputs": 5000}, "heavy")
    assert (answer.status, answer.error) == (504, "Timed out waiting for notification")
    assert time.monotonic() - began < 15


def test_cancelled_calls_leave_their_places(process, predict):
    """Calls that were given up, and whose kernels nothing can interrupt, starving all others, REST too."""
    for _ in range(4):
        calls = [predict.future(_request("heavy", n=3000), timeout=BUSY) for _ in range(2)]
        time.sleep(0.5)
        for call in calls:
            call.cancel()
    for _ in range(3):
        assert _half_answers(process, predict) < 10
