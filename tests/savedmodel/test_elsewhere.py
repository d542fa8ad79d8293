"""An exported version without tfclm and transformers: loaded by TensorFlow, its tools and a C program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import EXTRAS_OFF, LONG, tiny_config
from tensorflow.core.protobuf import saved_model_pb2

pytestmark = pytest.mark.slow

# With TFCLM_LONG_TESTS=1 the TensorFlow of the server's release is installed, which takes minutes.
OLDER = os.environ.get("TFCLM_OLDER_PYTHON")  # of an environment with the oldest supported TensorFlow
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

CONTEXT = 16  # shorter than a warm-up prompt usually is
# Two rows: a greedy one and a sampled one.
REQUEST: dict[str, list[Any]] = {
    "prompt": ["The qu", "An im"],
    "max_new_tokens": [8, 12],
    "temperature": [0.0, 1.5],
    "top_k": [0, 100],
    "top_p": [1.0, 0.95],
    "repetition_penalty": [1.0, 1.1],
    "seed": [-1, 20240229],
    "stop": ["", "zzz"],
}
TYPES = {
    "max_new_tokens": "int32",
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "repetition_penalty": "float32",
    "seed": "int64",
}

# The parameters of `generate_tokens` alone, with values for the rows.
EXTRAS: dict[str, list[Any]] = {
    "min_p": [0.0, 0.05],
    "presence_penalty": [0.5, -0.5],
    "frequency_penalty": [0.0, 1.0],
    "min_new_tokens": [0, 2],
    "logit_bias_ids": [[3, -1], [4, 5]],
    "logit_bias": [[1.0, 0.0], [2.0, -100.0]],
    "top_logprobs": [2, 0],
    "stop": [["", "zz"], ["e", "x"]],
}
TOKEN_TYPES = TYPES | {
    "input_ids": "int32",
    "attention_mask": "int32",
    "min_p": "float32",
    "presence_penalty": "float32",
    "frequency_penalty": "float32",
    "min_new_tokens": "int32",
    "logit_bias_ids": "int32",
    "logit_bias": "float32",
    "top_logprobs": "int32",
    "token_ids": "int32",
}

REFUSE = """
import importlib.util, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tfclm", "tf_keras", "tokenizers", "transformers"}:
            # TensorFlow itself checks whether tf_keras is installed, without importing it.
            return importlib.util.spec_from_loader(name, self, origin="blocked")

    def create_module(self, spec):
        raise ModuleNotFoundError(f"{spec.name} is blocked")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Refuse())
"""

LOAD = """
import json, sys, time
import tensorflow as tf

request, types, off, token_types, more = map(json.loads, sys.argv[2:])
signatures = tf.saved_model.load(sys.argv[1]).signatures
inputs = {name: tf.constant(value, types.get(name, tf.string)) for name, value in request.items()}
"""

ANSWER = """
def answer():
    texts = [text.decode() for text in signatures["generate"](**inputs)["generated_text"].numpy()]
    scored = signatures["score"](text=inputs["prompt"])
    lengths = (scored["token_count"] + 1).numpy()
    ids = [row[:length].tolist() for row, length in zip(scored["token_ids"].numpy(), lengths)]
    given = {name: inputs[name] for name in types}
    tokens = []
    for number, row in enumerate(ids):
        rows = {"input_ids": tf.constant([row]), "attention_mask": tf.ones([1, len(row)], tf.int32)}
        one = {name: value[number, None] for name, value in given.items()}
        others = {name: tf.constant(value, token_types.get(name, tf.string)) for name, value in off.items()}
        answer = signatures["generate_tokens"](**rows, **one, **others)
        tokens.append(answer["output_ids"][0].numpy().tolist())
    default = signatures["serving_default"](prompt=inputs["prompt"][:1])["generated_text"][0].numpy().decode()
    return [tf.__version__, texts, ids, tokens, default]
"""

# The outputs of requests to other signatures, as JSON.
MORE = """
def plain(value):
    value = value.tolist()
    return json.loads(json.dumps(value, default=bytes.hex))

