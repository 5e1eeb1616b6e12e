"""Checks on what comes in and what goes out."""
