"""Stop signals: the first requests a checkpoint after the current step, the second exits at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals that stop a run; Windows has no SIGHUP."""

LAUNCHER = "TORCHELASTIC_RUN_ID"
"""Variable that torchrun sets in the processes to which it passes its signals on."""

PASSED_ON = 5.0
"""Seconds within which a repeated signal under such a launcher is the same one: schedulers signal all processes of a
job, and the launcher, which is one of them, passes its own on."""


class StopRequest:
    """Context that handles SIGNALS in the main thread. asked: True after the first signal.

    Signals that the process was started to ignore stay ignored, such as SIGHUP under nohup.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._same_until = 0.0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader worker: it receives Ctrl-C too, but is still needed
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.asked:
            if time.monotonic() >= self._same_until:
                os._exit(128 + number)
            return
        self.asked = True
        if LAUNCHER in os.environ:
            self._same_until = time.monotonic() + PASSED_ON
        name = signal.Signals(number).name
        print(f"{name}: saving a checkpoint after this step; a second signal exits at once", file=sys.stderr)
