"""Formats of text: CSV, JSON lines and libsvm."""
