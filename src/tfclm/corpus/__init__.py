"""Text in, token blocks out: `read` the texts, `tokenize` them, `pack` the ids into blocks. No TensorFlow.

Each step streams, writes Arrow files into the datasets cache (`HF_DATASETS_CACHE`) and hands back a memory-mapped
`datasets.Dataset`, so that memory stays bounded and a second run on unchanged input starts at once.
"""

from tfclm.corpus.files import Split
from tfclm.corpus.packing import Packed, check_block_size, check_ids, check_vocabulary, pack
from tfclm.corpus.sources import Texts, read, read_split
from tfclm.corpus.tokenizing import tokenize

__all__ = [
    "Packed",
    "Split",
    "Texts",
    "check_block_size",
    "check_ids",
    "check_vocabulary",
    "pack",
    "read",
    "read_split",
    "tokenize",
]
