"""The machine's cores are shared: with readers of weights, with the service, with whatever else runs there."""

from __future__ import annotations

import os

_SPINS = "10000"  # some 0.4 ms on x86 since Skylake: Python needs as long between one parallel region and the next


def share_cores() -> None:
    """Compute threads that wait for each other sleep before long; to be called before torch is imported.

    A pass has hundreds of short parallel regions, and at the end of each the threads wait for the last one. GNU's
    OpenMP lets them spin for milliseconds there; when another process has the core that the last one needs, they spin
    for its whole time slice, and a pass takes several times as long. What the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
