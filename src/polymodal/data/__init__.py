"""Data: sources, order, mixing, packing, loading, caches, importers, and the generated corpora."""
