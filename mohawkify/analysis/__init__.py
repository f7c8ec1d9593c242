"""Which layers and heads of a teacher are worth keeping."""
