"""Perplexity: the summed negative log-likelihood divided by the number of tokens. Imports no other room."""
