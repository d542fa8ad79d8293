"""Settings of where the text comes from and how it is cut into blocks; commands that read text inherit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tfclm.errors import InputError
from tfclm.settings import documented, setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_SIZE = 128


@documented
@dataclass(frozen=True)
class SourceSettings:
    """Settings of every command that reads text."""

    dataset: str | None = setting(
        None, "Hub dataset id, or a directory that `save_to_disk` wrote; python-docs is Python's own documentation"
    )
    dataset_config: str | None = setting(None, "configuration of the Hub dataset, such as wikitext-2-raw-v1")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the Hub dataset")
    text_column: str = setting(
        "text", "text column; a dotted path goes into nested columns (answers.text), lists are joined"
    )
    block_size: int | None = setting(None, "tokens per block; 128, or the model's context if that is less")
    separator: Literal["eos", "none"] = setting(
        "eos", "token after each document; Hugging Face's guide puts none there"
    )
    num_proc: int | None = setting(None, "number of processes that tokenize; one if not given")

    def block_size_for(self, context: int | None) -> int:
        """The block size: as given, or the default for a model with this context length (None: no limit)."""
        return self.block_size if self.block_size is not None else min(BLOCK_SIZE, context or BLOCK_SIZE)

    def separator_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The token ids that `pack` puts after each document.

        Raises:
            InputError: `separator` is "eos" and the tokenizer has no EOS token.
        """
        return separator_ids(self.separator, tokenizer)


def separator_ids(separator: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of the setting `separator`, as `SourceSettings.separator_ids`."""
    if separator == "none":
        return []
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token to put after documents: give `separator` none")
    return [tokenizer.eos_token_id]
