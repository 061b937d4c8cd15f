"""What can go wrong between a checkpoint's name and its weights. Every message names the way out."""

from ..terminal import without_secrets


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, fetched, verified or loaded. The message has no passwords and no tokens."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class UnknownNameError(CheckpointError):
    """No model or checkpoint has this name."""


class CatalogueError(CheckpointError):
    """A catalogue file, or a record in it, is not what it must be."""


class CacheError(CheckpointError):
    """The cache folder cannot be written, or the disk is full."""


class OfflineError(CheckpointError):
    """A download is needed and downloads are off."""


class DownloadError(CheckpointError):
    """No source gave the file."""


class ChecksumError(CheckpointError):
    """The bytes are not the published ones."""
