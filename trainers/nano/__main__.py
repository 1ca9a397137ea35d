"""`python -m trainers.nano`: see make_model.py."""

from .make_model import main

main()
