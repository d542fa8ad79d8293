"""The tokenizer in the graph: the ids of the fast tokenizer, in core TensorFlow ops."""

from tfclm.savedmodel.tokenizer.graph import GraphTokenizer
from tfclm.savedmodel.tokenizer.normalizing import flatten
from tfclm.savedmodel.tokenizer.symbols import to_bytes

__all__ = ["GraphTokenizer", "flatten", "to_bytes"]
