"""What operating systems do differently: files, child processes, limits. Knows no models."""
