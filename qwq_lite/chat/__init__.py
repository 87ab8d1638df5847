"""A conversation over any model. Knows no processes."""
