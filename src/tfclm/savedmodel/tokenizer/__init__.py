"""The tokenizer in the graph: exactly the ids of the fast tokenizer, in core TensorFlow ops."""

from tfclm.savedmodel.tokenizer.encoder import GraphTokenizer
from tfclm.savedmodel.tokenizer.models.symbols import to_bytes
from tfclm.savedmodel.tokenizer.normalizers.normalizing import flatten_sequences

__all__ = ["GraphTokenizer", "flatten_sequences", "to_bytes"]
