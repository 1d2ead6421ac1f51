"""Copies decoded columns and records into the buffer of a batch, in C++."""
