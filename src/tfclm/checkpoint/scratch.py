"""A small GPT-2 and a tokenizer trained on the text: the model of the quickstart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast, TFPreTrainedModel

END_OF_TEXT = "<|endoftext|>"
# Default sampling parameters, those of Hugging Face's guide: greedy text of a model this small ends at once or repeats
# itself.
GENERATION = {"do_sample": True, "top_k": 50, "top_p": 0.95}


def create_from_scratch(
    texts: Iterable[str], vocab_size: int, context: int
) -> tuple[TFPreTrainedModel, PreTrainedTokenizerFast]:
    """Creates a small GPT-2 with random weights and trains its tokenizer.

    Args:
        texts: the training documents.
        vocab_size: maximum number of entries of the tokenizer, 257 or more.
        context: context length of the model, in tokens.

    Example:
        >>> model, tokenizer = create_from_scratch(["The first text.", "The second."], 300, 64)
        >>> model.config.vocab_size == len(tokenizer)
        True
    """
    from tfclm.checkpoint import create

    tokenizer = train_tokenizer(texts, vocab_size, context)
    model = create(small_config(tokenizer, context))
    model.generation_config.update(**GENERATION)
    return model, tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer like GPT-2's.

    Args:
        texts: the training documents; with validation documents among them the perplexity would look too good.
        vocab_size: maximum number of entries, 257 or more, including `<|endoftext|>` (BOS and EOS, id 0).
        context: context length of the model, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return GPT2TokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=context,
    )


def small_config(tokenizer: PreTrainedTokenizerFast, context: int) -> GPT2Config:
    """The config of a GPT-2 that trains on a laptop in minutes: 2 layers, hidden size 256, `context` tokens."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=256,
        n_layer=2,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
