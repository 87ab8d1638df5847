"""The rules of a reply, each a small pure class. They know no engine."""
