#!/usr/bin/env python
"""Measure a network's accuracy: python tools/validate.py MODEL DATA. See --help."""

import sys

from iabn_hub.training.validate import main

if __name__ == "__main__":
    sys.exit(main())
