"""Where text comes from and how it becomes blocks; `fit` and `evaluate` inherit these fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tfclm.errors import InputError
from tfclm.settings import documented, setting


@documented
@dataclass(frozen=True)
class SourceSettings:
    """Settings of every command that reads text."""

    dataset: str | None = setting(
        None, "Hub dataset id, or a folder that `save_to_disk` wrote; python-docs is Python's own documentation"
    )
    dataset_config: str | None = setting(None, "configuration of the Hub dataset, such as wikitext-2-raw-v1")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the Hub dataset")
    text_column: str = setting(
        "text", "column that holds the text; a dotted path goes into nested columns (answers.text), lists are joined"
    )
    block_size: int = setting(128, "tokens a block")
    separator: Literal["eos", "none"] = setting("eos", "what stands between documents; the guide puts nothing there")
    num_proc: int | None = setting(None, "processes that tokenize; one if not given")

    def separator_ids(self, tokenizer: Any) -> list[int]:
        """The ids that `pack` puts after each document.

        Raises:
            InputError: the tokenizer has no EOS to put there.
        """
        if self.separator == "none":
            return []
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token to put between documents: give --separator none")
        return [tokenizer.eos_token_id]
