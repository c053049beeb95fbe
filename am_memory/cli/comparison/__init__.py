"""Several ways to hold one conversation, judged by the same questions: for `am-memory compare`."""
