"""Semantic segmentation: prediction, metrics, outputs, and the task that training sees."""
