"""Losses: pure functions of a model's outputs, and the configs that recipes name them by."""
