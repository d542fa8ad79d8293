"""The folder launch/ and the command `launch`: manifests by their schemas, commands and workers by running them."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, tiny_config

from tfclm.cli.arguments import parse
from tfclm.fit import FitSettings
from tfclm.launch import LaunchSettings, split_command, worker_config
from tfclm.training.workers import find_cluster

LAUNCH = ROOT / "launch"
MANIFESTS = sorted(LAUNCH.glob("kubernetes/*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def job_of(document: dict[str, Any]) -> dict[str, Any]:
    """The Job in a document: a Job itself, or the template of a JobSet or a runtime of Kubeflow Trainer."""
    spec = document["spec"]
    if document["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    if document["kind"] != "Job":
        (replicated,) = spec["replicatedJobs"]
        assert replicated.get("replicas", 1) == 1
        spec = replicated["template"]["spec"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": spec}


def jobs() -> dict[str, dict[str, Any]]:
    """The Job of each manifest."""
    kinds = ("Job", "JobSet", "TrainingRuntime")
    return {path.stem: job_of(each) for path in MANIFESTS for each in documents(path) if each["kind"] in kinds}


@pytest.mark.parametrize("version", ["1.31", "newest"])
def test_jobs_are_valid(version: str):
    """A field that Kubernetes does not know, and drops or refuses."""
    validate = pytest.importorskip("kubernetes_validate", reason="the dev dependencies hold the schemas")
    version = validate.latest_version() if version == "newest" else version
    plain = [each for path in MANIFESTS for each in documents(path) if each["kind"] in ("Job", "Service")]
    for resource in [*plain, *jobs().values()]:
        validate.validate(resource, version, strict=True)
        resource["metadata"]["lables"] = {}
        with pytest.raises(validate.ValidationError):
            validate.validate(resource, version, strict=True)


# The fields that the custom resources may use, down to the Job, whose own schema is checked above. Each
# has a type, a choice of values, or fields; a list has those of its items. Read from the openAPIV3Schema of
# config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml in kubernetes-sigs/jobset (commit 08dfbdf), and of
# manifests/base/crds/trainer.kubeflow.org_{trainingruntimes,trainjobs}.yaml in kubeflow/trainer (commit 8c0f505).
METADATA = {"name": str, "labels": dict}
JOBSET = {
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "failurePolicy": {
        "maxRestarts": int,
        "rules": [
            {
                "name": str,
                "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}],
            }
        ],
    },
    "replicatedJobs": [{"name": str, "replicas": int, "template": {"metadata": {"labels": dict}, "spec": dict}}],
}
RESOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "JobSet": ("jobset.x-k8s.io/v1alpha2", JOBSET),
    "TrainingRuntime": (
        "trainer.kubeflow.org/v1alpha1",
        {"mlPolicy": {"numNodes": int}, "template": {"spec": JOBSET}},
    ),
    "TrainJob": (
        "trainer.kubeflow.org/v1alpha1",
        {"runtimeRef": {"apiGroup": str, "kind": str, "name": str}, "trainer": {"numNodes": int}},
    ),
}


def check_fields(value: Any, schema: Any, path: str) -> None:
    """Asserts that a value has no other fields than these, of these types."""
    if isinstance(schema, set):
        assert value in schema, path
    elif isinstance(schema, type):
        assert type(value) is schema, path
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for each in value:
            check_fields(each, schema[0], f"{path}[]")
    else:
        assert isinstance(value, dict), path
        for name, inner in value.items():
            assert name in schema, f"{path}.{name}"
            check_fields(inner, schema[name], f"{path}.{name}")


def test_custom_resources_are_valid():
    """A field that JobSet or Kubeflow Trainer does not know or that has another type, and is dropped or refused."""
    found = [each for path in MANIFESTS for each in documents(path) if each["kind"] not in ("Job", "Service")]
    assert sorted(each["kind"] for each in found) == sorted(RESOURCES)
    for each in found:
        version, spec = RESOURCES[each["kind"]]
        check_fields(
            each, {"apiVersion": {version}, "kind": str, "metadata": METADATA, "spec": spec}, f"{each['kind']} "
        )
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", each["metadata"]["name"])


@pytest.mark.parametrize("name", ["job", "jobset", "trainjob"])
def test_wrong_settings_are_not_tried_again(name: str):
    """Twenty starts of a run that cannot work."""
    rules = jobs()[name]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    if name != "job":
        (document,) = (each for each in documents(LAUNCH / "kubernetes" / f"{name}.yaml") if each["kind"] != "TrainJob")
        spec = document["spec"] if name == "jobset" else document["spec"]["template"]["spec"]
        (rule,) = spec["failurePolicy"]["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def run_with_printer(tmp_path: Path, command: list[str], **environment: str) -> tuple[int, dict[str, Any]]:
    """The exit code of a command, and what the `python` that it calls gets: its TF_CONFIG and its arguments."""
    printer = tmp_path / "python"
    program = "import json, os, sys; print(json.dumps([os.environ.get('TF_CONFIG'), sys.argv[1:]]))"
    printer.write_text(f"#!{sys.executable}\n{program}\nsys.exit(int(os.environ.get('CODE', 0)))\n")
    printer.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), **environment}
    environment.pop("TF_CONFIG", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    config, arguments = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, {"config": config, "arguments": arguments, "out": done.stdout}


def check_flags(arguments: list[str]) -> FitSettings:
    """Flags of a file, as `fit` reads them."""
    assert arguments[:2] == ["-m", "tfclm.fit"]
    settings = parse(FitSettings, arguments[2:], prog="fit", description="").resolved()
    assert settings.strategy == "multi_worker"
    return settings


@pytest.mark.parametrize("name", ["job", "jobset", "trainjob"])
def test_pods_know_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """An address that no pod has, an index that is not the pod's, or a flag that `fit` does not know."""
    job = jobs()[name]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    count = job.get("completions", 2)
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment == {"WORKERS": str(count)}
    for index in range(count):
        command = [*container["command"], *container["args"]]
        _, got = run_with_printer(tmp_path, command, JOB_COMPLETION_INDEX=str(index), **environment)
        check_flags(got["arguments"])
        monkeypatch.setenv("TF_CONFIG", got["config"])
        resolver = find_cluster()
        assert (resolver.task_type, resolver.task_id) == ("worker", index)
        # Pods of a Job named J have the names J-0, J-1 and so on, and jobs of a JobSet named S are S-NAME-0.
        prefix = {"job": "train", "jobset": "train-workers-0", "trainjob": "train-node-0"}[name]
        port = container["ports"][0]["containerPort"]
        hosts = [f"{prefix}-{each}.train:{port}" for each in range(count)]
        assert resolver.cluster_spec().as_dict() == {"worker": hosts}


