"""Prepared blocks: the same bytes whatever writes them, and the blocks that `pack` makes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import put_bos

from tfclm.corpus import open_prepared, pack, prefix_ids, read_split, tokenize, tokenizer_digest
from tfclm.corpus.formats import read_documents
from tfclm.corpus.parts import FilePart, split_file
from tfclm.corpus.prepared import content_digest
from tfclm.corpus.shards import Recipe, begin, finish, plan_of, prepare_part
from tfclm.corpus.store import Store
from tfclm.corpus.tokenizing import encoder_arguments
from tfclm.errors import InputError

BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def text(tmp_path: Path, documents: list[str]) -> Path:
    """Documents of different lengths, and two rows without text."""
    path = tmp_path / "text.jsonl"
    rows = [*(document[: 40 + 37 * i] for i, document in enumerate(documents[:40])), "", None]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(params=["plain", "bos"])
def either_tokenizer(request: pytest.FixtureRequest, tokenizer):
    """A tokenizer with and without a BOS."""
    return put_bos(tokenizer) if request.param == "bos" else tokenizer


def make_recipe(tokenizer, fraction: float = 0.0, block_size: int = BLOCK_SIZE) -> Recipe:
    """The recipe that `prepare` makes for a tokenizer."""
    prefix, separator = tuple(prefix_ids(tokenizer)), (tokenizer.eos_token_id,)
    return Recipe("text", block_size, separator, prefix, encoder_arguments(tokenizer), fraction, 0)


def split(text: Path, part_bytes: int) -> list[FilePart]:
    """The parts of a file."""
    return list(split_file(str(text), text.stat().st_size, part_bytes))


def write(url: str, parts: Sequence[FilePart], recipe: Recipe, order: Sequence[int] | None = None) -> dict:
    """Prepares all parts, or these in this order, and returns the manifest."""
    store = Store(url)
    plan = plan_of(recipe, [{"path": parts[0].path}], "digest")
    begin(store, plan)
    for index in range(len(parts)) if order is None else order:
        prepare_part(index, parts[index], recipe, store)
    return finish(store, plan, len(parts), recipe)


def content(folder: Path) -> dict[str, bytes]:
    """All files in a directory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_part_equals_pack(text: Path, tmp_path: Path, either_tokenizer):
    """Blocks that differ from those that `fit` makes of the same file: separators, prefixes, labels or counts."""
    write(str(tmp_path / "out"), split(text, 10**9), make_recipe(either_tokenizer))
    found = open_prepared(str(tmp_path / "out")).split("train")
    documents = read_split(files=[str(text)]).texts
    separator, prefix = [either_tokenizer.eos_token_id], prefix_ids(either_tokenizer)
    packed = pack(tokenize(documents, either_tokenizer), BLOCK_SIZE, separator, prefix)
    assert found is not None
    assert found.blocks.features == packed.blocks.features
    assert found.blocks.to_dict() == packed.blocks.to_dict()
    for name in ("block_size", "dropped_tokens", "tokens", "largest_id", "separator", "prefix", "predicted_tokens"):
        assert getattr(found, name) == getattr(packed, name), name


def test_parts_hold_all_tokens(text: Path, tmp_path: Path, tokenizer):
    """A remainder that is dropped for each part, or joined to that of another part in another order."""
    parts, recipe = split(text, 3000), make_recipe(tokenizer)
    manifest = write(str(tmp_path / "out"), parts, recipe)
    assert len(parts) > 5
    blocks, rest = [], []
    for part in parts:
        texts = [text for text in part_texts(part) if text]
        ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        whole = len(ids) // BLOCK_SIZE * BLOCK_SIZE
        blocks += [ids[i : i + BLOCK_SIZE] for i in range(0, whole, BLOCK_SIZE)]
        rest += ids[whole:]
    blocks += [rest[i : i + BLOCK_SIZE] for i in range(0, len(rest) - BLOCK_SIZE + 1, BLOCK_SIZE)]
    found = open_prepared(str(tmp_path / "out")).split("train")
    assert found is not None
    assert list(found.blocks["input_ids"]) == blocks
    assert found.dropped_tokens == len(rest) % BLOCK_SIZE
    assert (manifest["rows"], manifest["dropped_rows"]) == (42, 2)


