#!/usr/bin/env python
"""Build a mirror of the checkpoints: the same as 'iabn-hub mirror'. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["mirror", *sys.argv[1:]]))