def answer_more():
    answers = {}
    for name, inputs in more.items():
        tensors = {key: tf.constant(value, token_types.get(key, tf.string)) for key, value in inputs.items()}
        answers[name] = {key: plain(value.numpy()) for key, value in signatures[name](**tensors).items()}
    return answers
"""

# As C++ and TensorFlow Serving do: the graph's own ops initialize tables and restore variables.
SESSION = """
import numpy as np

def answer_in_a_session():
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], sys.argv[1]).signature_def
        signature = signatures["generate"]
        fed = {signature.inputs[name].name: np.array(value, types.get(name, object)) for name, value in request.items()}
        texts = session.run(signature.outputs["generated_text"].name, fed)
        signature = signatures["score"]
        fed = {signature.inputs["text"].name: np.array(request["prompt"], object)}
        ids, counts = session.run([signature.outputs[name].name for name in ("token_ids", "token_count")], fed)
        answers = {}
        for name, inputs in more.items():
            signature = signatures[name]
            arrays = {key: np.array(value, token_types.get(key, object)) for key, value in inputs.items()}
            fed = {signature.inputs[key].name: value for key, value in arrays.items()}
            outputs = session.run({key: info.name for key, info in signature.outputs.items()}, fed)
            answers[name] = {key: plain(value) for key, value in outputs.items()}
    return answers, [[text.decode() for text in texts], [row[: count + 1].tolist() for row, count in zip(ids, counts)]]
"""

# Runs the tool once for each of some lists of arguments.
TOOL = """
import json, runpy

script, calls = sys.argv[1:]
for arguments in json.loads(calls):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""

# Times ten requests per signature.
FIRST = """
def first():
    asked = {"serving_default": {"prompt": request["prompt"]}, "score": {"text": request["prompt"]}}
    seconds = {}
    for signature, values in {**asked, "generate": request}.items():
        given = {name: tf.constant(value, types.get(name, tf.string)) for name, value in values.items()}
        for _ in range(10):
            began = time.monotonic()
            signatures[signature](**given)
            seconds.setdefault(signature, []).append(time.monotonic() - began)
    return seconds
"""

# Replays the records as a server does at its start.
REPLAY = """
from tensorflow_serving.apis import prediction_log_pb2

for record in tf.data.TFRecordDataset(sys.argv[1] + "/assets.extra/tf_serving_warmup_requests"):
    log = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
    replayed = {name: tf.constant(tf.make_ndarray(value)) for name, value in log.inputs.items()}
    signatures[log.model_spec.signature_name](**replayed)
"""

PROGRAM = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tensorflow/c/c_api.h"

enum { ROWS = 2, MOST_INPUTS = 16 };

static void check(TF_Status* status) {
  if (TF_GetCode(status) == TF_OK) return;
  fprintf(stderr, "%s\n", TF_Message(status));
  exit(1);
}

/* The tensor called "operation:index". */
static TF_Output find(TF_Graph* graph, const char* name) {
  const char* colon = strrchr(name, ':');
  char operation[256];
  snprintf(operation, sizeof operation, "%.*s", (int)(colon - name), name);
  TF_Output found = {TF_GraphOperationByName(graph, operation), atoi(colon + 1)};
  if (found.oper == NULL) {
    fprintf(stderr, "no operation %s\n", operation);
    exit(1);
  }
  return found;
}

/* One value per row, or a number of columns per row, parsed as the type of the tensor. */
static TF_Tensor* read_rows(TF_DataType type, int columns, char** texts) {
  const int64_t shape[] = {ROWS, columns};
  int count = columns ? ROWS * columns : ROWS;
  size_t size = type == TF_STRING ? sizeof(TF_TString) : TF_DataTypeSize(type);
  TF_Tensor* tensor = TF_AllocateTensor(type, shape, columns ? 2 : 1, count * size);
  void* data = TF_TensorData(tensor);
  for (int row = 0; row < count; ++row) {
    if (type == TF_STRING) {
      TF_TString* text = (TF_TString*)data + row;
      TF_StringInit(text);
      TF_StringCopy(text, texts[row], strlen(texts[row]));
    } else if (type == TF_INT32) {
      ((int32_t*)data)[row] = (int32_t)atoi(texts[row]);
    } else if (type == TF_INT64) {
      ((int64_t*)data)[row] = atoll(texts[row]);
    } else if (type == TF_FLOAT) {
      ((float*)data)[row] = strtof(texts[row], NULL);
    } else {
      fprintf(stderr, "unexpected input type %d\n", type);
      exit(1);
    }
  }
  return tensor;
}

