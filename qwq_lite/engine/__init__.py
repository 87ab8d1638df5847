"""The engine in this process: scheduling, sequences, sampling. Knows no terminals and no pipes."""
