"""Normalizers in the graph: they change a text before it is split."""
