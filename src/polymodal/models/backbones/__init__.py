"""Backbones: where streams meet."""
