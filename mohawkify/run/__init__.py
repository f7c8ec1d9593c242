"""A run's folder: what lies where, its checkpoints and its metrics."""
