"""Heads: what is read out of states and features."""
