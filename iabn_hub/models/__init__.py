"""The architectures, registered in timm, and their weights. Importing this compiles nothing and downloads nothing."""

from .factory import ARCHITECTURES, MODELS, SEGMENTATION_MODELS, create_model, in_repository, list_models

__all__ = ["ARCHITECTURES", "MODELS", "SEGMENTATION_MODELS", "create_model", "in_repository", "list_models"]
