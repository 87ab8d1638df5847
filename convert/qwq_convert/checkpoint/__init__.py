"""What a Hugging Face checkpoint says: files, tensors, tokenizer, chat templates. Knows no GGUF."""
