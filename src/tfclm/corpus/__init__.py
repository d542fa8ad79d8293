"""From text to token blocks: `read` the documents, `tokenize` them, `pack` the ids into blocks. No TensorFlow.

Each step streams its input, writes Arrow files into the datasets cache (`HF_DATASETS_CACHE`) and returns a
memory-mapped `datasets.Dataset`. So memory stays bounded, and a second run on unchanged input starts at once.
"""

from tfclm.corpus.files import Split
from tfclm.corpus.packing import Packed, check_block_size, check_ids, check_vocabulary, pack
from tfclm.corpus.prepared import content_digest, open_prepared
from tfclm.corpus.shards import tokenizer_digest
from tfclm.corpus.sources import Texts, read, read_split
from tfclm.corpus.text_bytes import block_bytes, window_bytes
from tfclm.corpus.tokenizing import prefix_ids, tokenize

__all__ = [
    "Packed",
    "Split",
    "Texts",
    "block_bytes",
    "check_block_size",
    "check_ids",
    "check_vocabulary",
    "content_digest",
    "open_prepared",
    "pack",
    "prefix_ids",
    "read",
    "read_split",
    "tokenize",
    "tokenizer_digest",
    "window_bytes",
]
