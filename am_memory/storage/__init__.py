"""Saved sessions: one file each, in a folder on any file system."""
