"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from moegen.errors import Interrupted

_EOF_GRACE_S = 10.0  # a runner whose service is gone may take this long to end in order


class StopRequest:
    """True once someone has asked: `stopping()`."""

    def __init__(self) -> None:
        self._asked = False  # no Event: its lock could be held when the signal comes

    def __call__(self) -> bool:
        return self._asked

    def on_signals(self) -> None:
        """SIGTERM and SIGINT ask; a second one ends the process at once. Committed parts stay either way."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def on_stdin_eof(self) -> None:
        """The end of standard input asks too: whoever holds the other end is gone, however it ended."""
        threading.Thread(target=self._watch_stdin, name="stdin", daemon=True).start()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(Interrupted.exit_code)
        self._asked = True

    def _watch_stdin(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self._asked = True
        time.sleep(_EOF_GRACE_S)
        os._exit(Interrupted.exit_code)
