"""Perplexity: the summed negative log-likelihood and the number of tokens, divided once. Imports no other package."""
