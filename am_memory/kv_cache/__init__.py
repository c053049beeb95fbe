"""The data: what a session's cache holds, exact and compact, and what is saved of it."""
