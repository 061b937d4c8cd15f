#!/usr/bin/env python
"""Train a segmentation network as a recipe says: python tools/train_segmentation.py RECIPE DATA. See --help."""

import sys
from pathlib import Path

from iabn_hub.training.command import TRAIN_SEGMENTATION, main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "recipes", program=TRAIN_SEGMENTATION))
