"""Tokenizer models in the graph: BPE, Unigram and WordPiece, words in, token ids out."""
