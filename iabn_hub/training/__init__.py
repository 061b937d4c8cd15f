"""Training and validation, of any task."""
