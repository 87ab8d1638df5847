"""Hugging Face checkpoint of the qwen2 family -> quantized GGUF, in one pass."""
