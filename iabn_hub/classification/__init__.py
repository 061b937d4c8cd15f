"""Image classification: prediction, metrics, and the task that training sees."""
