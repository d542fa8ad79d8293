"""Text as settings name it, and the perplexity of a model on it: what `evaluate` prints and `export` records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

    from tfclm.corpus import Split
    from tfclm.metrics.perplexity import Perplexity


def read_documents(source: SourceSettings, split: str, files: Sequence[str] = ()) -> Split:
    """The documents of one split of a dataset, or of files where these are given."""
    from tfclm import corpus

    return corpus.read_split(
        dataset=None if files else source.dataset,
        dataset_config=None if files else source.dataset_config,
        revision=None if files else source.dataset_revision,
        split=split,
        files=files,
        text_column=source.text_column,
    )


def document_texts(source: SourceSettings, split: str = "", files: Sequence[str] = ()) -> Iterable[str]:
    """The texts of `read_documents`."""
    texts: Iterable[str] = read_documents(source, split, files).texts["text"]
    return texts


def evaluate(
    model: TFPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: SourceSettings,
    *,
    split: str,
    files: Sequence[str] = (),
    stride: int | None = None,
    window: int | None = None,
    batch_size: int = 4,
) -> dict[str, Any]:
    """The perplexity of a loaded model, and how it was measured.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        source: where the text comes from, and its block size.
        split: split of the source's dataset.
        files: local files or globs, instead of the dataset.
        stride: tokens by which the window moves; None scores blocks.
        window: tokens per window; the model's context if not given.
        batch_size: rows per forward pass.

    Returns:
        What `evaluate --json` prints: perplexity, its standard error, loss (nats per token), tokens, their bytes, bits
        per byte, protocol. The bytes and what is computed from them are None if they are not known exactly.

    Raises:
        InputError: no text, too little of it, or a block size, window or stride that does not fit.
    """
    from tfclm.metrics.bits import bits_per_byte

    text = read_documents(source, split, files)
    if stride is None:
        score, size, protocol = _score_blocks(model, tokenizer, source, text, batch_size)
    else:
        score, size, protocol = _score_windows(model, tokenizer, text, stride, window, batch_size)
    return {
        "perplexity": score.perplexity,
        "standard_error": score.standard_error,
        "loss": score.loss,
        "tokens": score.tokens,
        "bytes": size,
        "bits_per_byte": bits_per_byte(score.loss, score.tokens, size),
        "protocol": protocol | text.description,
    }


def _score_blocks(
    model: TFPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: SourceSettings,
    text: Split,
    batch_size: int,
) -> tuple[Perplexity, int | None, dict[str, Any]]:
    """The perplexity in blocks, the bytes of the tokens, and the protocol."""
    from tfclm import corpus
    from tfclm.checkpoint import context_size
    from tfclm.metrics.perplexity import perplexity

    context = context_size(model)
    block_size = source.block_size_for(context)
    corpus.check_block_size(block_size, context)
    tokens = corpus.tokenize(text.texts, tokenizer, source.num_proc)
    prefix = corpus.prefix_ids(tokenizer)
    packed = corpus.pack(tokens, block_size, source.separator_ids(tokenizer), prefix)
    corpus.check_vocabulary(packed.largest_id, model.config.vocab_size)
    score = perplexity(model, packed.blocks, batch_size=batch_size)
    return (
        score,
        corpus.block_bytes(text.texts, tokenizer, packed),
        {
            "block_size": block_size,
            "separator": source.separator,
            "dropped_tokens": packed.dropped_tokens,
            **prefix_entry(tokenizer, prefix),
        },
    )


def _score_windows(
    model: TFPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Split,
    stride: int,
    window: int | None,
    batch_size: int,
) -> tuple[Perplexity, int | None, dict[str, Any]]:
    """The perplexity in windows, the bytes of the tokens, and the protocol."""
    from tfclm import corpus
    from tfclm.checkpoint import context_size
    from tfclm.metrics.perplexity import check_window, perplexity

    context, prefix = context_size(model), corpus.prefix_ids(tokenizer)
    window = window or context
    if window is None:
        raise InputError("this model's context has no limit: give `window`")
    check_window(window, stride, len(prefix), context)
    joined = "\n\n".join(text.texts["text"])
    ids = tokenizer(joined, verbose=False)["input_ids"]
    if len(ids) <= max(len(prefix), 1):
        raise InputError(f"the text has {len(ids)} tokens: give more, because the first one is only context")
    score = perplexity(model, ids, window=window, stride=stride, prefix=prefix, batch_size=batch_size)
    size = corpus.window_bytes(joined, tokenizer, prefix, window, stride)
    protocol = {"window": window, "stride": stride, "separator": "\n\n", **prefix_entry(tokenizer, prefix)}
    return score, size, protocol


def prefix_entry(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int]) -> dict[str, Any]:
    """The entry of a protocol for the tokens at the beginning of each block or window; empty if there are none."""
    return {"prefix": tokenizer.convert_ids_to_tokens(list(prefix))} if prefix else {}
