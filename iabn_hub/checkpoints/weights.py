"""Reading a file of weights: tensors and plain values only, whatever the file says."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .errors import CheckpointError

CONTAINERS = ("state_dict", "model")  # where training snapshots keep their weights


def read_weights(path: Path) -> dict[str, Any]:
    """The state dict in a `.safetensors` file, or in any file that torch.save wrote, on the CPU.

    A snapshot may hold other things beside it (optimizer, numbers, an argparse.Namespace). Code in a pickle is
    refused, not run.

    Raises:
        CheckpointError: there is no such file, or it holds no state dict; names the file.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file")
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path}: is not a file of weights, or holds code, which is never run") from e
    except Exception as e:  # a damaged file fails in as many ways as it has bytes
        raise CheckpointError(f"{path}: is not a file of weights, or is damaged ({type(e).__name__})") from e
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


WEIGHT_FILES = ("model.safetensors", "*.safetensors", "*.pth.tar", "*.pth", "*.pt", "*.bin")


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder as timm or `tools/train.py` writes it.

    Raises:
        CheckpointError: there is none, or several and none of them is `model.safetensors`.
    """
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(f"{folder}: has {len(found)} files {pattern}; name the one to load")
        if found:
            return found[0]
    raise CheckpointError(f"{folder}: holds no weights (looked for {', '.join(WEIGHT_FILES)})")
