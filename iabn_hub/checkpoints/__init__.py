"""Checkpoints: the catalogue of what is published, and verified files from it."""

from .catalogue import Checkpoint, HubFile, Preprocessing, Result, find, read_catalogue, records
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
    "fetch_checkpoint",
    "find",
    "read_catalogue",
    "records",
]
