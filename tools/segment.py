#!/usr/bin/env python
"""`iabn-hub segment` for torchrun: turn photos into maps of classes, python tools/segment.py IN OUT. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
