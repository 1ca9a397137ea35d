"""`python -m unipic_core` is the command `unipic`."""

import sys

from .cli import main

sys.exit(main())
