"""Command `python -m trainers.curves` (tools/curves.py)."""

import sys

from .tools.curves import main

if __name__ == "__main__":
    sys.exit(main())
