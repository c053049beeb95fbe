"""Whole conversations in, of which only what is new is read."""
