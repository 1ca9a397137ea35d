"""The command line `unipic`. Installed scripts call `unipic_core.cli:main`."""

from .commands import main

__all__ = ["main"]
