"""Command `python -m trainers.memory` (tools/memory.py)."""

import sys

from .tools.memory import main

if __name__ == "__main__":
    sys.exit(main())
