"""Rules over text: where it may end, where an answer begins, scripts, normalization, tags. Knows no tokens."""
