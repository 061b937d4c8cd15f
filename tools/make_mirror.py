#!/usr/bin/env python
"""Build a mirror of the checkpoints: python tools/make_mirror.py DIR. See --help."""

import sys

from iabn_hub.publishing.mirror import main

if __name__ == "__main__":
    sys.exit(main())
