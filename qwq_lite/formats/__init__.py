"""What model files say: GGUF headers, shapes, tensor types. Knows no engine."""
