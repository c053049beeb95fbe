"""Text to tokens and back: chat templates, sampling, constraints, streams of text."""
