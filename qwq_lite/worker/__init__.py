"""The engine in a child process: protocol, process, and a model that uses it. Knows no chat rules."""