/* Arguments: the version's folder; for each request, the name of a string output, the number of inputs, and for each
   input its name, its columns, 0 if it has rank 1, and its values. */
int main(int count, char** given) {
  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, given[1], tags, 1, graph, NULL, status);
  check(status);
  for (char** next = given + 2; next < given + count;) {
    TF_Output output = find(graph, *next++), inputs[MOST_INPUTS];
    TF_Tensor *values[MOST_INPUTS], *answer = NULL;
    int size = atoi(*next++);
    if (size > MOST_INPUTS) return 2;
    for (int i = 0; i < size; ++i) {
      inputs[i] = find(graph, *next++);
      int columns = atoi(*next++);
      values[i] = read_rows(TF_OperationOutputType(inputs[i]), columns, next);
      next += columns ? ROWS * columns : ROWS;
    }
    TF_SessionRun(session, NULL, inputs, values, size, &output, &answer, 1, NULL, 0, NULL, status);
    check(status);
    for (int row = 0; row < ROWS; ++row) {
      TF_TString* text = (TF_TString*)TF_TensorData(answer) + row;
      for (size_t i = 0; i < TF_StringGetSize(text); ++i) printf("%02x", (uint8_t)TF_StringGetDataPointer(text)[i]);
      putchar('\n');
    }
  }
  TF_CloseSession(session, status);
  check(status);
  TF_DeleteSession(session, status);
  check(status);
  return 0;
}
"""


@dataclass(frozen=True)
class Version:
    """An exported version, and the results of the request in Python before the export."""

    folder: Path
    tokenizer: Any
    texts: list[str]
    ids: list[list[int]]
    greedy: list[int]
    more: dict[str, dict[str, Any]]  # requests to other signatures
    answers: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Version:
    """A tiny model with all signatures; its texts are checked against transformers before it is written."""
    import tf_keras
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create
    from tfclm.savedmodel import saving, warmup
    from tfclm.savedmodel.graph.signatures import GenerationModule
    from tfclm.savedmodel.settings import ServableSettings

    tf_keras.utils.set_random_seed(0)
    model, tokenizer = create(tiny_config("gpt2", context=CONTEXT)), AutoTokenizer.from_pretrained(tokenizer_dir)
    # Initial weights are so small that all logits are nearly equal.
    model.set_weights([3 * weight for weight in model.get_weights()])
    module = GenerationModule(model, tokenizer, ServableSettings(max_new_tokens=REQUEST["max_new_tokens"][0]))
    ids = tokenizer(REQUEST["prompt"])["input_ids"]
    prompt = tf.constant(ids[:1])
    greedy = model.generate(prompt, attention_mask=tf.ones_like(prompt), max_new_tokens=8, do_sample=False)
    inputs = {name: tf.constant(value, TYPES.get(name, tf.string)) for name, value in REQUEST.items()}
    signatures = module.signatures()
    texts = [text.decode() for text in signatures["generate"](**inputs)["generated_text"].numpy()]
    assert len(ids[1]) + REQUEST["max_new_tokens"][1] <= CONTEXT
    assert texts[0] == tokenizer.decode(greedy[0], skip_special_tokens=True)
    assert texts[1].startswith(REQUEST["prompt"][1])
    assert len(texts[1]) > len(REQUEST["prompt"][1])
    width = max(map(len, ids))
    padded = {
        "input_ids": [row + [0] * (width - len(row)) for row in ids],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in ids],
    }
    more = {
        "generate_tokens": {**padded, **{name: REQUEST[name] for name in TYPES}, **EXTRAS},
        "tokenize": {"text": REQUEST["prompt"]},
        "detokenize": {"token_ids": [row + [-1] * (width - len(row)) for row in ids]},
        "describe": {"query": ["", ""]},
    }
    answers = {}
    for name, given in more.items():
        tensors = {key: tf.constant(value, TOKEN_TYPES.get(key, tf.string)) for key, value in given.items()}
        values = {key: value.numpy().tolist() for key, value in signatures[name](**tensors).items()}
        answers[name] = json.loads(json.dumps(values, default=bytes.hex))
    folder = tmp_path_factory.mktemp("elsewhere") / "1"
    saving.write(module, folder)
    warmup.write(module, folder)
    return Version(folder, tokenizer, texts, ids, greedy[0, len(ids[0]) :].numpy().tolist(), more, answers)


def run_command(folder: Path, *command: object) -> str:
    """The output of a command, run in an empty folder."""
    arguments = [str(each) for each in command]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUTF8": "1"}
    run = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return run.stdout


def answer(folder: Path, script: str, asked: str, version: Version, python: object = sys.executable) -> Any:
    """The value of an expression after a script that is given the version and the request."""
    code = f"""{REFUSE}{script}
