"""The folder serving/: manifests by their schemas, configs and flags by our server, clients by running them."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from tfclm.cli.arguments import parse
from tfclm.errors import InputError
from tfclm.serve import to_switch
from tfclm.server.settings import ServeSettings

pytestmark = pytest.mark.slow

SERVING = Path(__file__).parent.parent / "serving"
README = (SERVING / "README.md").read_text(encoding="utf-8")
MANIFESTS = sorted(SERVING.glob("kubernetes/**/*.yaml"))
# JSON, the shell and several rows of UTF-8 each have their way to break it.
PROMPT = "The \"import\" statement\\n\nsays: é 😀 $HOME `id` '%s'"


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


COMPOSE = documents(SERVING / "compose.yaml")[0]
RESOURCES = [resource for path in MANIFESTS for resource in documents(path)]


def of_kind(kind: str) -> list[dict[str, Any]]:
    """The Kubernetes resources of one kind."""
    return [resource for resource in RESOURCES if resource["kind"] == kind]


def settings_of(flags: list[str]) -> ServeSettings:
    """Flags of tensorflow_model_server as our server takes them."""
    # Compose's ${NAME:-default}, where NAME is not set.
    plain = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", flag) for flag in flags]
    return parse(ServeSettings, [to_switch(flag) for flag in plain], prog="serve", description="")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, servable_dir: Path) -> Path:
    """A folder like serving_models: quickstart is a tiny model, exported, as two versions; liar only looks like one."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("serving_models")
    # The second version is the same files under another number.
    for version in ("1", "2"):
        shutil.copytree(servable_dir, folder / "quickstart" / version)
    liar = make_liar()
    signatures = {name: getattr(liar, name) for name in ("serving_default", "generate", "score")}
    tf.saved_model.save(liar, str(folder / "liar" / "1"), signatures=signatures)
    return folder


def make_liar() -> Any:
    """A model with the right signatures that keeps none of their promises."""
    import tensorflow as tf

    def spec(name: str, kind: Any = tf.string) -> Any:
        return tf.TensorSpec([None], kind, name=name)

    params = {"max_new_tokens": tf.int32, "temperature": tf.float32, "top_k": tf.int32, "top_p": tf.float32}
    params |= {"repetition_penalty": tf.float32, "seed": tf.int64, "stop": tf.string}

    module = tf.Module()
    module.serving_default = tf.function(
        lambda prompt: {"generated_text": tf.strings.join(["Another ", prompt])}, input_signature=[spec("prompt")]
    )

    # The parameters have to be named inputs.
    def generate(prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop):
        return {
            "generated_text": tf.strings.join([prompt, tf.strings.as_string(tf.random.uniform(tf.shape(prompt)))]),
            "completion": prompt,
        }

    specs = [spec("prompt"), *(spec(name, kind) for name, kind in params.items())]
    module.generate = tf.function(generate, input_signature=specs)
    module.score = tf.function(
        lambda text: {"perplexity": tf.fill(tf.shape(text), float("nan")), "loss": tf.zeros(tf.shape(text))},
        input_signature=[spec("text")],
    )
    return module


@pytest.fixture(scope="module")
def start(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`start(config, root, **flags)`: our server with the text of a models.config, whose /models is the folder root."""
    from tfclm.server.server import Server

    with ExitStack() as stack:

        def started(config: str, root: Path = models, **flags: Any) -> Any:
            path = tmp_path_factory.mktemp("config") / "models.config"
            assert 'base_path: "/models/' in config
            path.write_text(config.replace("/models/", f"{root}/"))
            # Warm-up would take seconds, and most servers here are asked for their states alone.
            given = {"port": -1, "rest_api_port": -1, "shutdown_grace_seconds": 5.0, **flags}
            server = Server(ServeSettings(model_config_file=str(path), enable_model_warmup=False, **given))
            stack.callback(server.stop)
            server.start()
            return server

        yield started


@pytest.fixture(scope="module")
def server(start: Callable[..., Any]) -> Any:
    """models.config and monitoring.config as they are, and the liar."""
    config = (SERVING / "models.config").read_text()
    liar = 'config { name: "liar" base_path: "/models/liar" model_platform: "tensorflow" }'
    config = config.replace("model_config_list {", f"model_config_list {{ {liar}", 1)
    return start(config, monitoring_config_file=str(SERVING / "monitoring.config"))


@pytest.fixture(scope="module")
def url(server: Any) -> str:
    """Its REST."""
    return f"http://127.0.0.1:{server.rest_port}"


def ask(url: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a reply."""
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models/{path}", data), timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the folder, against loopback."""
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    )


