"""The versions that a result was computed with."""

import importlib.metadata
import platform

from . import __version__

PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Of this package, Python, and the packages that decide what images and networks become, where installed."""
    found = {"iabn_hub": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
