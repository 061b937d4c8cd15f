#!/usr/bin/env python
"""Convert files of weights between layouts: python tools/convert_checkpoint.py IN OUT. See --help."""

import sys

from iabn_hub.publishing.convert import main

if __name__ == "__main__":
    sys.exit(main())
