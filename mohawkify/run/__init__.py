"""A run's folder: what lies where, its checkpoints, written and validated, and its metrics."""
