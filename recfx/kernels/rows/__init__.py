"""Rows of a table: their initial values, pooling, gradients and optimisers."""
