"""The only importer of llama_cpp. Everything above it speaks of tokens, bytes and devices, never of pointers."""
