"""Pre-tokenizers in the graph: they split a text into words."""