def part_texts(part: FilePart) -> list[str | None]:
    """The documents of a part."""
    return list(read_documents(part, "text"))


def test_rests_begin_with_the_prefix(text: Path, tmp_path: Path, tokenizer):
    """A block of rests in which one part's text follows another's without the BOS that begins every text."""
    put_bos(tokenizer)
    parts = split(text, 3000)
    write(str(tmp_path / "out"), parts, make_recipe(tokenizer))
    prepared = open_prepared(str(tmp_path / "out"))
    found = prepared.split("train")
    assert found is not None
    whole = pack(tokenize(read_split(files=[str(text)]).texts, tokenizer), BLOCK_SIZE, [0], [512])
    assert found.tokens == whole.tokens
    assert found.dropped_tokens < BLOCK_SIZE
    ids, labels = (np.asarray(found.blocks[name]) for name in ("input_ids", "labels"))
    assert (ids[:, 0] == 512).all()
    assert (labels == np.where(ids == 512, -100, ids)).all()
    assert np.count_nonzero(labels != -100) == found.predicted_tokens
    # In every block of rests, each end of a document is followed by a BOS, as in all others.
    follows = ids[:, 1:][ids[:, :-1] == 0]
    assert (follows == 512).all()


def test_order_and_repetition_leave_the_same_bytes(text: Path, tmp_path: Path, either_tokenizer):
    """A result that depends on how many workers there are, on which is first, or on what was killed in between."""
    parts, recipe = split(text, 3000), make_recipe(either_tokenizer, 0.3)
    write(str(tmp_path / "one"), parts, recipe)
    order = list(range(len(parts)))
    random.Random(0).shuffle(order)
    write(str(tmp_path / "two"), parts, recipe, [*order, *order[:3]])
    assert content(tmp_path / "one") == content(tmp_path / "two")

    # Killed before the manifest, after a shard without its record, and while a file was written.
    three = Store(str(tmp_path / "three"))
    begin(three, plan_of(recipe, [{"path": parts[0].path}], "digest"))
    for index in (4, 1, 2):
        prepare_part(index, parts[index], recipe, three)
    (tmp_path / "three/parts/00004.json").unlink()
    next((tmp_path / "three").glob("train-00001*")).unlink()
    (tmp_path / "three/train-00003.arrow.0.part").write_bytes(b"incomplete")
    kept = (tmp_path / "three/train-00002.arrow").stat().st_ino
    write(str(tmp_path / "three"), parts, recipe)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert (tmp_path / "three/train-00002.arrow").stat().st_ino == kept


def test_documents_held_out(text: Path, tmp_path: Path, tokenizer):
    """A document that is trained on and validated on, or the same text on both sides."""
    lines = text.read_text().splitlines()
    text.write_text("\n".join([*lines, *lines[:5]]) + "\n")
    manifest = write(str(tmp_path / "out"), split(text, 3000), make_recipe(tokenizer, 0.3))
    counts = {name: entry["documents"] for name, entry in manifest["splits"].items()}
    assert sum(counts.values()) == 45
    assert 4 < counts["validation"] < 30
    recipe = make_recipe(tokenizer, 0.3)
    held_out = sum(recipe.split_of(json.loads(line)["text"] or "") == "validation" for line in [*lines, *lines[:5]])
    assert counts["validation"] in (held_out, held_out - 2)  # the two rows without text are in no split
    assert recipe.split_of(" a\n") == recipe.split_of("a")


