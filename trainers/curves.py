"""Command `python -m trainers.curves` (tools/curves.py)."""

from .tools.curves import main

if __name__ == "__main__":
    main()
