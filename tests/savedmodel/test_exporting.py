"""What is written: signatures, warm-up records, and the canary that asks a version before it is published."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_config
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tfclm.errors import InputError
from tfclm.savedmodel import saving, warmup
from tfclm.savedmodel.exporting import export_saved_model, publish_exported
from tfclm.savedmodel.graph.signatures import GenerationModule
from tfclm.savedmodel.publishing import canary
from tfclm.savedmodel.publishing.canary import CanaryFailed
from tfclm.savedmodel.publishing.gate import Gate, GateFailed
from tfclm.savedmodel.publishing.versions import ServingDirectory
from tfclm.savedmodel.settings import ServableSettings, defaults

TEXT, INT, LONG, FLOAT = "string", "int32", "int64", "float32"
PARAMETERS = {
    "max_new_tokens": (INT, 1),
    "temperature": (FLOAT, 1),
    "top_k": (INT, 1),
    "top_p": (FLOAT, 1),
    "repetition_penalty": (FLOAT, 1),
    "seed": (LONG, 1),
}
EXTRAS = {
    "min_p": (FLOAT, 1),
    "presence_penalty": (FLOAT, 1),
    "frequency_penalty": (FLOAT, 1),
    "min_new_tokens": (INT, 1),
    "logit_bias_ids": (INT, 2),
    "logit_bias": (FLOAT, 2),
    "top_logprobs": (INT, 1),
}
# Inputs and outputs of each signature, with type and rank.
SIGNATURES: dict[str, tuple[dict[str, tuple[str, int]], dict[str, tuple[str, int]]]] = {
    "serving_default": ({"prompt": (TEXT, 1)}, {"generated_text": (TEXT, 1)}),
    "generate": (
        {"prompt": (TEXT, 1), **PARAMETERS, "stop": (TEXT, 1)},
        {
            "generated_text": (TEXT, 1),
            "completion": (TEXT, 1),
            "completion_bytes": (TEXT, 1),
            "finish_reason": (TEXT, 1),
            "prompt_tokens": (INT, 1),
            "completion_tokens": (INT, 1),
        },
    ),
    "generate_tokens": (
        {"input_ids": (INT, 2), "attention_mask": (INT, 2), **PARAMETERS, **EXTRAS, "stop": (TEXT, 2)},
        {
            "output_ids": (INT, 2),
            "completion_tokens": (INT, 1),
            "finish_reason": (TEXT, 1),
            "completion_bytes": (TEXT, 1),
            "token_logprobs": (FLOAT, 2),
            "top_ids": (INT, 3),
            "top_logprobs": (FLOAT, 3),
        },
    ),
    "score": (
        {"text": (TEXT, 1)},
        {
            "loss": (FLOAT, 1),
            "perplexity": (FLOAT, 1),
            "token_count": (INT, 1),
            "token_ids": (INT, 2),
            "token_logprobs": (FLOAT, 2),
            "greedy_ids": (INT, 2),
        },
    ),
    "tokenize": ({"text": (TEXT, 1)}, {"token_ids": (INT, 2), "token_count": (INT, 1)}),
    "detokenize": ({"token_ids": (INT, 2)}, {"text": (TEXT, 1), "text_bytes": (TEXT, 1)}),
    "describe": ({"query": (TEXT, 1)}, {"description": (TEXT, 1)}),
}


def make_model(seed: int = 0, **generation: Any):
    """A tiny GPT-2 with a generation_config."""
    import tf_keras

    from tfclm.checkpoint import create

    tf_keras.utils.set_random_seed(seed)
    model = create(tiny_config("gpt2"))
    model.generation_config = GenerationConfig(eos_token_id=0, **generation)
    return model


def make_wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer that cannot be put into the graph: what is exported with it is smaller, and sooner there."""
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]", eos_token="[UNK]")