value = {asked}
assert not {{"tfclm", "transformers"}} & {{name.split(".")[0] for name in sys.modules}}
print(json.dumps(value))
"""
    given = (version.folder, *map(json.dumps, (REQUEST, TYPES, EXTRAS_OFF, TOKEN_TYPES, version.more)))
    return json.loads(run_command(folder, python, "-I", "-c", code, *given).splitlines()[-1])


def check_loaded(version: Version, answered: list[Any]) -> None:
    """Compares what `answer()` gives with the results in Python."""
    _, texts, ids, tokens, default = answered
    assert texts == version.texts
    assert ids == version.ids
    assert tokens[0] == version.greedy
    whole = [prompt + new for prompt, new in zip(ids, tokens, strict=True)]
    assert [version.tokenizer.decode(row, skip_special_tokens=True) for row in whole] == texts
    assert default == version.texts[0]


def check_more(version: Version, answers: dict[str, dict[str, Any]]) -> None:
    """Compares the answers of other signatures with those in Python."""
    numbers = ("token_logprobs", "top_logprobs")
    ours, theirs = dict(version.answers["generate_tokens"]), dict(answers["generate_tokens"])
    for name in numbers:
        np.testing.assert_allclose(theirs.pop(name), ours.pop(name), atol=1e-5)
    assert theirs == ours
    assert {name: each for name, each in answers.items() if name != "generate_tokens"} == {
        name: each for name, each in version.answers.items() if name != "generate_tokens"
    }


def run_tool(folder: Path, version: Version) -> tuple[str, Any]:
    """What saved_model_cli prints about the version, and the texts that it writes."""
    script = shutil.which("saved_model_cli", path=str(Path(sys.executable).parent))
    assert script is not None
    common = ("--dir", str(version.folder), "--tag_set", "serve")
    given = ";".join(f"{name}={value!r}" for name, value in REQUEST.items())
    asked = ("--signature_def", "generate", "--input_exprs", given, "--outdir", str(folder))
    calls = json.dumps([["show", *common], ["run", *common, *asked]])
    shown = run_command(folder, sys.executable, "-I", "-c", REFUSE + TOOL, script, calls)
    return shown, np.load(folder / "generated_text.npy", allow_pickle=True).tolist()


def run_program(folder: Path, version: Version) -> str:
    """The output of the C program."""
    libraries = tf.sysconfig.get_lib()
    (folder / "program.c").write_text(PROGRAM)
    flags = ["-std=c99", f"-I{tf.sysconfig.get_include()}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    named = ["-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"]
    run_command(folder, COMPILER, "program.c", *flags, *named, "-o", "program")
    (graph,) = saved_model_pb2.SavedModel.FromString((version.folder / "saved_model.pb").read_bytes()).meta_graphs
    given: list[Any] = []
    outputs = {"generate_tokens": "completion_bytes", "detokenize": "text", "describe": "description"}
    for name, output in {"generate": "generated_text", **outputs}.items():
        inputs = REQUEST if name == "generate" else version.more[name]
        signature = graph.signature_def[name]
        given += [signature.outputs[output].name, len(inputs)]
        for key, rows in inputs.items():
            flat = np.array(rows)
            given += [signature.inputs[key].name, flat.shape[1] if flat.ndim == 2 else 0, *flat.ravel().tolist()]
    return run_command(folder, folder / "program", version.folder, *given)


@pytest.fixture(scope="module")
def results(version: Version, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """The result of each program; two run at a time, as starting takes most of their time."""
    with ThreadPoolExecutor(2) as pool:

        def start(function: Any, *arguments: Any) -> Future[Any]:
            return pool.submit(function, tmp_path_factory.mktemp("empty"), *arguments)

        yield {
            # Most of their time is the import of TensorFlow: what needs no process of its own shares one.
            "cold": start(
                answer,
                LOAD + FIRST + ANSWER + MORE + SESSION,
                "[first(), answer(), *answer_in_a_session(), answer_more()]",
                version,
            ),
            "warm": start(answer, LOAD + REPLAY + FIRST, "first()", version),
            "tool": start(run_tool, version),
            **({"program": start(run_program, version)} if COMPILER else {}),
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ["tfclm", "transformers"])
def test_packages_are_blocked(tmp_path: Path, name: str):
    """Tests below that pass although they import the packages."""
    script = f"{REFUSE}\nimport {name}"
    run = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert f"{name} is blocked" in run.stderr


def test_loaded_by_tensorflow(version: Version, results: dict[str, Future[Any]]):
    """A graph that needs Python code of tfclm, or registered classes, to be loaded."""
    check_loaded(version, results["cold"].result()[1])
    check_more(version, results["cold"].result()[4])


def test_loaded_by_a_session(version: Version, results: dict[str, Future[Any]]):
    """Variables or tables that only TensorFlow 2's loader restores: TensorFlow Serving uses this one."""
    assert results["cold"].result()[3] == [version.texts, version.ids]
    check_more(version, results["cold"].result()[2])


