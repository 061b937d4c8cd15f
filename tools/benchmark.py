#!/usr/bin/env python
"""Measure the layer and the networks: the same as 'iabn-hub benchmark'. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
