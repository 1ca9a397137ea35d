"""Command `python -m trainers.data.emoji`, the older name of `python -m trainers.nano.emoji`."""

from ..nano.emoji import main

if __name__ == "__main__":
    main()
