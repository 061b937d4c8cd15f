"""The versions that a result was computed with."""

import importlib.metadata
import platform
from collections.abc import Iterable

from . import __version__

PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of this package, Python, and others where installed: by default those that decide what images become."""
    found = {"iabn_hub": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
