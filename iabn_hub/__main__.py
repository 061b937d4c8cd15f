"""`python -m iabn_hub` is `iabn-hub`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