def test_saved_model_cli(version: Version, results: dict[str, Future[Any]]):
    """Signatures that TensorFlow's own tool does not list, or cannot run."""
    shown, texts = results["tool"].result()
    assert all(f'"{name}"' in shown for name in ("serving_default", "generate", "score", *version.more))
    assert [text.decode() for text in texts] == version.texts


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_run_by_a_c_program(version: Version, results: dict[str, Future[Any]]):
    """A step that only Python performs when it loads a SavedModel."""
    outputs = {"generate_tokens": "completion_bytes", "detokenize": "text", "describe": "description"}
    expected = [text.encode().hex() for text in version.texts]
    for name, output in outputs.items():
        expected += version.answers[name][output]
    assert results["program"].result().splitlines() == expected


def test_first_request_is_as_fast_as_others(results: dict[str, Future[Any]]):
    """Warm-up records that a small context refuses, or that leave a signature, or a part of one, cold."""
    warm, (cold, *_) = results["warm"].result(), results["cold"].result()
    for name, seconds in warm.items():
        # The extra time of the first request, compared with that without warm-up.
        extra, whole = (each[0] - sorted(each)[5] for each in (seconds, cold[name]))
        assert extra <= whole / 4, (name, seconds, cold[name])


@pytest.mark.skipif(not (LONG or OLDER), reason="takes another TensorFlow: make lowest, or set TFCLM_LONG_TESTS=1")
def test_loaded_by_the_servers_tensorflow(version: Version, tmp_path: Path):
    """An op or attribute that TensorFlow Serving 2.20 lacks."""
    python = Path(OLDER).absolute() if OLDER else tmp_path / "venv" / "bin" / "python"
    try:
        if not OLDER:
            venv.create(tmp_path / "venv", with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "tensorflow==2.20.*"], check=True)
        answered = answer(tmp_path, LOAD + ANSWER, "answer()", version, python)
    finally:
        shutil.rmtree(tmp_path / "venv", ignore_errors=True)
    assert answered[0].startswith("2.20.")
    check_loaded(version, answered)
