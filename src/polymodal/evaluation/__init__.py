"""Tasks, metrics, controls, the runner and the report."""
