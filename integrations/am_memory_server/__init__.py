"""A web server on `am_memory`: installed with `attention-matching-memory[server]`."""

__all__: list[str] = []
