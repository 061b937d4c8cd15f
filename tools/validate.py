#!/usr/bin/env python
"""Measure a network: the same as 'iabn-hub validate'. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
