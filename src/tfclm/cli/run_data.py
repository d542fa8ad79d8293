"""What a run of `fit` is made of: the model, its tokenizer, and the blocks to train and validate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfclm.corpus.settings import BLOCK_SIZE, SourceSettings
from tfclm.errors import InputError
from tfclm.settings import setting
from tfclm.terminal import log

if TYPE_CHECKING:
    import datasets
    import tensorflow as tf
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

    from tfclm.corpus import Packed, Split, Texts

SCRATCH = "scratch"


@dataclass(frozen=True)
class DataSettings(SourceSettings):
    """Settings of the model and the text."""

    block_size: int = setting(BLOCK_SIZE, "tokens per block")
    train_split: str = setting("train", "split to train on, also an expression such as train_asks[:5000]")
    validation_split: str | None = setting(None, "split to validate on; the dataset's own if it has one")
    train_file: tuple[str, ...] = setting((), "local files (.txt .jsonl .json .csv .parquet, also .gz) or globs")
    validation_file: tuple[str, ...] = setting((), "local files or globs to validate on")
    blocks: str | None = setting(
        None, "directory or URL of blocks that `prepare` has written, to train on", metavar="DIR"
    )
    validation_fraction: float = setting(0.1, "fraction of the documents to validate on, if nothing else is")
    model: str = setting(
        SCRATCH, "Hub id or directory; scratch trains a tokenizer on the train split and creates a small GPT-2"
    )
    revision: str | None = setting(None, "branch, tag or commit of the Hub model")
    vocab_size: int = setting(4096, "vocabulary size of the tokenizer that scratch trains")

    def check_data(self) -> None:
        """Raises `InputError` for settings that contradict each other, or one out of range."""
        if self.blocks is not None:
            self._check_blocks()
        elif self.dataset is None and not self.train_file:
            raise InputError("nothing to train on: give `dataset`, `train_file` or `blocks`")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"`validation_fraction` {self.validation_fraction}: give a number between 0 and 1")
        if self.vocab_size < 257:
            raise InputError(f"`vocab_size` {self.vocab_size}: give 257 or more, one per byte and one for the EOS")

    def _check_blocks(self) -> None:
        for name in ("dataset", "train_file", "validation_split"):
            if getattr(self, name):
                raise InputError(f"`blocks` and `{name}` are mutually exclusive: give one of them")
        if self.model == SCRATCH:
            raise InputError("`blocks` were made with a tokenizer: give the `model` that it belongs to")


@dataclass(frozen=True)
class Blocks:
    """What a run trains and validates on.

    Attributes:
        train: the blocks to train on.
        validation: the blocks to validate on.
        description: where they come from; JSON types.
        validation_texts: the documents of the validation blocks; None if these were prepared.
    """

    train: Packed
    validation: Packed
    description: dict[str, Any]
    validation_texts: datasets.Dataset | None


def load_model_and_blocks(
    settings: DataSettings, strategy: tf.distribute.Strategy, seed: int
) -> tuple[TFPreTrainedModel, PreTrainedTokenizerBase, Blocks]:
    """The checkpoint, or a new model whose tokenizer is trained on the train split alone, and the blocks."""
    from tfclm import checkpoint, corpus
    from tfclm.checkpoint.scratch import create_from_scratch

    if settings.model == SCRATCH:
        texts = read_texts(settings, seed)
        with strategy.scope():
            model, tokenizer = create_from_scratch(texts.train["text"], settings.vocab_size, settings.block_size)
        log(f"new GPT-2 with {model.num_parameters() / 1e6:.1f} M parameters and a vocabulary of {len(tokenizer)}")
    else:
        with strategy.scope():
            model, tokenizer = checkpoint.load(settings.model, revision=settings.revision)
        corpus.check_block_size(settings.block_size, checkpoint.context_size(model))
        if settings.blocks is not None:
            return model, tokenizer, open_blocks(settings, model, tokenizer)
        texts = read_texts(settings, seed)
    train, validation = pack_splits(texts, model, tokenizer, settings)
    return model, tokenizer, Blocks(train, validation, texts.description, texts.validation)


def open_blocks(settings: DataSettings, model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """The blocks that `prepare` has written, and blocks of `validation_file`, if that is given.

    Raises:
        InputError: they do not belong to the tokenizer or the settings, or there are none to train or validate on.
    """
    from tfclm import corpus

    prepared = corpus.open_prepared(str(settings.blocks))
    if prepared.tokenizer != corpus.tokenizer_digest(tokenizer):
        raise InputError(
            f"`blocks` {settings.blocks} were made with another tokenizer than that of {settings.model}: "
            "prepare them with this `model`"
        )
    for name, value in (("block_size", settings.block_size), ("separator", settings.separator_ids(tokenizer))):
        if prepared.settings[name] != value:
            raise InputError(
                f"`{name}` {getattr(settings, name)}, but `blocks` {settings.blocks} were made with "
                f"{prepared.settings[name]}: leave it out, or prepare them again"
            )
    train = prepared.split("train")
    if train is None:
        raise InputError(f"`blocks` {settings.blocks} have less than one block to train on: prepare more text")
    if settings.validation_file:
        held_out = read_validation(settings)
        validation = pack_split("validation", held_out.texts, tokenizer, settings)
        about = {
            "validation": "files " + ", ".join(held_out.description["source"]),
            "validation_rows": len(held_out.texts),
            "validation_dropped_rows": held_out.description["dropped_rows"],
        }
        blocks = Blocks(train, validation, prepared.description | about, held_out.texts)
    else:
        prepared_validation = prepared.split("validation")
        if prepared_validation is None:
            raise InputError(
                f"`blocks` {settings.blocks} have no blocks to validate on: give `validation_file`, or prepare them "
                "with a larger validation fraction"
            )
        blocks = Blocks(train, prepared_validation, prepared.description, None)
    report_blocks(blocks.train, blocks.validation, model)
    return blocks


def read_validation(settings: DataSettings) -> Split:
    """The documents of `validation_file`."""
    from tfclm import corpus

    try:
        return corpus.read_split(files=settings.validation_file, text_column=settings.text_column)
    except InputError as error:
        raise error.renamed(file="validation_file") from error


def read_texts(settings: DataSettings, seed: int) -> Texts:
    """The documents of the train and validation splits."""
    from tfclm import corpus

    texts = corpus.read(
        dataset=settings.dataset,
        dataset_config=settings.dataset_config,
        revision=settings.dataset_revision,
        split=settings.train_split,
        validation_split=settings.validation_split,
        files=settings.train_file,
        validation_files=settings.validation_file,
        text_column=settings.text_column,
        validation_fraction=settings.validation_fraction,
        seed=seed,
    )
    log(f"{len(texts.train)} documents to train on, {len(texts.validation)} to validate on")
    return texts


def pack_splits(
    texts: Texts, model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> tuple[Packed, Packed]:
    """The token blocks of the train and validation splits."""
    train = pack_split("training", texts.train, tokenizer, settings)
    validation = pack_split("validation", texts.validation, tokenizer, settings)
    report_blocks(train, validation, model)
    return train, validation


def pack_split(
    name: str, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, settings: DataSettings
) -> Packed:
    """The token blocks of one split; `name` is its name in messages."""
    from tfclm import corpus

    tokens = corpus.tokenize(texts, tokenizer, settings.num_proc)
    separator, prefix = settings.separator_ids(tokenizer), corpus.prefix_ids(tokenizer)
    try:
        return corpus.pack(tokens, settings.block_size, separator, prefix)
    except InputError as error:
        raise InputError(f"{name} split: {error}") from error


def report_blocks(train: Packed, validation: Packed, model: TFPreTrainedModel) -> None:
    """Checks that the model has the blocks' token ids, and logs how many blocks there are."""
    from tfclm import corpus

    corpus.check_vocabulary(max(train.largest_id, validation.largest_id), model.config.vocab_size)
    log(f"{len(train.blocks)} blocks of {train.block_size} tokens to train on, {len(validation.blocks)} to validate on")


def settings_of_blocks(url: str) -> dict[str, Any]:
    """The settings that prepared blocks were made with, and that other text is to be treated with, too."""
    from tfclm.corpus import open_prepared

    made = open_prepared(url).settings
    separator = "eos" if made["separator"] else "none"
    return {"block_size": made["block_size"], "text_column": made["text_column"], "separator": separator}
