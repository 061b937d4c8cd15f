"""Measurements of the layer and of whole networks."""
