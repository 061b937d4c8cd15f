#!/usr/bin/env python
"""Export checkpoints to the Hugging Face Hub: the same as 'iabn-hub export'. See --help."""

import sys

from iabn_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
