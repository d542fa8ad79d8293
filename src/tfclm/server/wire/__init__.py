"""Bytes to tensors and back: JSON, TensorProto, compressed bodies."""
