"""Converts between bytes and tensors: JSON, TensorProto, compressed bodies."""
