"""From text to a model's folder: the commands `fit`, `generate` and `evaluate`, as a user calls them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
import yaml
from conftest import ARCHITECTURES, put_bos, tiny_config

from tfclm import evaluate, fit, generate
from tfclm.checkpoint import create, load, save
from tfclm.cli.arguments import parse
from tfclm.metrics.perplexity import perplexity

CONTEXT = 40  # little more than a block: the sample at the end of a run fills it
TOKENIZER_FILES = {"merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
OUTPUT = {
    "README.md",
    "config.json",
    "fit.yaml",
    "generation_config.json",
    "logs",
    "loss.png",
    "model.safetensors",
    "results.json",
} | TOKENIZER_FILES


class Console:
    """Calls a command with the arguments of a shell; gives its exit code, stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, module, *arguments: object) -> tuple[int, str, str]:
        self.capfd.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["tfclm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            module.main()
        out, err = self.capfd.readouterr()
        return end.value.code, out, err


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Console:
    """To call commands with."""
    return Console(monkeypatch, capfd)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """Thirty documents of about 800 characters, in the guide's shape: answers, each a list of texts."""
    path = tmp_path_factory.mktemp("text") / "eli5.jsonl"
    rows = [{"q_id": str(i), "answers": {"text": [d[:400], d[400:800]]}} for i, d in enumerate(documents[:30])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """A tiny checkpoint of each architecture."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for architecture in ARCHITECTURES:
        tf.random.set_seed(0)
        save(create(tiny_config(architecture, context=CONTEXT)), tokenizer, folder / architecture)
    return {architecture: folder / architecture for architecture in ARCHITECTURES}


def arguments(checkpoint: Path, text: Path, output: Path) -> list[object]:
    """A short run's."""
    return [
        *("--model", checkpoint, "--train-file", text, "--text-column", "answers.text", "--output-dir", output),
        *("--block-size", 32, "--batch-size", 8, "--epochs", 2, "--learning-rate", 1e-2, "--num-proc", 1),
    ]


@pytest.fixture(scope="module")
def first_run(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], corpus_file: Path
) -> tuple[Path, int, str, str]:
    """The folder of a finished run on GPT-2's shape, its exit code, stdout and stderr."""
    folder = tmp_path_factory.mktemp("runs") / "gpt2"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["tfclm", *map(str, arguments(checkpoints["gpt2"], corpus_file, folder))])
        with pytest.raises(SystemExit) as end:
            fit.main()
    return folder, end.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def fitted(first_run: tuple[Path, int, str, str]) -> Path:
    """The folder of a finished run."""
    folder, code, _, err = first_run
    assert code == 0, err
    return folder


@pytest.mark.parametrize(
    "architecture", ["gpt2", *(pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES if name != "gpt2")]
)
def test_fit_leaves_exactly_these_files(
    request: pytest.FixtureRequest,
    console: Console,
    checkpoints: dict[str, Path],
    corpus_file: Path,
    tmp_path: Path,
    architecture: str,
):
    """A file too few, one too many (state that is left over), or numbers that do not belong to the weights saved."""
    if architecture == "gpt2":
        output, code, out, err = request.getfixturevalue("first_run")
    else:
        output = tmp_path / "run"
        code, out, err = console(fit, *arguments(checkpoints[architecture], corpus_file, output))
    assert code == 0, err
    assert out == ""
    assert {path.name for path in output.iterdir()} == OUTPUT
    results = json.loads((output / "results.json").read_text())
    assert results["perplexity"] < results["initial_perplexity"] / 1.5
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert f"{results['perplexity']:.2f} after" in err
    assert f"-m tfclm.generate --model {output}" in err
    assert {"block_size", "separator", "dropped_tokens", "split"} <= results["protocol"].keys()
    assert {"loss", "steps", "tokens", "seconds"} <= results["train"].keys()
    assert results["versions"]["tensorflow"] == tf.__version__
    assert any((output / "logs").iterdir())
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert f"{results['perplexity']:.2f}" in card

    # What was saved is what was measured: the validation blocks, scored anew from the folder.
    evaluated = evaluate_validation(output, corpus_file)
    assert evaluated.tokens == results["tokens"]
    assert evaluated.loss == pytest.approx(results["loss"], rel=1e-6)


