"""What a token does to a reply: policies, text, events. Knows no engine and no templates."""