def write(servable: GenerationModule, folder: Path) -> Path:
    """What a version holds, but for its record."""
    saving.write(servable, folder)
    warmup.write(servable, folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """All signatures, with the parameters' defaults from generation_config, except one."""
    model = make_model(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.25, max_new_tokens=12)
    servable = GenerationModule(model, AutoTokenizer.from_pretrained(tokenizer_dir), ServableSettings(top_k=7))
    return write(servable, tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[canary.Prompt]]:
    """`generate_tokens` alone, and what its canary is asked."""
    model = make_model()
    prompts = canary.make_prompts(model, 512, 64, [0])
    return write(
        GenerationModule(model, make_wordpiece(), ServableSettings()), tmp_path_factory.mktemp("tokens")
    ), prompts


def read(version: Path) -> Any:
    """The signatures' definitions, by name."""
    model = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    (graph,) = model.meta_graphs
    assert list(graph.meta_info_def.tags) == ["serve"]
    return {name: value for name, value in graph.signature_def.items() if not name.startswith("__")}


def shapes(infos: Any) -> dict[str, tuple[str, int]]:
    """Types and ranks; every dimension is open."""
    assert all(not info.tensor_shape.unknown_rank for info in infos.values())
    assert all(dim.size == -1 for info in infos.values() for dim in info.tensor_shape.dim)
    return {name: (tf.as_dtype(info.dtype).name, len(info.tensor_shape.dim)) for name, info in infos.items()}


def values(signature: Any) -> dict[str, Any]:
    """The defaults, each of one value with the rank of the input."""
    arrays = {name: tf.make_ndarray(value) for name, value in signature.defaults.items()}
    ranks = {name: len(info.tensor_shape.dim) for name, info in signature.inputs.items()}
    assert all(array.shape == (1,) * ranks[name] for name, array in arrays.items())
    return {name: array.item() for name, array in arrays.items()}


def test_fingerprint_is_that_of_the_file(tokens: tuple[Path, list[canary.Prompt]], tmp_path: Path):
    """A server's metrics that name another file: the one from before the signatures were opened."""
    version, _ = tokens
    read_back = tf.saved_model.experimental.read_fingerprint(str(version))
    # What TensorFlow makes of a copy that has never had a fingerprint.
    copy = tmp_path / "copy"
    shutil.copytree(version, copy)
    (copy / "fingerprint.pb").unlink()
    from tensorflow.python.saved_model import fingerprinting_utils

    fingerprinting_utils.write_fingerprint(str(copy))
    expected = tf.saved_model.experimental.read_fingerprint(str(copy))
    for name in (
        *("saved_model_checksum", "graph_def_program_hash", "signature_def_hash"),
        *("saved_object_graph_hash", "checkpoint_hash"),
    ):
        assert getattr(read_back, name) == getattr(expected, name) != 0, name


def replay(version: Path) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Signature and inputs of each warm-up record."""
    records = []
    for record in tf.data.TFRecordDataset(str(version / warmup.PATH)):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        records.append((request.model_spec.signature_name, inputs))
    return records


def test_signatures(texts: Path):
    """An input or output renamed, of another type or rank, or one more that every REST request has to name."""
    signatures = read(texts)
    assert {name: (shapes(each.inputs), shapes(each.outputs)) for name, each in signatures.items()} == SIGNATURES
    assert {each.method_name for each in signatures.values()} == {"tensorflow/serving/predict"}


def test_defaults_of_the_parameters(texts: Path):
    """A parameter that gRPC clients must give, or whose default is neither the checkpoint's nor the setting's."""
    signatures = read(texts)
    params = {
        "max_new_tokens": 12,
        "temperature": pytest.approx(0.7),
        "top_k": 7,
        "top_p": pytest.approx(0.9),
        "repetition_penalty": 1.25,
        "seed": -1,
    }
    assert values(signatures["generate"]) == {**params, "stop": b""}
    extras = {name: 0 for name in EXTRAS} | {"logit_bias_ids": -1, "stop": b""}
    assert values(signatures["generate_tokens"]) == {**params, **extras}
    assert values(signatures["serving_default"]) == values(signatures["score"]) == {}


def test_tokens_alone_are_the_default(tokens: tuple[Path, list[canary.Prompt]]):
    """A version without serving_default, or with a signature for text that its graph has no tokenizer for."""
    signatures = read(tokens[0])
    inputs, outputs = (dict(each) for each in SIGNATURES["generate_tokens"])
    del inputs["stop"], outputs["completion_bytes"]
    assert sorted(signatures) == ["describe", "generate_tokens", "serving_default"]
    for signature in (signatures["generate_tokens"], signatures["serving_default"]):
        assert (shapes(signature.inputs), shapes(signature.outputs)) == (inputs, outputs)
        assert values(signature)["max_new_tokens"] == 63


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, (63, 0.0, 0, 1.0, 1.0)),
        # Without do_sample, transformers looks at none of these either.
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.5, "repetition_penalty": 1.5}, (63, 0.0, 0, 1.0, 1.5)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.5}, (63, 0.7, 5, 0.5, 1.0)),
        ({"do_sample": True}, (63, 1.0, 50, 1.0, 1.0)),
        ({"max_new_tokens": 5}, (5, 0.0, 0, 1.0, 1.0)),
        ({"max_new_tokens": 500}, (63, 0.0, 0, 1.0, 1.0)),
    ],
)
def test_generation_config_becomes_defaults(generation: dict[str, Any], expected: tuple[float, ...]):
    """A server that decodes differently from transformers with the same checkpoint."""
    config = GenerationConfig(**generation)
    assert tuple(vars(defaults(ServableSettings(), config, 63)).values()) == pytest.approx(expected)


def test_what_generation_config_asks_in_vain():
    """Beam search, or a shorter answer than was asked for, without a word."""
    with pytest.raises(InputError, match="num_beams 4"):
        defaults(ServableSettings(), GenerationConfig(num_beams=4), 63)
    with pytest.raises(InputError, match="`max_new_tokens` 64: the limit is 63"):
        defaults(ServableSettings(max_new_tokens=64), GenerationConfig(), 63)
    for name, value, message in [
        ("top_k", 2**31, "`top_k` 2147483648"),
        ("top_k", "many", "top_k is 'many', not a whole number"),
        ("top_k", 0.5, "top_k is 0.5"),
        ("top_k", True, "top_k is True"),
        ("top_k", math.inf, "top_k is inf"),
        ("max_new_tokens", 2.5, "max_new_tokens is 2.5"),
        ("temperature", "hot", "temperature is 'hot', not a number"),
        ("temperature", 10**400, "too large"),
        ("temperature", 1e39, r"`temperature` 1e\+39"),
        ("top_p", 1.5, "`top_p` 1.5"),
    ]:
        with pytest.raises(InputError, match=f"has a value that no request may have: .*{message}"):
            defaults(ServableSettings(), GenerationConfig(do_sample=True, **{name: value}), 63)
    with pytest.raises(InputError, match="do_sample is 'false', neither true nor false"):
        defaults(ServableSettings(), GenerationConfig(do_sample="false"), 63)
    for name, value in (("eos_token_id", 2**31), ("pad_token_id", 2**31), ("eos_token_id", "0"), ("eos_token_id", 0.5)):
        model = make_model()
        setattr(model.generation_config, name, value)
        with pytest.raises(InputError, match=f"has the token id {value!r}"):
            GenerationModule(model, make_wordpiece(), ServableSettings())


def test_each_signature_is_warmed_up(texts: Path):
    """A first request that waits for what a server could have done before, or a record that stops the load."""
    records = replay(texts)
    assert {name for name, _ in records} == set(SIGNATURES)
    signatures = tf.saved_model.load(str(texts)).signatures
    for name, inputs in records:
        assert set(inputs) == set(SIGNATURES[name][0])
        outputs = signatures[name](**{key: tf.constant(value) for key, value in inputs.items()})
        assert set(outputs) == set(SIGNATURES[name][1])


@pytest.mark.slow
def test_canary_passes_what_is_whole(tokens: tuple[Path, list[canary.Prompt]]):
    """A check that refuses a good version, or says nothing of what it cost."""
    ballast = np.ones(2**27)  # what this process holds is none of the canary's
    result = canary.validate(*tokens, xla=False)
    assert result.pop("records") == 2
    assert all(result[name] > 0 for name in ("load_seconds", "warmup_seconds"))
    assert 100 < result["peak_memory_mib"] < ballast.nbytes / 2**20


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer_dir: Path):
    """A prompt with the added token that reads beyond the embeddings, for the other rows of the batch, too."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(InputError, match="the tokenizer has 513 entries but the model's vocab_size is 512"):
        GenerationModule(make_model(), tokenizer, ServableSettings())


def test_canary_prompts_keep_to_the_limit():
    """An export that its own canary refuses, because it asks for more new tokens than the version gives."""
    prompts = canary.make_prompts(make_model(), 512, 64, [0], limit=3)
    assert {prompt.new for prompt in prompts} == {3}
    # The longest one leaves nothing of the context.
    assert [len(prompt.ids) for prompt in prompts] == [1, 7, 40, 61]
    assert all(len(prompt.allowed) <= 3 for prompt in prompts)


@pytest.mark.long
def test_canary_sees_a_text_that_ends_elsewhere(tokens: tuple[Path, list[canary.Prompt]]):
    """An EOS that the graph does not know, or a version that gives no token at all."""
    folder, prompts = tokens
    longer = [canary.Prompt(prompt.ids, prompt.new, [*prompt.allowed, [1]]) for prompt in prompts]
    with pytest.raises(CanaryFailed, match="8 new tokens, where the Python model gives 9"):
        canary.validate(folder, longer, xla=False)


@pytest.mark.long
def test_canary_refuses_a_version_without_variables(tokens: tuple[Path, list[canary.Prompt]], tmp_path: Path):
    """A version that a server takes for available and that fails every request."""
    folder = shutil.copytree(tokens[0], tmp_path / "broken")
    (folder / "variables" / "variables.index").unlink()
    with pytest.raises(CanaryFailed, match=r"cannot be served: .*variables/variables") as failed:
        canary.validate(folder, tokens[1], xla=False)
    assert len(str(failed.value).splitlines()) == 1


def spoil_record(version: Path, target: Path) -> Path:
    """A copy whose only warm-up record asks for what the graph refuses."""
    folder = shutil.copytree(version, target)
    path = str(folder / warmup.PATH)
    records = [each.numpy() for each in tf.data.TFRecordDataset(path)]
    logs = map(prediction_log_pb2.PredictionLog.FromString, records)
    log = next(log for log in logs if log.predict_log.request.model_spec.signature_name == "generate_tokens")
    log.predict_log.request.inputs["temperature"].CopyFrom(tf.make_tensor_proto([-1.0]))
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(log.SerializeToString())
    return folder


@pytest.mark.long
def test_canary_says_what_a_warmup_record_met(tokens: tuple[Path, list[canary.Prompt]], tmp_path: Path):
    """A record that stops a server's start, or a message that names a node of the graph alone."""
    folder = spoil_record(tokens[0], tmp_path / "broken")
    with pytest.raises(CanaryFailed, match=r"give 0 \(greedy\) or more"):
        canary.validate(folder, tokens[1], xla=False)


@pytest.mark.long
def test_canary_says_that_xla_cannot_be_turned_off(tokens: tuple[Path, list[canary.Prompt]], tmp_path: Path):
    """Another build of TensorFlow: an export that cannot be checked, or that is checked less without a word."""
    lines: list[str] = []
    result = canary.validate(*tokens, xla=False, library=tmp_path, log=lines.append)
    assert result["records"] == 1
    (line,) = lines
    assert line.startswith(f"XLA cannot be turned off in this build of TensorFlow ({tmp_path} has no libtensorflow_cc")
    assert "warning" not in result


def test_canary_does_not_wait_for_ever(tokens: tuple[Path, list[canary.Prompt]]):
    """A version that hangs, and with it the export, until somebody looks."""
    with pytest.raises(CanaryFailed, match=r"cannot be served: no answer within 0\.5 seconds"):
        canary.validate(tokens[0], xla=False, timeout=0.5)


def test_canary_texts_fit_the_context(tokenizer_dir: Path):
    """Texts that `score` refuses, that are left out though a part of them would fit, or without other scripts."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for context in (2, 16, 1024):
        texts = canary.make_texts(tokenizer, context)
        assert len(texts) == 3
        assert all(1 < len(text.ids) <= context for text in texts)
        assert all(text.ids == tokenizer(text.text.decode(errors="replace"))["input_ids"] for text in texts)
    assert texts[0].text.isascii()
    for character in "ï１ह한👩\u2003":
        assert character in texts[1].text.decode()
    assert canary.make_texts(tokenizer, 1) == []


@pytest.mark.slow
def test_canary_sees_another_tokenizer(texts: Path, tokenizer_dir: Path, tmp_path: Path):
    """A table of the tokenizer that is wrong in the graph, behind prompts of token ids that all come out."""
    # Without warm-up records, which take seconds.
    version = shutil.copytree(texts, tmp_path / "1", ignore=shutil.ignore_patterns("assets.extra"))
    other = canary.make_texts(AutoTokenizer.from_pretrained(tokenizer_dir, add_prefix_space=True), 64)
    with pytest.raises(CanaryFailed, match=r"canary text 0: ids \[.*\] at 0, where the tokenizer gives \["):
        canary.validate(version, texts=other, xla=False)


@pytest.mark.slow
def test_version_from_elsewhere(tokens: tuple[Path, list[canary.Prompt]], tmp_path: Path):
    """One that no server can load published unasked, one that is too bad, or a verdict that nobody can read later."""
    version = shutil.copytree(tokens[0], tmp_path / "7")
    saving.write_record(version, {"perplexity": 20.0, "source": {"checkpoint": "runs/eli5"}})
    broken = spoil_record(version, tmp_path / "8")
    serving = tmp_path / "m"
    with pytest.raises(CanaryFailed, match=r"not published: .*give 0 \(greedy\).* \(the verdict is in "):
        publish_exported(broken, serving, source={"hub": "me/eli5"})
    with pytest.raises(GateFailed, match=r"not published: perplexity 20\.0000 is above 19"):
        publish_exported(version, serving, limits=Gate(max_perplexity=19.0))
    assert ServingDirectory.at(serving).versions() == []
    assert publish_exported(version, serving, version=3, limits=Gate(max_perplexity=21.0)).path == f"{serving}/3"
    assert {path.name: path.is_dir() or path.read_bytes() for path in (serving / "3").rglob("*")} == {
        path.name: path.is_dir() or path.read_bytes() for path in version.rglob("*")
    }
    verdicts = [json.loads(path.read_text()) for path in sorted((serving / ".verdicts").iterdir())]
    assert [(each["passed"], each.get("version")) for each in verdicts] == [(False, None), (False, None), (True, 3)]
    assert verdicts[0]["source"] == {"checkpoint": "runs/eli5", "hub": "me/eli5"}
    assert "give 0 (greedy)" in verdicts[0]["reason"]
    saving.write_record(version, {})
    with pytest.raises(InputError, match="the exported model's record has none"):
        publish_exported(version, serving, limits=Gate(max_perplexity=21.0))


@pytest.mark.slow
def test_nothing_is_published_that_the_canary_refuses(tokens: tuple[Path, list[canary.Prompt]], tmp_path: Path):
    """Weights of another model behind the prompts of this one, in a version that is served all the same."""

    def swap(line: str) -> None:
        # Called between writing and asking: the weights become those of another seed.
        for folder in tmp_path.glob(".staging-*/variables"):
            if line.startswith("verifying"):
                shutil.copytree(tokens[0] / "variables", folder, dirs_exist_ok=True)

    with pytest.raises(CanaryFailed, match=r"canary prompt \d: new token \d is \d+, where the Python model gives \d+"):
        export_saved_model(make_model(seed=1), make_wordpiece(), tmp_path, source={"checkpoint": "a"}, log=swap)
    assert ServingDirectory.at(tmp_path).versions() == []
    assert list(tmp_path.glob(".staging-*")) == []
    # Written down, as the gate's refusals are.
    (verdict,) = (json.loads(path.read_text()) for path in (tmp_path / ".verdicts").iterdir())
    assert (verdict["passed"], verdict["source"]) == (False, {"checkpoint": "a"})
    assert "where the Python model gives" in verdict["reason"]
