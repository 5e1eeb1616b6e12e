"""Complete runs: a declarative file, the one place that wires its parts, the proofs, the run, the model in use."""
