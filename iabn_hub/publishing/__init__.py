"""Exports, mirrors and conversions of checkpoints."""
