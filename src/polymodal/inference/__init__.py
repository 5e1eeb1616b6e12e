"""Answering: sampling, the key-value cache, prefix reuse, streaming and embedding."""
