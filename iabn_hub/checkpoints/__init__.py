"""Checkpoints: the catalogue of what is published, and verified files from it."""

from .catalogue import Checkpoint, HubFile, Preprocessing, Result, catalogue, find, read_catalogue
from .errors import (
    CacheError,
    CatalogueError,
    CheckpointError,
    ChecksumError,
    DownloadError,
    OfflineError,
    UnknownNameError,
)
from .fetch import cache_folder, fetch_checkpoint

__all__ = [
    "CacheError",
    "CatalogueError",
    "Checkpoint",
    "CheckpointError",
    "ChecksumError",
    "DownloadError",
    "HubFile",
    "OfflineError",
    "Preprocessing",
    "Result",
    "UnknownNameError",
    "cache_folder",
    "catalogue",
    "fetch_checkpoint",
    "find",
    "read_catalogue",
]
