"""Whether the installed llama.cpp computes: matrix products in child processes, and the result that is kept."""
