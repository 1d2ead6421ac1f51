"""Decoded columns and records copied into the buffer of a batch, in C++."""