def test_kubernetes_names_fit_together():
    """A service without pods, a runtime that the job does not name, or another number of workers in it."""
    service, job = documents(LAUNCH / "kubernetes" / "job.yaml")
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == "train"
    runtime, train = documents(LAUNCH / "kubernetes" / "trainjob.yaml")
    assert train["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert train["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 2
    for name, each in jobs().items():
        pod = each["spec"]["template"]["spec"]
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert each["spec"].get("completions") == each["spec"].get("parallelism"), name


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 0, False), (1, 0, True), (1, 20, False), (2, 0, False)])
def test_slurm_script(tmp_path: Path, code: int, restarts: int, requeued: bool):
    """A job that is queued again for ever, or for a setting that is wrong; a flag that `fit` does not know."""
    for name, program in {"srun": 'shift; exec "$@"', "scontrol": f"echo $@ > {tmp_path}/requeued"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    given = {"CODE": str(code), "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_ID": "7"}
    ended, got = run_with_printer(tmp_path, ["bash", str(LAUNCH / "slurm.sh")], **given)
    assert ended == code
    assert got["config"] is None
    check_flags(got["arguments"])
    assert (tmp_path / "requeued").exists() == requeued
    options = re.findall(r"^#SBATCH --([a-z-]+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"requeue", "signal", "nodes", "ntasks-per-node"} <= set(options)


def test_vertex_job():
    """A field that Vertex AI does not know, or a flag that `fit` does not."""
    (job,) = documents(LAUNCH / "vertex.yaml")
    assert job.keys() <= {"workerPoolSpecs", "scheduling", "serviceAccount", "network", "baseOutputDirectory"}
    assert job["scheduling"] == {"restartJobOnWorkerRestart": True}
    assert job["workerPoolSpecs"][0]["replicaCount"] == 1  # the chief
    for pool in job["workerPoolSpecs"]:
        assert pool.keys() == {"machineSpec", "replicaCount", "containerSpec"}
        container = pool["containerSpec"]
        assert container.keys() == {"imageUri", "command", "args"}
        check_flags([*container["command"][1:], *container["args"]])


def test_ray_script(monkeypatch: pytest.MonkeyPatch):
    """A run that Ray takes for done because `fit` has ended with an exit code; a flag that `fit` does not know."""
    made: dict[str, Any] = {}

    class Trainer:
        def __init__(self, loop: Any, **options: Any):
            made.update(options, loop=loop)

        def fit(self) -> None:
            made["fitted"] = True

    named = {name: types.SimpleNamespace for name in ("FailureConfig", "RunConfig", "ScalingConfig")}
    for name, values in {"ray": {}, "ray.train": named, "ray.train.tensorflow": {"TensorflowTrainer": Trainer}}.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(str(LAUNCH / "ray_train.py"), run_name="__main__")
    assert made["fitted"]
    assert made["scaling_config"].num_workers == 2
    check_flags(["-m", "tfclm.fit", *made["train_loop_config"]["flags"]])
    with pytest.raises(RuntimeError, match="exit code 2"):
        made["loop"]({"flags": ["--epochs=0", *made["train_loop_config"]["flags"]]})


def test_readme_names_every_file():
    """A file that nobody finds, or one that is not there any more."""
    named = set(re.findall(r"^\| `([^`]+)`", (LAUNCH / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    files = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert named == files - {"README.md"}


# The command


def test_flags_of_launch_end_at_the_command():
    """Flags of `fit` that `launch` takes for its own."""
    assert split_command(["--workers", "3", "--port=9", "fit", "--workers"]) == (
        ["--workers", "3", "--port=9"],
        ["fit", "--workers"],
    )
    assert split_command(["--help"]) == (["--help"], [])
    assert json.loads(worker_config([1, 2], 1))["task"] == {"type": "worker", "index": 1}
    assert LaunchSettings().workers == 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, documents: list[str]) -> Path:
    """A directory with a tiny model and a text."""
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create, save

    folder = tmp_path_factory.mktemp("launch")
    save(create(tiny_config("gpt2", context=40)), AutoTokenizer.from_pretrained(tokenizer_dir), folder / "base")
    (folder / "text.txt").write_text("\n\n".join(" ".join(text.split())[:400] for text in documents[:30]))
    return folder


def launch(place: Path, *flags: str) -> subprocess.Popen[str]:
    """Starts two workers of a run in the directory."""
    settings = "--model base --train-file text.txt --output-dir run --block-size 32 --batch-size 8 --save-steps 2"
    words = ["-m", "tfclm.launch", "fit", *shlex.split(settings), "--num-proc", "1", *flags]
    return subprocess.Popen(
        [sys.executable, *words], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def processes_of(parent: int) -> list[int]:
    """The processes that this one has started, the first one first."""
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_leader_is_killed_and_the_run_resumes(place: Path):
    """Workers that outlive the one that is killed, a traceback in place of a line, or a run that begins anew."""
    first = launch(place, "--epochs", "6")
    until = time.monotonic() + 300
    while not (place / "run" / "resume" / "state" / "ckpt-3.index").exists() and first.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    leader, _ = processes_of(first.pid)
    os.kill(leader, signal.SIGKILL)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 1
    # The first one's progress bar may end without a line break.
    said = re.findall("worker 1: (.*)", out)
    assert said[-1].endswith("; start all workers again to resume the run"), out
    assert "Traceback" not in out
    assert not (place / "run" / "results.json").exists()
    # The same run with fewer epochs would be another one.
    second = launch(place, "--epochs", "6")
    out, _ = second.communicate(timeout=600)
    assert second.returncode == 0, out
    results = json.loads((place / "run" / "results.json").read_text())
    assert len(results["train"]["epochs"]) == 6
    assert results["perplexity"] < results["initial_perplexity"]
    assert not (place / "run" / "resume").exists()
    assert not list((place / "run").glob(".worker*"))
