"""Search: vectors in, the nearest entries out."""
