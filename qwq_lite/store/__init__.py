"""What is known of models and kept of conversations: the catalogue, saved states. Knows no engine."""
