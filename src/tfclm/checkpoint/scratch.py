"""A small GPT-2 and its tokenizer, made from nothing but the training text: the quickstart's model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

END_OF_TEXT = "<|endoftext|>"
# How it continues a prompt unless a caller says otherwise: as Hugging Face's guide does. Greedy text of a model this
# small ends at once or repeats itself.
GENERATION = {"do_sample": True, "top_k": 50, "top_p": 0.95}


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> Any:
    """A byte-level BPE tokenizer in GPT-2's way, trained on `texts`.

    Args:
        texts: the train split alone; a vocabulary that has seen the validation text makes its perplexity look better.
        vocab_size: entries at most, `<|endoftext|>` (bos and eos, id 0) among them; 257 at least.
        context: tokens that its model takes.
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


def small_config(tokenizer: Any, context: int) -> Any:
    """The config of a GPT-2 that a laptop trains in minutes: 2 layers of width 256, `context` tokens."""
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
