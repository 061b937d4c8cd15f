"""Training on image folders."""
