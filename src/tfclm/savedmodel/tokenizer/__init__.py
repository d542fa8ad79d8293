"""The tokenizer in the graph: the ids of the fast tokenizer, in core TensorFlow ops."""

from tfclm.savedmodel.tokenizer.graph import GraphTokenizer
from tfclm.savedmodel.tokenizer.merging import to_bytes

__all__ = ["GraphTokenizer", "to_bytes"]
