"""The output directory of a run: results, model card, loss curve, locking and resuming state."""
