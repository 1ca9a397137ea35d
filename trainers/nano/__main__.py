"""Command `python -m trainers.nano` (make_model.py)."""

from .make_model import main

main()
