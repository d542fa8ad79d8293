"""What holds for each model type, from a checkpoint of PyTorch's format to an export and back to PyTorch.

`make families` runs all checks, writes the outcomes to tests/references/families.json and puts the table that they give
into docs/reference/compatibility.md: a tick for a check that passed, a sentence where `EXCEPTIONS` says that it must
fail. TFCLM_TRANSFORMERS_4_PYTHON and TFCLM_TRANSFORMERS_5_PYTHON name the Pythons of two environments with PyTorch; see
tests/references/open_checkpoints.py.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import families_table
import numpy as np
import pytest
import tensorflow as tf
import test_families
import test_tokenizer
import test_tokenizer_kinds
import tf_keras
from conftest import documents
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from weights import reference_weight

import tfclm
from tfclm.checkpoint.configs import DECODERS, ENCODERS
from tfclm.checkpoint.tokenizers import read_tokenizer
from tfclm.errors import InputError
from tfclm.savedmodel import saving
from tfclm.savedmodel.graph.signatures import GenerationModule
from tfclm.savedmodel.settings import ServableSettings

REFERENCES = Path(__file__).parents[1] / "references"
# The case of tests/references for a type, if it has another name.
CASES = {"falcon": "falcon_7b", "gpt_bigcode": "v5_gpt_bigcode", "gpt-sw3": "gpt2"}
# The tokenizers of the published models of a type, as the tests of tokenizers call them.
TOKENIZERS = {
    "llama": ["llama", "llama-3", "starcoder"],
    "mistral": ["mistral", "mistral-nemo"],
    "qwen2": ["qwen"],
    "qwen3": ["qwen"],
    "gemma": ["gemma"],
    "gemma2": ["gemma"],
    "gemma3_text": ["gemma-3"],
    "smollm3": ["llama-3"],
    "phi3": ["phi-3", "phi-4", "gpt-oss"],
    "olmo2": ["phi-4"],
    "granite": ["starcoder", "phi-4"],
    "gpt_neox": ["neox"],
    "gpt_neo": ["gpt2"],
    "gpt_bigcode": ["starcoder"],
    "bloom": ["bloom"],
    "falcon": ["falcon"],
    "mpt": ["neox"],
    "codegen": ["codegen"],
    "persimmon": ["persimmon"],
    "phi": ["codegen"],
    "stablelm": ["neox", "phi-4"],
    "gpt2": ["gpt2"],
    "opt": ["opt"],
    "gptj": ["gpt-j"],
    "xglm": ["xglm"],
    "openai-gpt": ["openai-gpt"],
    "bert": ["bert-uncased", "bert-cased"],
    "rembert": ["rembert"],
    "roberta": ["roberta"],
    "roberta-prelayernorm": ["roberta"],
    "camembert": ["camembert"],
    "xlm-roberta": ["xlm-roberta", "precompiled"],
    **{name: [name] for name in ("biogpt", "gpt-sw3", "ctrl")},
}
STRINGS = 4_000  # per tokenizer; the tests of tokenizers compare a million
PYTORCH = {f"pytorch_{major}": f"TFCLM_TRANSFORMERS_{major}_PYTHON" for major in (4, 5)}
TOLERANCE = 1e-5  # of the largest logit
PROMPT, NEW = 6, 20
SETTINGS = tfclm.TrainingSettings(epochs=2, batch_size=8, learning_rate=1e-2, save_steps=2)
BLOCK, BLOCKS = 24, 32  # so an epoch has 4 steps


class Failure(NamedTuple):
    """A check that must fail for a type: with this error, for the reason that the sentence gives.

    It must pass with the options of the remedy, if the sentence names one.
    """

    message: str
    sentence: str
    error: type[Exception] = InputError
    remedy: dict[str, Any] | None = None


SLOW = "transformers has no fast tokenizer for it, which tfclm needs: the checkpoint must have a `tokenizer.json`."
EXCEPTIONS = {
    ("openai-gpt", "tokenizer"): Failure(
        "</w>", "Its words end in `</w>`, which the graph does not do: `generate_tokens` alone is exported."
    ),
    ("gemma2", "pytorch_4"): Failure(
        "the logits differ",
        "transformers 4.54.1 computes it without the soft cap of the attention scores, unless it is opened with "
        '`attn_implementation="eager"`.',
        AssertionError,
        {"attn_implementation": "eager"},
    ),
    ("gpt_bigcode", "pytorch_4"): Failure(
        "the logits differ",
        "transformers 4.54.1 multiplies its attention scores where it should divide them: "
        "[#40041](https://github.com/huggingface/transformers/pull/40041).",
        AssertionError,
    ),
    **{
        (name, "greedy"): Failure(
            "`generate`",
            "`generate` of PyTorch counts the positions from 0, where the model itself, in PyTorch too, counts them "
            "from 2. What is exported equals transformers' `generate` in TensorFlow, and PyTorch's model called step "
            "by step.",
            AssertionError,
            {"steps": NEW},
        )
        for name in ("camembert", "roberta", "roberta-prelayernorm", "xlm-roberta")
    },
    ("ctrl", "tokenizer"): Failure("has no fast version", SLOW),
    ("gpt-sw3", "tokenizer"): Failure("has no fast version", SLOW),
    ("biogpt", "tokenizer"): Failure("has no fast version|sacremoses", SLOW),
}


class Stopped(Exception):
    """Ends a run where it is, without saving."""


class StopAt(tf_keras.callbacks.Callback):
    """Stops a run after a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            raise Stopped


