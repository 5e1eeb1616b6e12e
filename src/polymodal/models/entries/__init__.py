"""How streams enter a backbone, and the fusions that merge them."""
