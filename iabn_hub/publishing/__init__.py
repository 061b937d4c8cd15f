"""Checkpoints as repositories of the Hugging Face Hub, in other layouts, and in mirrors."""