def test_damage_is_named(text: Path, tmp_path: Path, tokenizer):
    """Shards that were changed, shortened or lost, and a run that trains on them."""
    parts, recipe, folder = split(text, 3000), make_recipe(tokenizer), tmp_path / "out"
    write(str(folder), parts, recipe)
    before = content(folder)
    shard = folder / "train-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-4] + b"1234")
    with pytest.raises(InputError, match=r"train-00001.arrow does not match its SHA-256"):
        write(str(folder), parts, recipe)
    shard.write_bytes(b"short")
    with pytest.raises(InputError, match=r"train-00001.arrow has 5 bytes"):
        open_prepared(str(folder)).split("train")
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00001.arrow is missing"):
        open_prepared(str(folder)).split("train")
    write(str(folder), parts, recipe)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 32}, "`block_size` 16, not 32"),
        ({"fraction": 0.5}, "`validation_fraction` 0.0, not 0.5"),
    ],
)
def test_other_settings_are_refused(text: Path, tmp_path: Path, tokenizer, change: dict, message: str):
    """Shards of two block sizes or of two sets of documents in one directory."""
    parts = split(text, 3000)
    write(str(tmp_path / "out"), parts, make_recipe(tokenizer))
    with pytest.raises(InputError, match=message):
        write(str(tmp_path / "out"), parts, make_recipe(tokenizer, **change))


def test_other_files_are_kept(text: Path, tmp_path: Path, tokenizer):
    """A directory of something else that is filled with shards."""
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        write(str(tmp_path), split(text, 3000), make_recipe(tokenizer))


def test_bad_input_is_one_error(text: Path, tmp_path: Path, tokenizer):
    """An error in a part that gets lost, or that a repetition with better input still reports."""
    good = text.read_text()
    text.write_text(good.replace('{"text"', "{text", 1))
    with pytest.raises(InputError, match=r"text.jsonl, line 1 is not JSON"):
        write(str(tmp_path / "out"), split(text, 3000), make_recipe(tokenizer))
    text.write_text(good)
    assert write(str(tmp_path / "out"), split(text, 3000), make_recipe(tokenizer))["rows"] == 42


def test_text_in_no_part(tmp_path: Path, tokenizer):
    """A manifest of nothing, from a column that no row has."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n' * 100)
    with pytest.raises(InputError, match="none of their rows has text in column text"):
        write(str(tmp_path / "out"), split(path, 100), make_recipe(tokenizer))


def test_content_names_the_blocks(text: Path, tmp_path: Path, tokenizer):
    """Two texts under one name, so that a run resumes on other blocks; a part of the blocks under the name of all."""
    parts = split(text, 3000)
    for name, size in (("a", 16), ("b", 16), ("c", 32)):
        write(str(tmp_path / name), parts, make_recipe(tokenizer, block_size=size))
    a, b, c = (open_prepared(str(tmp_path / name)).split("train").blocks for name in "abc")
    assert content_digest(a) == content_digest(b) != content_digest(c)
    assert content_digest(a.select(range(3))) is None
    assert content_digest(a.shuffle(seed=0)) is None


def test_any_file_system(text: Path, tmp_path: Path, tokenizer):
    """Shards on a bucket that cannot be written or read."""
    parts, recipe = split(text, 3000), make_recipe(tokenizer)
    manifest = write("memory://bucket/blocks", parts, recipe)
    assert manifest == write(str(tmp_path / "out"), parts, recipe)
    remote, local = (open_prepared(url).split("train") for url in ("memory://bucket/blocks", str(tmp_path / "out")))
    assert remote is not None
    assert local is not None
    assert remote.blocks.to_dict() == local.blocks.to_dict()
    assert content_digest(remote.blocks) == content_digest(local.blocks)


def test_tokenizers_are_told_apart(tokenizer):
    """Blocks of one tokenizer that train a model of another; the same tokenizer under another name, after a call."""
    before = tokenizer_digest(tokenizer)
    tokenizer("a text", truncation=True, max_length=5)
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(put_bos(tokenizer)) != before
