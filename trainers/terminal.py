"""Exit codes and one-line errors of the trainers' commands."""

from __future__ import annotations

import sys
from collections.abc import Callable

from unipic_core.errors import message_of, printable


def exit_code(run: Callable[[], object], interrupted: str) -> int:
    """Run a command and return its exit code. 0: done; 2: bad input, one line on stderr; 130: interrupted.

    interrupted: message after Ctrl-C that says how to continue.
    """
    try:
        run()
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {printable(' '.join(message_of(error).split()))}", file=sys.stderr)
        return 2
    return 0
