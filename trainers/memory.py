"""`python -m trainers.memory`: see tools/memory.py."""

import sys

from .tools.memory import main

if __name__ == "__main__":
    sys.exit(main())
