"""The converter's commands: one module a command, loaded when it is called."""
