#!/usr/bin/env python
"""Publish checkpoints on the Hugging Face Hub: python tools/export_to_hub.py MODEL.TAG --repo ORG/NAME. See --help."""

import sys
from pathlib import Path

from iabn_hub.publishing.command import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "recipes"))
