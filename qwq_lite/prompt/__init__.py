"""Messages to tokens: chat templates, their limits, history, what a question asks for. Knows no engine."""
