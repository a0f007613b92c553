"""How a run is asked to stop, and how it ends if it cannot."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from moegen.errors import Interrupted

_GRACE_S = 15.0  # to end in order, once asked; then the process ends, and what it had saved is resumed
_POLL_S = 0.2


class StopRequest:
    """True once someone has asked: `stopping()`."""

    def __init__(self) -> None:
        self._asked = False  # no Event: its lock could be held when the signal comes

    def __call__(self) -> bool:
        return self._asked

    def on_signals(self) -> None:
        """SIGTERM and SIGINT ask; a second one ends the process at once. What is saved stays either way."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def on_stdin_eof(self) -> None:
        """The end of standard input asks too: whoever holds the other end is gone. Call `on_signals` first."""
        threading.Thread(target=self._watch_stdin, name="stdin", daemon=True).start()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(Interrupted.exit_code)
        self._asked = True

    def _watch_stdin(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self._asked = True

    def _watch(self) -> None:
        while not self._asked:
            time.sleep(_POLL_S)
        time.sleep(_GRACE_S)  # a pass over a large model may take longer
        print("moegen: stopped in the middle of a pass; the same command goes on from what is saved", file=sys.stderr)
        sys.stderr.flush()
        os._exit(Interrupted.exit_code)
