"""Perplexity: the summed negative log-likelihood and the number of tokens, divided once."""

from tfclm.metrics.perplexity import Perplexity, TokenLoss, perplexity, token_losses

__all__ = ["Perplexity", "TokenLoss", "perplexity", "token_losses"]
