"""Chat and completion calls that send the whole conversation. Only what is new in it is read."""
