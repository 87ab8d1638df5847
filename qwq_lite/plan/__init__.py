"""What fits a machine: memory, speed, and the search for settings. Knows no terminals."""
