"""Exact entries of compacted tokens: kept off the device, searched, and brought back."""
