"""What happens when versions come, go or are broken: "Warm-up and versions observed"."""

from __future__ import annotations

import shutil
import threading

import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from server.serving_models import HalfPlusTwo, Slow, Text, export
from tfclm.errors import InputError

QUICK = {"load_retry_interval_micros": 100_000, "max_num_load_retries": 1, "port": 0}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A finished version, to be copied."""
    return export(HalfPlusTwo(), tmp_path_factory.mktemp("half"), 1)


@pytest.fixture
def base(tmp_path, half):
    """A base path with version 1."""
    folder = tmp_path / "base"
    shutil.copytree(half, folder / "1")
    return folder


def publish(half, base, name):
    """Publishes a version as a deployment does: written under a hidden name, then renamed."""
    shutil.copytree(half, base / ".writing")
    (base / ".writing").rename(base / name)


def states(client):
    """The states of the versions of the model named model."""
    answer = client.get("/v1/models/model")
    return {each["version"]: each["state"] for each in answer.json.get("model_version_status", [])}


def test_new_version_is_taken_up(base, half, start_server, client, eventually):
    """A new version that is not seen, an old one that stays in memory, or a moment in which neither answers."""
    rest = client(start_server(model_base_path=str(base), **QUICK))
    failures = []
    done = threading.Event()

    def ask():
        while not done.is_set():
            answer = rest.predict({"inputs": [2]}, "model")
            if answer.status != 200:
                failures.append(answer)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        publish(half, base, "002")
        eventually(lambda: states(rest) == {"2": "AVAILABLE", "1": "END"})
    finally:
        done.set()
        thread.join()
    assert not failures


def test_deleting_the_newest_rolls_back(base, half, start_server, client, eventually):
    """A deleted version that is still served, or no version that takes its place."""
    publish(half, base, "2")
    rest = client(start_server(model_base_path=str(base), **QUICK))
    assert states(rest) == {"2": "AVAILABLE"}
    shutil.rmtree(base / "2")
    eventually(lambda: states(rest) == {"2": "END", "1": "AVAILABLE"})
    shutil.rmtree(base / "1")
    eventually(lambda: states(rest)["1"] == "END")
    answer = rest.predict({"inputs": [2]}, "model")
    assert (answer.status, answer.error) == (404, "Servable not found for request: Latest(model)")
    publish(half, base, "2")
    eventually(lambda: states(rest)["2"] == "AVAILABLE")


def test_other_names_are_no_versions(base, half, start_server, client):
    """A folder that is being written, or of another name, taken for a version."""
    for name in (".writing-3", "v4", "5.0", str(2**63), "tmp"):
        shutil.copytree(half, base / name)
    rest = client(start_server(model_base_path=str(base), **QUICK))
    assert states(rest) == {"1": "AVAILABLE"}


def test_broken_version_is_refused(base, half, start_server, client, eventually, caplog):
    """A broken version that takes the place of a good one, fails without a word, or is never tried again."""
    rest = client(start_server(model_base_path=str(base), **QUICK))
    (base / "2").mkdir()
    eventually(lambda: states(rest).get("2") == "END")
    assert rest.predict({"inputs": [2]}, "model").json == {"outputs": [3.0]}
    status = rest.get("/v1/models/model/versions/2").json["model_version_status"][0]["status"]
    assert status["error_code"] == "NOT_FOUND"
    assert status["error_message"].startswith("Could not find SavedModel .pb or .pbtxt")
    attempts = [record.getMessage() for record in caplog.records if "cannot be loaded" in record.getMessage()]
    assert [message.split(": NOT_FOUND")[0] for message in attempts] == [
        "version 2 of model model cannot be loaded (attempt 1 of 2)",
        "version 2 of model model cannot be loaded (attempt 2 of 2)",
    ]
    # It is loaded once it has been taken away and put there again.
    (base / "2").rmdir()
    eventually(lambda: states(rest)["1"] == "AVAILABLE")
    publish(half, base, "3")
    eventually(lambda: states(rest).get("3") == "AVAILABLE")


def test_version_without_variables(base, start_server, client, eventually):
    """A half-written version that takes the place of a good one: the real server takes it, and fails every request."""
    rest = client(start_server(model_base_path=str(base), **QUICK))
    (base / "2").mkdir()
    shutil.copy(base / "1" / "saved_model.pb", base / "2")
    eventually(lambda: states(rest).get("2") == "END")
    assert rest.predict({"inputs": [2]}, "model").json == {"outputs": [3.0]}


def test_running_request_keeps_its_version(tmp_path, start_server, client, eventually):
    """A version unloaded beneath a request that runs on it."""
    base = tmp_path / "base"
    export(Slow(), base, 1)
    rest = client(start_server(model_base_path=str(base), **QUICK))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(rest.predict({"inputs": 400_000}, "model")))
    thread.start()
    export(Slow(), base, 2)
    eventually(lambda: states(rest).get("2") == "AVAILABLE")
    thread.join()
    assert answers[0].json == {"outputs": 400_000}
    eventually(lambda: states(rest)["1"] == "END")


def _warm_up(version, *requests):
    (version / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(version / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        for signature, inputs in requests:
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog())
            request: predict_pb2.PredictRequest = log.predict_log.request
            request.model_spec.name, request.model_spec.signature_name = "anything", signature
            for name, value in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            writer.write(log.SerializeToString())


def test_warm_up_is_replayed(tmp_path, start_server):
    """Warm-up records that are not run, or that must name inputs which have a default."""
    _warm_up(export(Text(), tmp_path, 1), ("params", {"prompt": ["a"]}), ("", {"prompt": ["a"]}))
    server = start_server(model_base_path=str(tmp_path), **QUICK)
    assert server.metrics.value("/tensorflow/serving/model_warmup_records_read") == 2


def test_failing_warm_up_refuses_the_version(tmp_path, start_server, client):
    """A version that is served although its warm-up fails, or a flag without effect."""
    _warm_up(export(Text(), tmp_path, 1), ("guarded", {"prompt": ["a"] * 3}))
    with pytest.raises(InputError, match=r"1 servable\(s\) did not become available: .*at most 2 prompts"):
        start_server(model_base_path=str(tmp_path), **QUICK)
    rest = client(start_server(model_base_path=str(tmp_path), enable_model_warmup=False, **QUICK))
    assert rest.predict({"inputs": ["a"]}, "model").status == 200


def test_warm_up_of_another_format(tmp_path, start_server):
    """A warm-up file that is not a TFRecord and is silently ignored."""
    version = export(Text(), tmp_path, 1)
    (version / "assets.extra").mkdir()
    (version / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"not records at all")
    with pytest.raises(InputError, match="verify your warmup data"):
        start_server(model_base_path=str(tmp_path), **QUICK)


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("latest { num_versions: 2 }", {"3", "2"}),
        ("all {}", {"3", "2", "1"}),
        ("specific { versions: 1 }", {"1"}),
    ],
)
def test_version_policy(base, half, start_server, client, tmp_path, policy, served):
    """A policy of the config file that is not followed."""
    publish(half, base, "2")
    publish(half, base, "3")
    config = tmp_path / "models.config"
    entry = f'name: "model" base_path: "{base}" model_platform: "tensorflow" model_version_policy {{ {policy} }}'
    config.write_text(f"model_config_list {{ config {{ {entry} }} }}")
    rest = client(start_server(model_config_file=str(config), **QUICK))
    assert states(rest) == dict.fromkeys(served, "AVAILABLE")


def test_config_file_is_polled(base, half, start_server, client, tmp_path, eventually, caplog):
    """A changed config file that is never read again, or a broken one that takes the models away."""
    config = tmp_path / "models.config"
    entry = f'config {{ name: "%s" base_path: "{base}" model_platform: "tensorflow" }}'
    config.write_text(f"model_config_list {{ {entry % 'model'} }}")
    rest = client(start_server(model_config_file=str(config), model_config_file_poll_wait_seconds=1, **QUICK))
    config.write_text("model_config_list { nonsense }")
    eventually(lambda: "the config is not changed: `model_config_file`" in caplog.text)
    assert rest.predict({"inputs": [2]}, "model").json == {"outputs": [3.0]}
    config.write_text(f"model_config_list {{ {entry % 'other'} }}")
    eventually(lambda: rest.predict({"inputs": [2]}, "other").status == 200)
    eventually(lambda: rest.predict({"inputs": [2]}, "model").status == 404)
