"""Sessions and originals as files."""