def evaluate_validation(output: Path, text: Path):
    """The perplexity of a folder's model on the documents that its run held out."""
    from tfclm import corpus

    settings = yaml.safe_load((output / "fit.yaml").read_text())
    held_out = corpus.read(files=(str(text),), text_column=settings["text_column"], seed=settings["seed"]).validation
    model, tokenizer = load(output)
    packed = corpus.pack(corpus.tokenize(held_out, tokenizer, 1), settings["block_size"], [tokenizer.eos_token_id])
    return perplexity(model, np.array(packed.blocks["input_ids"]))


@pytest.mark.slow
def test_fit_with_a_bos_is_measured_as_evaluate_measures(console: Console, tmp_path: Path, tokenizer, documents):
    """Blocks that begin with the BOS in the run, but not when its checkpoint is evaluated, or the reverse."""
    save(create(tiny_config("mistral", vocab_size=513, context=CONTEXT)), put_bos(tokenizer), tmp_path / "base")
    for name, some in (("train", documents[:9]), ("validation", documents[9:12])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:900]}) + "\n" for text in some))
    output, validation = tmp_path / "run", tmp_path / "validation.jsonl"
    flags = ["--train-file", tmp_path / "train.jsonl", "--validation-file", validation, "--output-dir", output]
    code, _, err = console(
        fit, "--model", tmp_path / "base", *flags, "--block-size", 32, "--max-steps", 2, "--num-proc", 1
    )
    assert code == 0, err
    results = json.loads((output / "results.json").read_text())
    code, out, err = console(evaluate, "--model", output, "--file", validation, "--block-size", 32, "--json")
    assert code == 0, err
    evaluated = json.loads(out)
    assert evaluated["protocol"]["prefix"] == results["protocol"]["prefix"] == ["<s>"]
    assert evaluated["protocol"]["dropped_tokens"] == results["protocol"]["dropped_tokens"]
    assert (evaluated["tokens"], evaluated["bytes"]) == (results["tokens"], results["bytes"])
    assert evaluated["loss"] == pytest.approx(results["loss"], rel=1e-6)
    assert evaluated["bits_per_byte"] == pytest.approx(results["bits_per_byte"], rel=1e-6)
    _, out, _ = console(evaluate, "--model", output, "--file", validation, "--block-size", 32)
    assert out.endswith(f"over {results['tokens']} tokens, {evaluated['bits_per_byte']:.4f} bits per byte\n")