# Manifests.


def compose_errors(document: Any) -> list[str]:
    """What the schema of the Compose specification says against a document."""
    jsonschema = pytest.importorskip("jsonschema", reason="the dev dependencies hold the schemas")
    pytest.importorskip("check_jsonschema", reason="the dev dependencies hold the schemas")
    file = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(file.read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [error.message for error in validator.iter_errors(document)]


def test_compose_file_is_valid():
    """A key that Compose does not know, or of another type; the check would have to notice one."""
    assert compose_errors(COMPOSE) == []
    assert compose_errors({"services": {"serving": {**COMPOSE["services"]["serving"], "port": ["8501:8501"]}}})
    assert compose_errors({"services": {"serving": {"image": "x", "healthcheck": {"retries": "often", "tests": []}}}})


@pytest.mark.parametrize("version", ["1.30", "newest"])
@pytest.mark.parametrize("path", MANIFESTS, ids=[str(path.relative_to(SERVING)) for path in MANIFESTS])
def test_kubernetes_manifests_are_valid(path: Path, version: str):
    """A field that Kubernetes does not know, and drops or refuses; 1.30 is the first with preStop.sleep."""
    validate = pytest.importorskip("kubernetes_validate", reason="the dev dependencies hold the schemas")
    version = validate.latest_version() if version == "newest" else version
    for resource in documents(path):
        validate.validate(resource, version, strict=True)
        resource["metadata"]["lables"] = {}
        with pytest.raises(validate.ValidationError):
            validate.validate(resource, version, strict=True)


def test_compose_mounts_what_it_names():
    """A path in a flag, or a file of the host, that is not there in the container: it would start and find nothing."""
    for name, service in COMPOSE["services"].items():
        mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
        inside = {target: source for source, target in mounts.items()}
        for source in mounts:
            if source.startswith(".") and source != "../serving_models":
                assert (SERVING / source).exists(), source
            elif not source.startswith("."):
                assert source in COMPOSE["volumes"]
        words = [*service.get("command", []), *map(str, service.get("environment", {}).values())]
        for path in re.findall(r"/etc/tfclm/\S+", " ".join(words)):
            assert (SERVING / inside["/etc/tfclm"] / path.removeprefix("/etc/tfclm/")).is_file(), (name, path)
    assert COMPOSE["services"]["serving"].get("profiles") is None
    assert {COMPOSE["services"][name]["profiles"][0] for name in ("prometheus", "grafana")} == {"monitoring"}


def test_flags_are_those_of_the_server():
    """A flag that is misspelled, which an unmodified server ignores; or a pod that ends before its requests do."""
    compose = settings_of(COMPOSE["services"]["serving"]["command"])
    assert not compose.xla_cpu_compilation_enabled
    for deployment in of_kind("Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        settings = settings_of(container["args"])
        assert settings.rest_api_timeout_in_ms == compose.rest_api_timeout_in_ms
        assert container["image"] == COMPOSE["services"]["serving"]["image"]
        # What runs when a pod is told to end has the time that a request may take.
        pod = deployment["spec"]["template"]["spec"]
        seconds = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert settings.rest_api_timeout_in_ms / 1000 <= seconds < pod["terminationGracePeriodSeconds"]


def test_images_are_pinned():
    """An image that is another one tomorrow."""
    for service in COMPOSE["services"].values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])


