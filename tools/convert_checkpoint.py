#!/usr/bin/env python
"""Convert files of weights: the same as 'iabn-hub convert'. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
