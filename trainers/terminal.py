"""The end of every command of the trainers: its exit code, and one line for what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from unipic_core.errors import printable


def exit_code(run: Callable[[], object], interrupted: str) -> int:
    """Run a command. 0: done; 2: bad input, told in one line on stderr; 130: interrupted.

    interrupted: the sentence after Ctrl-C, which says how to go on.
    """
    try:
        run()
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return 0
