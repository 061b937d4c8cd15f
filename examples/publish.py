"""Export a checkpoint as a repository of the Hugging Face Hub, and load it again."""

import tempfile
from pathlib import Path

import timm
import torch

import iabn_hub
from iabn_hub.publishing.export import check, export_of, write_repository

with tempfile.TemporaryDirectory() as folder:
    export = export_of("test_resnet_iabn.mnist")
    repository = Path(folder) / export.name
    files = write_repository(export, repository, repo="ORG/NAME")
    for name, path in files.items():
        print(f"{name:<18} {path.stat().st_size:>10,} bytes")
    check(export, f"local-dir:{repository}")  # raises if the logits differ

    model = timm.create_model(f"local-dir:{repository}", pretrained=True).eval()
    original = iabn_hub.create_model("test_resnet_iabn.mnist", pretrained=True).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        print("equal logits:", model(image).equal(original(image)))