def test_fit_yaml_repeats_the_run(console: Console, fitted: Path, tmp_path: Path):
    """A setting that is missing from the record, or a run that its seed does not determine."""
    code, _, err = console(fit, "--config", fitted / "fit.yaml", "--output-dir", tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (fitted / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_finished_run_is_kept_unless_overwritten(console: Console, fitted: Path, tmp_path: Path):
    """Results lost to a command typed twice, or to one with other settings."""
    folder = shutil.copytree(fitted, tmp_path / "run")
    same = ("--config", folder / "fit.yaml", "--output-dir", folder)
    (folder / "fit.yaml").write_text((folder / "fit.yaml").read_text().replace(str(fitted), str(folder)))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    code, _, err = console(fit, *same)
    assert code == 0
    assert "is complete" in err
    code, _, err = console(fit, *same, "--learning-rate", "1e-3")
    assert code == 2
    assert "--learning-rate 0.01 there, 0.001 now" in err
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = console(fit, *same, "--train-file", tmp_path / "nowhere.jsonl", "--overwrite")
    assert code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
    code, _, err = console(fit, *same, "--learning-rate", "1e-3", "--max-steps", 1, "--overwrite")
    assert code == 0, err
    assert (folder / "model.safetensors").stat().st_mtime_ns != before
    assert yaml.safe_load((folder / "fit.yaml").read_text())["learning_rate"] == 1e-3


@pytest.mark.long
def test_overwriting_leaves_exactly_the_new_files(
    console: Console, checkpoints: dict[str, Path], corpus_file: Path, tmp_path: Path
):
    """A former tokenizer's chat template and added tokens, which the new tokenizer then loads."""
    model, tokenizer = load(checkpoints["gpt2"])
    tokenizer.chat_template = "{{ messages }}"
    save(model, tokenizer, tmp_path / "chatty")
    output = tmp_path / "run"
    code, _, err = console(fit, *arguments(tmp_path / "chatty", corpus_file, output), "--max-steps", 1)
    assert code == 0, err
    assert {path.name for path in output.iterdir()} == OUTPUT | {"chat_template.jinja"}
    (output / "notes.txt").write_text("mine")
    new = arguments(checkpoints["gpt2"], corpus_file, output)
    code, _, err = console(fit, *new, "--max-steps", 1, "--overwrite")
    assert code == 0, err
    assert {path.name for path in output.iterdir()} == OUTPUT | {"notes.txt"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("gpt2", "bfloat16"),
        *(pytest.param(name, "bfloat16", marks=pytest.mark.long) for name in ARCHITECTURES if name != "gpt2"),
        pytest.param("gpt2", "float16", marks=pytest.mark.long),
    ],
)
def test_fit_in_half_precision_ends_with_a_sample(
    console: Console, checkpoints: dict[str, Path], corpus_file: Path, tmp_path: Path, architecture: str, precision: str
):
    """Sampling that fails in half precision when the training is over, or a policy that stays for what comes next."""
    run = arguments(checkpoints[architecture], corpus_file, tmp_path / "run")
    # The shortest blocks, whose sample begins with a prompt as long as a block.
    code, _, err = console(fit, *run, "--block-size", 2, "--max-steps", 2, "--mixed-precision", precision)
    assert code == 0, err
    assert isinstance(json.loads((tmp_path / "run" / "results.json").read_text())["sample"], str)
    assert "sample: " in err
    assert "no sample" not in err
    assert tf_keras.mixed_precision.global_policy().name == "float32"


@pytest.mark.long  # the test above has the shortest blocks
@pytest.mark.parametrize("block_size", [2, 8])
def test_short_blocks_end_with_a_sample(
    console: Console, checkpoints: dict[str, Path], corpus_file: Path, tmp_path: Path, block_size: int
):
    """A prompt as long as a block, and a number of new tokens that is then none or less, after all of the training."""
    run = arguments(checkpoints["gpt2"], corpus_file, tmp_path / "run")
    code, _, err = console(fit, *run, "--block-size", block_size, "--max-steps", 2)
    assert code == 0, err
    assert isinstance(json.loads((tmp_path / "run" / "results.json").read_text())["sample"], str)


@pytest.mark.slow
def test_a_failed_sample_is_reported_and_the_run_is_complete(
    console: Console, checkpoints: dict[str, Path], corpus_file: Path, tmp_path: Path
):
    """A run that can never finish because its tokenizer puts more behind a prompt than the context holds."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = load(checkpoints["gpt2"])
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(["$A"] + [eos] * 64), special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    save(model, tokenizer, tmp_path / "model")
    output = tmp_path / "my run"
    run = [*arguments(tmp_path / "model", corpus_file, output), "--max-steps", 1]
    for told in ("no sample: InputError: the prompt's", "is complete"):
        code, _, err = console(fit, *run)
        assert code == 0, err
        assert told in err
        # What can be pasted into a shell: the folder's name has a space.
        assert f"-m tfclm.generate --model '{output}' --prompt" in err
        assert f"-m tfclm.evaluate --model '{output}' --file" in err
    assert {path.name for path in output.iterdir()} == OUTPUT
    assert json.loads((output / "results.json").read_text())["sample"] is None


@pytest.mark.slow
def test_fit_gate_canary_and_publishing_in_one_go(
    console: Console, checkpoints: dict[str, Path], corpus_file: Path, tmp_path: Path
):
    """A model that is published in spite of its perplexity, an exit code that hides it, or a run made anew for it."""
    serving = tmp_path / "m"
    run = [*arguments(checkpoints["gpt2"], corpus_file, tmp_path / "run"), "--max-steps", 3, "--export-to", serving]

    def verdicts() -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted((serving / ".verdicts").iterdir())]

    code, out, err = console(fit, *run, "--max-perplexity", 1.5)
    assert (code, out) == (1, ""), err
    assert {path.name for path in serving.iterdir()} == {".verdicts"}
    perplexity = json.loads((tmp_path / "run/results.json").read_text())["perplexity"]
    assert f"not published: perplexity {perplexity:.4f} is above 1.5 (the verdict is in {serving}/.verdicts/" in err
    assert [(each["passed"], each["perplexity"]) for each in verdicts()] == [(False, perplexity)]

    code, out, err = console(fit, *run, "--max-perplexity", 2000)
    assert (code, out) == (0, f"{serving}/1\n"), err
    assert "is complete" in err
    assert {path.name for path in serving.iterdir()} == {".verdicts", "1"}
    assert [(each["passed"], each.get("version")) for each in verdicts()] == [(False, None), (True, 1)]
    record = json.loads((serving / "1/assets.extra/tfclm.json").read_text())
    assert record["perplexity"] == record["gate"]["perplexity"] == perplexity
    # The canary was asked token ids, and texts of several scripts for the tokenizer.
    assert (record["canary"]["prompts"], record["canary"]["texts"], record["canary"]["records"]) == (3, 3, 7)


def test_pipeline_opens_the_folder(fitted: Path):
    """A folder that transformers' own pipeline cannot open, as in the guide's last step."""
    from transformers import pipeline

    # Without PyTorch, transformers 4.54 trips over its own default of torch_dtype.
    generator = pipeline("text-generation", model=str(fitted), framework="tf", torch_dtype=None)
    text = generator("Python is", max_new_tokens=8, do_sample=True, top_k=50, top_p=0.95)[0]["generated_text"]
    assert text.startswith("Python is")
    assert len(text) > len("Python is")


def test_generate_prints_the_text_alone(console: Console, fitted: Path):
    """Noise on stdout, a seed without effect, or a greedy text that is not transformers' own."""
    model, tokenizer = load(fitted)
    code, out, _ = console(generate, "--model", fitted, "--prompt", "The", "--temperature", 0, "--max-new-tokens", 9)
    ids = tokenizer("The", return_tensors="tf")
    expected = model.generate(**ids, do_sample=False, max_new_tokens=9, pad_token_id=0)
    assert code == 0
    assert out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"
    flags = ("--model", fitted, "--prompt", "The", "--temperature", 1, "--max-new-tokens", 9)
    drawn = [console(generate, *flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    code, out, _ = console(generate, *flags, "--json")
    assert json.loads(out)["generated_text"].startswith("The")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A checkpoint with one NaN among its weights, in a place that every text comes by."""
    model, tokenizer = load(str(checkpoints["gpt2"]))
    (variable,) = (each for each in model.trainable_variables if "ln_f/gamma" in each.name)
    variable.assign(variable + tf.one_hot(3, 32) * float("nan"))
    folder = tmp_path_factory.mktemp("broken") / "nan"
    save(model, tokenizer, folder)
    return folder


def test_values_that_are_not_finite_are_reported(console: Console, broken: Path, corpus_file: Path, tmp_path: Path):
    """Weights with NaN that have perplexity "inf ± nan" and exit code 0, JSON that is none, and a text of NaN."""
    text = ("--file", corpus_file, "--text-column", "answers.text", "--block-size", 32)
    for protocol in ((), ("--stride", 16)):
        code, out, err = console(evaluate, "--model", broken, *text, *protocol)
        assert (code, out) == (1, "")
        (said,) = err.splitlines()[-1:]
        assert said.startswith(f"tfclm.evaluate: the perplexity of {broken} is not finite: the weights")
    code, out, err = console(evaluate, "--model", broken, *text, "--json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, result["perplexity"], result["standard_error"], result["loss"]) == (1, None, None, None)
    assert result["tokens"] > 1000
    assert "is not finite" in err
    for drawing in ((), ("--temperature", 0)):
        code, out, err = console(generate, "--model", broken, "--prompt", "The", *drawing)
        assert (code, out) == (1, "")
        assert err.splitlines()[-1].startswith(f"tfclm.generate: {broken}: the model's logits are not finite")
    code, out, err = console(fit, *arguments(broken, corpus_file, tmp_path / "run"))
    assert (code, out) == (2, "")
    assert "loss on the validation text is not finite before any training" in err.splitlines()[-1]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_perplexity_that_overflows_is_reported(
    console: Console, checkpoints: dict, corpus_file: Path, tmp_path: Path
):
    """A loss that is known and a perplexity that overflows: the loss is told, and the perplexity is no number."""
    model, tokenizer = load(str(checkpoints["gpt2"]))
    for variable in model.trainable_variables:
        if "ln_f/gamma" in variable.name:
            variable.assign(variable * 1e5)
    save(model, tokenizer, tmp_path / "sharp")
    text = ("--file", corpus_file, "--text-column", "answers.text", "--block-size", 32)
    code, out, err = console(evaluate, "--model", tmp_path / "sharp", *text, "--json")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, result["perplexity"], result["standard_error"]) == (1, None, None)
    assert result["loss"] > 710
    assert f"exp of the mean loss {result['loss']:.4f} is larger than a float can hold" in err


def test_evaluate_equals_a_plain_loop(console: Console, fitted: Path, documents: list[str], tmp_path: Path):
    """Blocks or windows that are not what the protocol says; the references below are written out."""
    model, tokenizer = load(fitted)
    texts = [document[:700] for document in documents[20:24]]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def loss_of(row: list[int], scored: int) -> list[float]:
        logits = model(input_ids=tf.constant([row]), training=False).logits.numpy()[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return [-log_probabilities[i - 1, row[i]] for i in range(max(1, len(row) - scored), len(row))]

    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    expected = [loss for start in range(0, len(ids) - 31, 32) for loss in loss_of(ids[start : start + 32], 32)]
    code, out, err = console(evaluate, "--model", fitted, "--file", file, "--block-size", 32, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["tokens"] == len(expected)
    assert result["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert result["protocol"]["dropped_tokens"] == len(ids) % 32

    ids = tokenizer("\n\n".join(texts))["input_ids"]
    expected, end_before = [], 0
    for begin in range(0, len(ids), 24):
        end = min(begin + CONTEXT, len(ids))
        expected += loss_of(ids[begin:end], end - end_before)
        end_before = end
        if end == len(ids):
            break
    code, out, err = console(evaluate, "--model", fitted, "--file", file, "--stride", 24, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["tokens"] == len(expected) == len(ids) - 1
    assert result["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    _, out, _ = console(evaluate, "--model", fitted, "--file", file, "--stride", 24)
    assert out.startswith(f"perplexity {result['perplexity']:.4f} ± {result['standard_error']:.4f} over {len(ids) - 1}")


def test_quickstart_is_what_is_meant_without_model_and_text():
    """A flag such as --epochs that turns the quickstart into an error, or a real run that gets its settings."""

    def read(*arguments: str) -> fit.FitSettings:
        return parse(fit.FitSettings, arguments, prog="fit", description="", preset=fit.preset)

    assert read() == fit.FitSettings(**fit.QUICKSTART)
    assert read("--epochs", "3") == fit.FitSettings(**fit.QUICKSTART | {"epochs": 3})
    real = read("--model", "distilgpt2", "--dataset", "x", "--output-dir", "y").resolved()
    assert (real.learning_rate, real.jit_compile, real.epochs) == (2e-5, False, 3)


@pytest.mark.slow
def test_scratch_tokenizer_sees_the_train_split_alone(console: Console, tmp_path: Path):
    """A vocabulary that has seen the validation text makes its perplexity look better than it is."""
    (tmp_path / "a.txt").write_text("\n\n".join("the quick brown fox jumps over it again" for _ in range(300)))
    (tmp_path / "b.txt").write_text("\n\n".join("zzqj zzqj zzqj zzqj zzqj zzqj" for _ in range(100)))
    files = ("--train-file", tmp_path / "a.txt", "--validation-file", tmp_path / "b.txt")
    run = ("--block-size", 16, "--max-steps", 2, "--vocab-size", 300, "--output-dir", tmp_path / "run")
    code, _, err = console(fit, *files, *run)
    assert code == 0, err
    vocabulary = json.loads((tmp_path / "run" / "vocab.json").read_text())
    assert "quick" in "".join(vocabulary)
    assert not any("zz" in entry or "qj" in entry for entry in vocabulary)


BAD = {
    "no such file": (["--train-file", "nowhere.txt", "--output-dir", "o"], ["nowhere.txt"]),
    "no such column": (["--train-file", "good.jsonl", "--text-column", "txt", "--output-dir", "o"], ["txt", "text"]),
    "column of numbers": (["--train-file", "good.jsonl", "--text-column", "n", "--output-dir", "o"], ["n", "text"]),
    "empty file": (["--train-file", "empty.txt", "--output-dir", "o"], ["empty.txt"]),
    "no UTF-8": (["--train-file", "latin.txt", "--output-dir", "o"], ["latin.txt", "line 2", "UTF-8"]),
    "no JSON": (["--train-file", "broken.jsonl", "--output-dir", "o"], ["broken.jsonl", "line 2"]),
    "shorter than a block": (["--train-file", "short.txt", "--output-dir", "o"], ["training split", "--block-size"]),
    "no output": (["--train-file", "good.jsonl"], ["--output-dir"]),
    "nothing to train on": (["--model", "MODEL", "--output-dir", "o"], ["--dataset", "--train-file"]),
    "no such model": (["--model", "nowhere/at-all", "--train-file", "good.jsonl", "--output-dir", "o"], ["nowhere"]),
    "beyond the context": (
        ["--model", "MODEL", "--train-file", "good.jsonl", "--block-size", "41", "--output-dir", "o"],
        ["--block-size 41", "40"],
    ),
    "folder of something else": (["--train-file", "good.jsonl", "--output-dir", "taken"], ["taken", "another"]),
    "output is a file": (["--train-file", "good.jsonl", "--output-dir", "good.jsonl"], ["good.jsonl"]),
    "offline dataset": (["--dataset", "no/such-dataset", "--output-dir", "o"], ["no/such-dataset"]),
    "push offline": (["--train-file", "good.jsonl", "--output-dir", "o", "--push-to-hub", "me/x"], ["HF_HUB_OFFLINE"]),
    "push of what is elsewhere": (
        [
            *("--train-file", "good.jsonl", "--output-dir", "o", "--export-to", "gs://b/m"),
            *("--push-to-hub", "me/x", "--push-saved-model"),
        ],
        ["--push-saved-model", "--export-to gs://b/m"],
    ),
    "only settings": (["--train-file", "good.jsonl", "--output-dir", "settings"], ["settings", "holds no run"]),
    "only settings, overwritten": (
        ["--train-file", "good.jsonl", "--output-dir", "settings", "--overwrite"],
        ["settings", "holds no run"],
    ),
    "seed": (["--train-file", "good.jsonl", "--output-dir", "o", "--seed", "4294967296"], ["--seed 4294967296"]),
    "clipping": (["--train-file", "good.jsonl", "--output-dir", "o", "--max-grad-norm", "inf"], ["--max-grad-norm"]),
    "learning rate": (
        ["--train-file", "good.jsonl", "--output-dir", "o", "--learning-rate", "-1"],
        ["--learning-rate"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_loses_nothing(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path], case: str
):
    """A traceback, a message that does not name what is wrong, or a folder that is left half made."""
    monkeypatch.chdir(tmp_path)
    text = "It is a text of some length, for a tokenizer to learn from. "
    Path("good.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}", "n": i}) + "\n" for i in range(40)))
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("One.\n\nTwo.\n")
    Path("latin.txt").write_bytes(b"good\n\xe9t\xe9\n")
    Path("broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    Path("taken").mkdir()
    Path("taken/thesis.txt").write_text("years of work")
    Path("settings").mkdir()
    Path("settings/fit.yaml").write_text("epochs: 3\n")
    before = sorted(tmp_path.rglob("*"))
    given, words = BAD[case]
    code, out, err = console(fit, *(str(checkpoints["gpt2"]) if word == "MODEL" else word for word in given))
    line = err.strip().splitlines()[-1]
    assert (code, out) == (2, ""), err
    assert line.startswith("tfclm.fit: ")
    assert "Traceback" not in err
    assert all(word in line for word in words), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("module", "given", "words"),
    [
        (generate, ["--prompt", "x"], ["--model"]),
        (generate, ["--model", "nowhere", "--prompt", "x"], ["nowhere"]),
        (generate, ["--model", "MODEL", "--prompt", "x", "--top-p", "0"], ["--top-p"]),
        (generate, ["--model", "MODEL", "--prompt", "x", "--temperature", "-1"], ["--temperature"]),
        (generate, ["--model", "MODEL", "--prompt", "word " * 200], ["context of 40", "shorter prompt"]),
        (generate, ["--model", "MODEL", "--prompt", "x", "--max-new-tokens", "40"], ["room for 39"]),
        (evaluate, ["--file", "x.txt"], ["--model"]),
        (evaluate, ["--model", "MODEL"], ["--dataset", "--file"]),
        (evaluate, ["--model", "MODEL", "--file", "TEXT", "--stride", "0"], ["--stride 0"]),
        (evaluate, ["--model", "MODEL", "--file", "TEXT", "--stride", "8", "--window", "41"], ["--window 41", "40"]),
        (evaluate, ["--model", "MODEL", "--file", "TEXT", "--window", "8"], ["--stride"]),
    ],
)
def test_bad_arguments_of_the_other_commands(
    console: Console, checkpoints: dict[str, Path], tmp_path: Path, module, given: list[str], words: list[str]
):
    """A traceback from inside TensorFlow for what a user mistyped."""
    text = tmp_path / "x.txt"
    text.write_text("some text\n\nand more of it\n")
    stand_ins = {"MODEL": checkpoints["gpt2"], "TEXT": text}
    code, out, err = console(module, *(stand_ins.get(word, word) for word in given))
    assert (code, out) == (2, ""), err
    assert all(word in err.strip().splitlines()[-1] for word in words), err
