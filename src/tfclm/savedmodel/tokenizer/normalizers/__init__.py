"""Normalizers in the graph: what changes a text before it is split."""
