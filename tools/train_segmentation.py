#!/usr/bin/env python
"""Train or fine-tune a segmentation network: the same as 'iabn-hub train'. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
