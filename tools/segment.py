#!/usr/bin/env python
"""Turn photos into maps of classes, on many devices under torchrun: python tools/segment.py IN OUT. See --help."""

import sys

from iabn_hub.segmentation.command import main

if __name__ == "__main__":
    sys.exit(main())
