"""The examples, run as they stand on a tiny model; what they print is compared with transformers and NumPy."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
from conftest import documents, tiny_config
from hub_server import WRITER, hub

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "causal_language_modeling.ipynb"
PROMPT = "The import statement"
NEW_TOKENS = 24  # the checkpoint's own, which exported models use by default
TEXTS = [" ".join(text.split())[:1000] for text in documents()[:50]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A directory with `base`, a tiny model, and the same documents as text and in ELI5's form."""
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create, save

    folder = tmp_path_factory.mktemp("examples")
    model = create(tiny_config("gpt2", context=128))
    model.generation_config.max_new_tokens = NEW_TOKENS
    save(model, AutoTokenizer.from_pretrained(tokenizer_dir), folder / "base")
    (folder / "notes.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    rows = [{"q_id": str(number), "answers": {"text": [text[:500], text[500:]]}} for number, text in enumerate(TEXTS)]
    (folder / "eli5.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run_here(workplace: Path, name: str, *arguments: str) -> str:
    """What an example prints that is run in this process, where TensorFlow is imported already."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(workplace)
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def run(workplace: Path, name: str, *arguments: str) -> str:
    """What an example prints."""
    words = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Reference:
    """A checkpoint as transformers alone opens it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, TFAutoModelForCausalLM

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = TFAutoModelForCausalLM.from_pretrained(folder)

    def greedy(self, prompt: str, tokens: int) -> str:
        """The prompt and its continuation."""
        ids = self.tokenizer(prompt, return_tensors="tf")
        end = self.tokenizer.eos_token_id
        out = self.model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=end)
        return self.tokenizer.decode(out[0], skip_special_tokens=True)

    def log_probabilities(self, blocks: Any) -> np.ndarray:
        """Those of the tokens of [N, L] after the first of each row, in float64: [N, L - 1]."""
        ids = np.asarray(blocks)
        logits = self.model(input_ids=ids).logits.numpy().astype(np.float64)[:, :-1]
        chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return chosen - np.log(np.exp(logits).sum(axis=-1))

    def perplexity(self, blocks: Any) -> float:
        """That of all tokens but the first of each row."""
        return math.exp(-self.log_probabilities(blocks).mean())

    def perplexity_of_text(self, text: str) -> float:
        """That of one text."""
        return self.perplexity([self.tokenizer(text)["input_ids"]])


FLAGS = ["--block-size", "64", "--epochs", "3", "--batch-size", "8", "--learning-rate", "3e-3"]


def pipeline(limit: str, *flags: str) -> list[str]:
    """The command that runs the pipeline's steps."""
    places = ["notes.txt", "base", "trained", "serving/notes"]
    return [sys.executable, str(EXAMPLES / "kubeflow_pipeline.py"), "run", *places, limit, *(flags or FLAGS)]


@pytest.fixture(scope="module")
def pushed(workplace: Path) -> str:
    """The version that the pipeline has pushed, of the model that it has trained: the others use it."""
    done = subprocess.run(pipeline("500"), cwd=workplace, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(workplace: Path, pushed: str) -> Reference:
    """The model that the pipeline has trained."""
    return Reference(workplace / "trained")


@pytest.fixture(scope="module")
def address(workplace: Path, pushed: str) -> Iterator[str]:
    """Where the pushed version is served over gRPC."""
    from tfclm.server.server import Server
    from tfclm.server.settings import ServeSettings

    base_path = str(workplace / Path(pushed).parent)
    # In this process, which has TensorFlow already.
    server = Server(ServeSettings(model_name="notes", model_base_path=base_path, port=-1, rest_api_port=0))
    try:
        assert server.start()
        yield f"127.0.0.1:{server.grpc_port}"
    finally:
        server.stop()


@pytest.mark.slow
def test_own_loop_trains(workplace: Path):
    """Steps that change nothing, held-out text that is trained on, or other weights saved than were measured."""
    printed = run_here(workplace, "train_your_own_loop.py", "base", "notes.txt", "own")
    before, after = (float(line.split()[-1]) for line in printed.splitlines())
    base, own = Reference(workplace / "base"), Reference(workplace / "own")
    held_out = base.tokenizer("<|endoftext|>".join(TEXTS[::5]) + "<|endoftext|>")["input_ids"]
    blocks = np.reshape(held_out[: len(held_out) // 64 * 64], (-1, 64))
    assert before == pytest.approx(base.perplexity(blocks), rel=1e-4)
    assert after == pytest.approx(own.perplexity(blocks), rel=1e-4)
    assert after < 0.8 * before


@pytest.mark.slow
def test_pipeline_pushes_what_it_has_trained(workplace: Path, pushed: str):
    """A version of another model than the one in the output, or without its perplexity."""
    assert pushed == "serving/notes/1"
    results = json.loads((workplace / "trained" / "results.json").read_text())
    record = json.loads((workplace / pushed / "assets.extra/tfclm.json").read_text())
    assert record["perplexity"] == results["perplexity"] < 0.8 * results["initial_perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "flags", "code", "said"),
    [("2", FLAGS, 1, "not published: perplexity"), ("500", ["--epochs", "0"], 2, "--epochs 0: give 1 or more")],
)
def test_pipeline_ends_where_a_step_fails(
    workplace: Path, pushed: str, limit: str, flags: list[str], code: int, said: str
):
    """A refused model that is pushed, a run that is trained again, or an exit code that is not that of the step."""
    weights = (workplace / "trained" / "model.safetensors").stat()
    words = pipeline(limit, *flags)
    done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert [path.name for path in (workplace / "serving/notes").glob("[0-9]*")] == ["1"]
    assert (workplace / "trained" / "model.safetensors").stat() == weights


@pytest.mark.slow
def test_another_app_gets_the_models_text(workplace: Path, pushed: str, trained: Reference):
    """A text or a perplexity that is not the checkpoint's; an example that is not TensorFlow alone."""
    printed = run_here(workplace, "load_in_another_app.py", pushed, PROMPT)
    text, _, score = printed.rstrip("\n").rpartition("\nperplexity ")
    assert text == trained.greedy(PROMPT, NEW_TOKENS)
    assert float(score) == pytest.approx(trained.perplexity_of_text(text), rel=1e-4)
    imports = re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "load_in_another_app.py").read_text(), re.MULTILINE)
    assert imports == ["sys", "tensorflow"]


@pytest.mark.slow
def test_grpc_gives_the_models_text(workplace: Path, pushed: str, trained: Reference, address: str):
    """Rows that share one temperature, or an answer that is not the checkpoint's."""
    greedy, sampled, scores = run(workplace, "ask_over_grpc.py", address, "notes", PROMPT).splitlines()
    assert greedy == f"{trained.greedy(PROMPT, 20).removeprefix(PROMPT)!r} length"
    assert sampled != greedy
    expected = trained.log_probabilities([trained.tokenizer(PROMPT)["input_ids"]])[0]
    assert [float(each) for each in scores.split()] == pytest.approx(expected, rel=1e-4)


# What the notebook has found, written at its end for the test to compare. The sampled text is drawn once more by the
# SavedModel in the notebook's own process.
FINDINGS = """
import json

params = {"max_new_tokens": tf.constant([max_new_tokens]), "temperature": tf.constant([1.0])}
params |= {"top_k": tf.constant([50]), "top_p": tf.constant([0.95])}
params |= {"repetition_penalty": tf.constant([1.0]), "stop": tf.constant([""])}
drawn = signatures["generate"](prompt=tf.constant([prompt]), seed=tf.constant([7], tf.int64), **params)
findings = {
    "executable": sys.executable,
    "blocks": test.blocks["input_ids"][:],
    "labels": [row for _, labels in tf_test_set for row in labels.numpy().tolist()],
    "eval_loss": eval_loss,
    "perplexity": measured.perplexity,
    "generated": generated,
    "completed": completed,
    "completed_perplexity": float(score["perplexity"][0]),
    "greedy": greedy.generated_text,
    "sampled": sampled.generated_text,
    "sampled_again": drawn["generated_text"].numpy()[0].decode(),
}
with open("findings.json", "w") as file:
    json.dump(findings, file)
"""


@pytest.fixture(scope="module")
def notebook(workplace: Path) -> Iterator[SimpleNamespace]:
    """The notebook, run from its first cell to its last in a kernel: its findings, and what it has pushed."""
    from nbclient import NotebookClient

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        **{"model_id": "base", "dataset_id": "eli5.jsonl", "split": "train[:40]", "block_size": 64, "batch_size": 8},
        **{"epochs": 3, "learning_rate": 3e-3, "prompt": PROMPT, "max_new_tokens": 10, "output_dir": "run"},
        **{"serving_dir": "serving/eli5", "hub_model_id": "me/eli5", "rest_api_port": port},
    }
    book = nbformat.read(NOTEBOOK, as_version=4)
    place = next(n for n, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
    parameters = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
    book.cells.append(nbformat.v4.new_code_cell(FINDINGS))
    with pytest.MonkeyPatch.context() as patch, hub() as running:
        # Nothing of the user's own Jupyter: no other kernel that is called python3, no configuration.
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(workplace / "jupyter"))
        client = NotebookClient(book, timeout=600, resources={"metadata": {"path": str(workplace)}})
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        home = {"HOME": str(workplace / "home"), "HF_HOME": str(workplace / "home" / "hf")}
        client.execute(env={**own, **home, "HF_ENDPOINT": running.endpoint, "HF_TOKEN": WRITER})
        found = json.loads((workplace / "findings.json").read_text())
        yield SimpleNamespace(**found, hub=running, settings=settings, book=book)


@pytest.mark.slow
def test_notebook_trains(workplace: Path, notebook: SimpleNamespace):
    """A kernel of another Python, ends of texts that are no labels, weights that stay, a perplexity of others."""
    assert os.path.samefile(notebook.executable, sys.executable)
    base, run = Reference(workplace / "base"), Reference(workplace / "run")
    assert notebook.labels == notebook.blocks
    assert sum(row.count(base.tokenizer.eos_token_id) for row in notebook.labels) in (7, 8)  # of 8 documents
    assert notebook.perplexity == pytest.approx(run.perplexity(notebook.blocks), rel=1e-4)
    assert notebook.perplexity < 0.8 * base.perplexity(notebook.blocks)
    size = notebook.settings["batch_size"]
    batches = [notebook.blocks[start : start + size] for start in range(0, len(notebook.blocks), size)]
    losses = [math.log(run.perplexity(batch)) for batch in batches]
    assert notebook.eval_loss == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.slow
def test_notebook_generates_the_same_everywhere(workplace: Path, notebook: SimpleNamespace):
    """A pipeline, an export or a server that gives another text than `generate`; a seed that the server ignores."""
    run = Reference(workplace / "run")
    assert notebook.generated == notebook.greedy == run.greedy(PROMPT, 10)
    assert notebook.completed == run.greedy(PROMPT, 100)
    assert notebook.completed_perplexity == pytest.approx(run.perplexity_of_text(notebook.completed), rel=1e-4)
    assert notebook.sampled == notebook.sampled_again != notebook.greedy


@pytest.mark.slow
def test_notebook_pushes_its_last_state(workplace: Path, notebook: SimpleNamespace):
    """A Hub that is left with an older epoch; a token in the notebook's outputs."""
    run = workplace / "run"
    held = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert notebook.hub.model("me/eli5").files() == held
    assert WRITER not in nbformat.writes(notebook.book)


def test_notebook_says_when_it_does_not_push(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """A push that is left out without a word, or tried without a token."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    cell = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.id == "push")
    for repository, said in {None: "hub_model_id is not set", "me/eli5": "there is no token"}.items():
        names: dict[str, Any] = {"hub_model_id": repository}
        exec(cell.source, names)
        assert names["callbacks"] == []
        assert said in capsys.readouterr().out


def test_notebook_is_kept_without_outputs():
    """The outputs and the paths of the machine on which the notebook was run last."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert book.metadata.kernelspec.name == "python3"


def test_readme_names_every_example():
    """An example that was added or renamed, without its line."""
    named = re.findall(r"^\| \[(\S+)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    there = [path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md"]
    assert sorted(named) == sorted(there)
