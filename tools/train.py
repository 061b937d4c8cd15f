#!/usr/bin/env python
"""Train or fine-tune a network as a recipe says: python tools/train.py RECIPE DATA. See --help."""

import sys
from pathlib import Path

from iabn_hub.training.command import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "recipes"))
