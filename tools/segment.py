#!/usr/bin/env python
"""Segment photos: the same as 'iabn-hub segment'. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
