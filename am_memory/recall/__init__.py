"""What was compacted, exact again: the originals, the search for them, and their way back."""