def test_kubernetes_names_fit_together():
    """A service without pods, an autoscaler without a deployment, a volume or config file that there is not."""
    config_map = of_kind("ConfigMap")[0]
    claims = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim")}
    deployments = {deployment["metadata"]["name"]: deployment for deployment in of_kind("Deployment")}
    assert of_kind("HorizontalPodAutoscaler")[0]["spec"]["scaleTargetRef"]["name"] in deployments
    selected = {}
    for service in of_kind("Service"):
        wanted = service["spec"]["selector"].items()
        pods = {name: each["spec"]["template"] for name, each in deployments.items()}
        hit = {name for name, pod in pods.items() if wanted <= pod["metadata"]["labels"].items()}
        selected[service["metadata"]["name"]] = hit
        for port in service["spec"]["ports"]:
            for name in hit:
                (container,) = pods[name]["spec"]["containers"]
                ports = {each["name"]: each["containerPort"] for each in container["ports"]}
                assert ports[port["targetPort"]] == port["port"]
    assert selected == {"quickstart": {"quickstart", "quickstart-canary"}, "quickstart-canary": {"quickstart-canary"}}
    for deployment in deployments.values():
        pod = deployment["spec"]["template"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        (container,) = pod["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["models"]["persistentVolumeClaim"]["claimName"] in claims
        assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
        for path in re.findall(r"/etc/tfclm/(\S+)", " ".join(container["args"])):
            assert path in config_map["data"]


def test_canary_is_stable_but_for_its_track():
    """A canary that shows how another setup does, because a change was made in one of the two files only."""
    stable, canary = (deployment["spec"] for deployment in of_kind("Deployment")[::-1])
    assert canary.pop("replicas") == 1
    assert json.loads(json.dumps(stable).replace("stable", "canary")) == canary


# Configs.


def test_configs_serve(start: Callable[..., Any], url: str):
    """A config file that the server refuses, or a label that stands for another version than the file says."""
    assert ask(url, "quickstart")[1]["model_version_status"][0]["version"] == "2"
    flags = settings_of(COMPOSE["services"]["serving"]["command"])
    labels = {"allow_version_labels_for_unavailable_models": flags.allow_version_labels_for_unavailable_models}
    canary = start((SERVING / "canary.config").read_text(), port=0, **labels)
    for label, version in (("stable", "1"), ("canary", "2")):
        status, reply = ask(f"http://127.0.0.1:{canary.rest_port}", f"quickstart/labels/{label}/metadata")
        assert (status, reply["model_spec"]["version"]) == (200, version)


def test_kubernetes_configs_serve(start: Callable[..., Any]):
    """A version of the config map that is not the one served, or an outdated copy of monitoring.config in it."""
    data = of_kind("ConfigMap")[0]["data"]
    for track, version in (("stable", "1"), ("canary", "2")):
        server = start(data[f"{track}.config"], port=0)
        status = ask(f"http://127.0.0.1:{server.rest_port}", "quickstart")[1]["model_version_status"]
        assert [(each["version"], each["state"]) for each in status] == [(version, "AVAILABLE")]
    lines = (SERVING / "monitoring.config").read_text().splitlines()
    assert data["monitoring.config"].split() == " ".join(line for line in lines if not line.startswith("#")).split()


def test_configs_are_text_protos():
    """A comment or a field that our server's reader alone would take."""
    texts = [(SERVING / name).read_text() for name in ("models.config", "canary.config")]
    texts += [of_kind("ConfigMap")[0]["data"][f"{track}.config"] for track in ("stable", "canary")]
    for text in texts:
        config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
        (model,) = config.model_config_list.config
        assert (model.name, model.base_path) == ("quickstart", "/models/quickstart")


def test_probes_tell_what_they_are_for(start: Callable[..., Any], models: Path, tmp_path: Path):
    """A pod that gets requests without a model, or one that is killed for having none."""
    (container,) = of_kind("Deployment")[0]["spec"]["template"]["spec"]["containers"]
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"].removeprefix("/v1/models/")
        for name in ("startup", "readiness", "liveness")
    }
    shutil.copytree(models / "quickstart" / "1", tmp_path / "quickstart" / "1")
    server = start((SERVING / "models.config").read_text(), tmp_path, port=0)
    url = f"http://127.0.0.1:{server.rest_port}"
    assert {name: ask(url, path)[0] for name, path in probes.items()} == dict.fromkeys(probes, 200)
    shutil.rmtree(tmp_path / "quickstart" / "1")
    for _ in range(200):
        if ask(url, probes["readiness"])[0] == 404:
            break
        time.sleep(0.05)
    assert {name: ask(url, path)[0] for name, path in probes.items()} == {
        "startup": 200,
        "readiness": 404,
        "liveness": 200,
    }


def test_health_check_of_compose(url: str):
    """A check that always fails, or that calls a server without the model healthy."""
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    kind, *command = COMPOSE["services"]["serving"]["healthcheck"]["test"]
    assert kind == "CMD"
    port = url.rpartition(":")[2]
    assert run(*(word.replace("8501", port) for word in command)).returncode == 0
    assert run(*(word.replace("8501", port).replace("quickstart", "nobody") for word in command)).returncode != 0
    assert run(*(word.replace("8501", "9") for word in command)).returncode != 0


# Monitoring.


@pytest.fixture(scope="module")
def metrics(server: Any, url: str) -> dict[str, set[str]]:
    """The metrics that the server has after one request, each with its labels."""
    assert ask(url, "quickstart:predict", {"instances": ["The"]})[0] == 200
    (scrape,) = documents(SERVING / "monitoring" / "prometheus.yaml")[0]["scrape_configs"]
    with urllib.request.urlopen(url + scrape["metrics_path"], timeout=60) as reply:
        page = reply.read().decode()
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([:\w]+)\{(.*)\} ", page, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_dashboard_asks_for_what_there_is(metrics: dict[str, set[str]]):
    """A panel that stays empty, because a metric or a label has another name."""
    # What Prometheus itself adds.
    known = {**metrics, "up": {"job", "instance"}}
    dashboard = json.loads((SERVING / "monitoring" / "dashboards" / "serving.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 8
    for expression in expressions:
        names = re.findall(r"(:[:\w]+|\bup\b)\{([^}]*)\}", expression)
        assert names, expression
        for name, selector in names:
            assert name in known, name
            assert set(re.findall(r'(\w+)(?:=|!=|=~)"', selector)) <= known[name]
            assert set(re.findall(r"\bby \((\w+)\)", expression)) <= known[name]
    (variable,) = dashboard["templating"]["list"]
    asked = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]["query"])
    assert asked is not None
    assert asked[2] in known[asked[1]]


def test_monitoring_fits_together():
    """Prometheus that asks nobody, Grafana that looks for its data or its dashboards in the wrong place."""
    folder = SERVING / "monitoring"
    (scrape,) = documents(folder / "prometheus.yaml")[0]["scrape_configs"]
    path = re.search('path: "(.*)"', (SERVING / "monitoring.config").read_text())
    assert path is not None
    assert scrape["metrics_path"] == path[1]
    ((target,),) = (config["targets"] for config in scrape["static_configs"])
    host, port = target.split(":")
    assert COMPOSE["services"][host]["ports"][1].endswith(f":{port}")
    (source,) = documents(folder / "grafana-datasources.yaml")[0]["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert COMPOSE["services"][host]["ports"][0].endswith(f":{port}")
    dashboard = (folder / "dashboards" / "serving.json").read_text(encoding="utf-8")
    assert set(re.findall(r'"type": "prometheus",\s*"uid": "(\w+)"', dashboard)) == {source["uid"]}
    assert f'job="{scrape["job_name"]}"' in json.dumps(json.loads(dashboard)).replace('\\"', '"')
    (provider,) = documents(folder / "grafana-dashboards.yaml")[0]["providers"]
    assert provider["options"]["path"] == "/etc/tfclm/monitoring/dashboards"
    for deployment in of_kind("Deployment"):
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/path"] == scrape["metrics_path"]


# The smoke script.


def smoke(*arguments: str) -> tuple[int, dict[str, bool]]:
    """Exit code of the script, and by the name of each check whether it held."""
    done = run("sh", SERVING / "smoke.sh", *arguments)
    lines = re.findall(r"^(ok     |FAILED ) (.*?): (?=.)", done.stdout, re.MULTILINE)
    assert len(lines) == len(done.stdout.splitlines()), done.stdout + done.stderr
    return done.returncode, {name: verdict.strip() == "ok" for verdict, name in lines}


CHECKS = ["status", "metadata", "serving_default", "generate", "score", "bad request"]
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


@needs_curl
def test_smoke_passes(url: str):
    """A script that fails a sound server."""
    assert smoke(url) == (0, dict.fromkeys(CHECKS, True))
    assert smoke(f"{url}/", "quickstart")[0] == 0


@needs_curl
def test_smoke_fails(url: str):
    """A script that passes a model which is absent, does not continue the prompt, ignores the seed, or scores NaN."""
    code, held = smoke(url, "liar")
    assert code == 1
    assert held == dict.fromkeys(CHECKS, False) | {"status": True, "metadata": True, "bad request": True}
    assert smoke(url, "nobody") == (1, dict.fromkeys(CHECKS, False))
    assert smoke("http://127.0.0.1:9") == (1, {"status": False})


@pytest.mark.parametrize("arguments", [[], ["localhost:8501"], ["http://127.0.0.1:9", "a b"], ["http://x", "y", "z"]])
def test_smoke_usage(arguments: list[str]):
    """A mistake in the call that looks like a broken server."""
    done = run("sh", SERVING / "smoke.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


# The clients.


@pytest.fixture(scope="module")
def text(url: str) -> str:
    """What every client should get for the prompt."""
    params = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.0}
    row = {"prompt": PROMPT, **params, "seed": 7, "stop": ""}
    status, reply = ask(url, "quickstart:predict", {"signature_name": "generate", "instances": [row]})
    assert status == 200, reply
    (answer,) = reply["predictions"]
    assert base64.b64decode(answer["completion_bytes"]["b64"])
    assert answer["generated_text"].startswith(PROMPT)
    return str(answer["generated_text"])


CLIENTS: dict[str, list[str | Path]] = {
    "curl": ["sh", SERVING / "clients" / "curl.sh"],
    "requests": [sys.executable, SERVING / "clients" / "rest.py"],
    "grpc": [sys.executable, SERVING / "clients" / "rpc.py"],
    "node": ["node", SERVING / "clients" / "fetch.mjs"],
    "go": ["go", "run", SERVING / "clients" / "main.go"],
}


@pytest.mark.parametrize("name", CLIENTS)
def test_clients_get_the_same_text(name: str, server: Any, url: str, text: str):
    """A client that no longer fits the signature, that breaks a prompt on its way, or that takes an error for text."""
    program = "curl" if name == "curl" else str(CLIENTS[name][0])
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    address = f"127.0.0.1:{server.grpc_port}" if name == "grpc" else url
    done = run(*CLIENTS[name], address, "quickstart", PROMPT, GOTOOLCHAIN="local", GOFLAGS="-mod=mod")
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout)["predictions"][0]["generated_text"] + "\n" if name == "curl" else done.stdout
    assert given == text + "\n"
    refused = run(*CLIENTS[name], address, "nobody", PROMPT, GOTOOLCHAIN="local", GOFLAGS="-mod=mod")
    assert refused.returncode != 0
    assert "Servable not found for request: Latest(nobody)" in refused.stdout + refused.stderr


def test_every_client_is_tried():
    """A client that no test runs."""
    files = {path.name for path in (SERVING / "clients").iterdir() if path.is_file()}
    assert files == {Path(command[-1]).name for command in CLIENTS.values()}


# The README.


def test_flags_that_the_readme_calls_refused():
    """A flag that the table lists as refused, but the server accepts or silently ignores."""
    (row,) = re.findall(r"^\| Flags it refuses \|(.*)$", README, re.MULTILINE)
    flags = re.findall(r"`--(\w+)`", row.split("|")[0])
    assert len(flags) > 15
    for flag in flags:
        with pytest.raises(InputError, match="unrecognized arguments"):
            settings_of([f"--{flag}=1"])


def test_additional_flags_of_the_readme():
    """A flag in the table that does not exist."""
    (row,) = re.findall(r"^\| Additional flags \|(.*)$", README, re.MULTILINE)
    flags = re.findall(r"`--(\w+)`", row)
    assert flags
    assert set(flags) <= set(ServeSettings.__annotations__)


def test_readme_names_what_there_is():
    """A broken link or path in the README, or a file that it does not mention."""
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (SERVING / target).exists(), target
    for path in re.findall(r"serving/[\w./-]+\w", README):
        assert (SERVING.parent / path).exists(), path
    for file in SERVING.iterdir():
        assert file.name in README or file.name == "README.md"
