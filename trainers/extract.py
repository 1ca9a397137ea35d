"""Command `python -m trainers.extract` (tools/extract.py)."""

import sys

from .tools.extract import main

if __name__ == "__main__":
    sys.exit(main())