class Trained(NamedTuple):
    """A fine-tuned model, its tokenizer, and the record of the run."""

    model: Any
    tokenizer: Any
    record: tfclm.TrainingRecord


class Family:
    """A checkpoint of one type, with the reference's weights under the names and in the layouts of PyTorch."""

    def __init__(self, model_type: str, folder: Path, pytorch: dict[str, PyTorch]) -> None:
        self.model_type, self.folder, self.checkpoint = model_type, folder, folder / "checkpoint"
        self.pytorch = pytorch
        case = REFERENCES / CASES.get(model_type, model_type.replace("-", "_"))
        with np.load(case / "reference.npz") as file:
            self.numbers = dict(file)
        config = json.loads((case / "config.json").read_text(encoding="utf-8")) | {"model_type": model_type}
        tiny_tokenizer(config).save_pretrained(self.checkpoint)
        (self.checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shapes = json.loads((case / "weights.json").read_text(encoding="utf-8"))
        weights = {name: reference_weight(name, shape) for name, shape in shapes.items()}
        save_file(weights, self.checkpoint / "model.safetensors", metadata={"format": "pt"})

    def open(self, check: str, folder: Path, ids: Any, **options: Any) -> dict[str, Any]:
        """What PyTorch makes of a checkpoint of the type."""
        if check not in self.pytorch:
            pytest.skip(f"{PYTORCH[check]} names no Python with PyTorch")
        answer = self.pytorch[check].ask(folder=str(folder), ids=ids.tolist(), text=texts()[0][:200], **options)
        assert "error" not in answer, answer["error"]
        return answer

    def train(self, folder: str, steps: int = 0) -> Trained:
        """Fine-tunes the checkpoint, or resumes the run in a folder; stops after some steps if given."""
        model, tokenizer = tfclm.load(self.checkpoint)
        tokens = datasets.Dataset.from_dict({"input_ids": tokenizer([text[:4000] for text in texts()])["input_ids"]})
        blocks = tfclm.pack(tokens, BLOCK).blocks
        train, validation = blocks.select(range(BLOCKS)), blocks.select(range(BLOCKS, BLOCKS + 16))
        callbacks = [StopAt(steps)] if steps else []
        record = tfclm.finetune(
            model, tokenizer, train, validation, SETTINGS, output_dir=self.folder / folder, callbacks=callbacks
        )
        return Trained(model, tokenizer, record)

    @functools.cached_property
    def trained(self) -> Trained:
        """The fine-tuned checkpoint, of a run without an interruption."""
        return self.train("run")

    @functools.cached_property
    def saved(self) -> Path:
        """The folder that the fine-tuned model is saved to."""
        tfclm.save(self.trained.model, self.trained.tokenizer, self.folder / "saved")
        return self.folder / "saved"


@functools.cache
def texts() -> list[str]:
    """Text of the few characters that the tiny tokenizers know."""
    return [text.lower() for text in documents()[:8]]


def tiny_tokenizer(config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer with 53 entries, as the references have: the special tokens of a config, and 50 characters.

    It leaves out other characters, white space among them.
    """
    special = {config["pad_token_id"]: "<pad>", config["bos_token_id"]: "<s>", config["eos_token_id"]: "</s>"}
    entries = [*(special[number] for number in sorted(special)), *"abcdefghijklmnopqrstuvwxyz0123456789.,;:()[]'\"`-_="]
    backend = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def difference(found: Any, expected: Any) -> float:
    """The largest difference of logits, relative to the largest of them."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def loads(family: Family) -> None:
    """The checkpoint loads where PyTorch is not installed, and has PyTorch's logits."""
    if importlib.util.find_spec("torch"):
        pytest.skip("PyTorch is installed here")
    model, _ = tfclm.load(family.checkpoint)
    assert difference(model(family.numbers["ids"]).logits, family.numbers["plain"]) < TOLERANCE


def learns(family: Family) -> None:
    """A few steps lower the perplexity on other text."""
    record = family.trained.record
    assert record.diverged is None
    assert record.best_loss < record.initial_loss


def resumes(family: Family) -> None:
    """A run that was stopped within its second epoch goes on to the weights of one that was not, bit for bit."""
    with pytest.raises(Stopped):
        family.train("stopped", steps=5)
    resumed = family.train("stopped")
    assert resumed.record.steps == family.trained.record.steps == 8
    for one, other in zip(resumed.model.weights, family.trained.model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def greedy(family: Family, steps: int = 0) -> None:
    """The reloaded SavedModel, `generate` of transformers and that of PyTorch, or its steps, give the same tokens."""
    model, tokenizer = tfclm.load(family.checkpoint)
    model.generation_config.eos_token_id = None
    ids = family.numbers["ids"][:, :PROMPT].astype(np.int32)
    expected = family.numbers["greedy"].tolist()
    if steps:
        expected = family.open("pytorch_4", family.checkpoint, ids, steps=steps)["tokens"]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": model.config.pad_token_id}
    whole = model.generate(tf.constant(ids), attention_mask=tf.ones_like(ids), max_new_tokens=NEW, **options).numpy()
    assert whole.tolist() == expected, "`generate`"
    # Then `generate_tokens` alone is exported.
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    saving.write(GenerationModule(model, tokenizer, ServableSettings()), family.folder / "export")
    signature = tf.saved_model.load(str(family.folder / "export")).signatures["generate_tokens"]
    defaults = {"top_k": np.int32(0), "top_p": np.float32(1), "repetition_penalty": np.float32(1), "seed": np.int64(-1)}
    params = {"max_new_tokens": np.int32(NEW), "temperature": np.float32(0), **defaults}
    given = {name: tf.constant(np.array([value])) for name, value in params.items()}
    given |= {"input_ids": tf.constant(ids), "attention_mask": tf.ones_like(ids)}
    # The other parameters are off if they are 0.
    specs = signature.structured_input_signature[1]
    answer = signature(**{name: given.get(name, tf.zeros([1], spec.dtype)) for name, spec in specs.items()})
    assert np.hstack([ids, answer["output_ids"]]).tolist() == expected, "exported"


def tokenizer(family: Family) -> None:
    """The published models' tokenizers give the same ids in the graph."""
    for name in TOKENIZERS[family.model_type]:
        assert tokenizer_differences(name) == []


@functools.cache
def tokenizer_differences(name: str) -> list[Any]:
    """Some of the texts and ids that differ in the graph."""
    made = TOKENIZER_SOURCES[name]()
    strings = test_families.hostile_texts(11, STRINGS, test_families.added_tokens(made))
    strings += [text.encode() for text in documents()[::8]]
    return test_tokenizer.differences(made, test_tokenizer.in_graph(made), strings)[:3]


def slow(name: str, **files: bytes) -> PreTrainedTokenizerFast:
    """A tokenizer of a class of transformers that has no fast version, as a checkpoint is read."""
    with tempfile.TemporaryDirectory() as folder:
        config = json.dumps({"tokenizer_class": name}).encode()
        for file, content in {"tokenizer_config.json": config, **files}.items():
            Path(folder, file).write_bytes(content)
        return read_tokenizer(name, Path(folder))


def first_gpt() -> PreTrainedTokenizerFast:
    """The first GPT's steps: BPE with words that end in `</w>`."""
    model = models.BPE({"<unk>": 0, "a": 1, "a</w>": 2, "aa</w>": 3}, [("a", "a</w>")], end_of_word_suffix="</w>")
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def persimmon() -> PreTrainedTokenizerFast:
    """Persimmon's: Unigram with byte tokens, and the steps of Llama's."""
    marked = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return test_tokenizer_kinds.unigram(byte_fallback=True, special=False, normalizer=normalizers.Sequence(marked))


MERGES = {"vocab.json": b'{"<unk>": 0}', "merges.txt": b"#version: 0.2\n"}
TOKENIZER_SOURCES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    **test_tokenizer_kinds.KINDS,
    **{name: functools.partial(test_tokenizer.make, name) for name in test_tokenizer.KINDS},
    **{name: functools.partial(test_families.family, name) for name in test_families.FAMILIES},
    "persimmon": persimmon,
    "openai-gpt": first_gpt,
    "ctrl": lambda: slow("CTRLTokenizer", **MERGES),
    "biogpt": lambda: slow("BioGptTokenizer", **MERGES),
    "gpt-sw3": lambda: slow("GPTSw3Tokenizer", **{"spiece.model": test_tokenizer_kinds.trained_model()}),
}


class PyTorch:
    """A process of an environment with PyTorch that opens checkpoints."""

    def __init__(self, python: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.process = subprocess.Popen(
            [python, str(REFERENCES / "open_checkpoints.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of its output."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process has ended; stderr says why"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer to a request."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()


def opens(family: Family, check: str, **options: Any) -> None:
    """PyTorch reads the saved folder: all weights, in float32, the same logits and ids."""
    ids = family.numbers["ids"]
    answer = family.open(check, family.saved, ids, **options)
    assert answer["report"] == {}
    assert answer["types"] == ["torch.float32"]
    assert answer["ids"] == family.trained.tokenizer(texts()[0][:200])["input_ids"]
    assert difference(answer["logits"], family.trained.model(ids).logits) < TOLERANCE, "the logits differ"


CHECKS: dict[str, Callable[..., None]] = {
    "loads": loads,
    "learns": learns,
    "resumes": resumes,
    "greedy": greedy,
    "tokenizer": tokenizer,
    **{check: functools.partial(opens, check=check) for check in PYTORCH},
}


@pytest.fixture(scope="module")
def pytorch() -> Iterator[dict[str, PyTorch]]:
    """The processes for which an environment is given."""
    made = {check: PyTorch(os.environ[name]) for check, name in PYTORCH.items() if name in os.environ}
    yield made
    for each in made.values():
        each.process.communicate()


@pytest.fixture(scope="module", params=DECODERS + ENCODERS)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pytorch: dict[str, PyTorch]
) -> Iterator[Family]:
    """Each type in turn."""
    yield Family(request.param, tmp_path_factory.mktemp(request.param), pytorch)
    # Its graphs are cycles of many objects, which the collector would leave for long.
    tf_keras.backend.clear_session()
    gc.collect()


@pytest.fixture(scope="module")
def outcomes(pytorch: dict[str, PyTorch]) -> Iterator[dict[str, Any]]:
    """By type and check: true or a sentence. Written if PyTorch can be asked, with earlier ones of these versions."""
    versions = {"Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("tensorflow", "transformers", "tokenizers")}
    versions |= {check: each.versions["transformers"] for check, each in pytorch.items()}
    versions |= {"torch": next((each.versions["torch"] for each in pytorch.values()), "")}
    path = families_table.OUTCOMES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = known["types"] if known.get("versions") == versions else {}
    yield found
    if pytorch.keys() == PYTORCH.keys():
        ordered = {name: found[name] for name in DECODERS + ENCODERS if name in found}
        content = {"versions": versions, "types": ordered}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("check", families_table.TITLES)
def test_family(family: Family, check: str, outcomes: dict[str, Any]):
    """A type that fails somewhere between a checkpoint and an export, though its logits are right."""
    expected, found = EXCEPTIONS.get((family.model_type, check)), outcomes.setdefault(family.model_type, {})
    found[check] = "Fails."
    if expected is None:
        CHECKS[check](family)
    else:
        with pytest.raises(expected.error, match=expected.message):
            CHECKS[check](family)
        if expected.remedy:
            CHECKS[check](family, **expected.remedy)
    found[check] = expected.sentence if expected else True


def test_table_is_that_of_the_outcomes():
    """A table in the documentation that no run has given, or that lacks a type or a check."""
    outcomes = json.loads(families_table.OUTCOMES.read_text(encoding="utf-8"))
    page = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.insert(page, families_table.render(outcomes)) == page
    assert list(outcomes["types"]) == [*DECODERS, *ENCODERS]
    for model_type, checks in outcomes["types"].items():
        for check in families_table.TITLES:
            expected = EXCEPTIONS.get((model_type, check))
            assert checks[check] == (expected.sentence if expected else True), (model_type, check)
