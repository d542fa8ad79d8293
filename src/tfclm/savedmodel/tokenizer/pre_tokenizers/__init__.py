"""Pre-tokenizers in the graph: where a text is split into words."""
