"""Ragged columns: their order, strings, crosses, and lists as tensors."""
