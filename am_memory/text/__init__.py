"""From text to tokens and back: chat templates, sampling, constrained decoding, streamed text."""
