"""One conversation: append, generate, compact, look back, branch, save."""
