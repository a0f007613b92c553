"""The machine's cores are shared: with readers of weights, with the service, with whatever else runs there."""

from __future__ import annotations

import os

_SPINS = "2000"  # of about 50 ns on x86 since Skylake: as long as it takes to wake a thread that sleeps


def share_cores() -> None:
    """Compute threads that wait for each other soon sleep; to be called before torch is imported.

    A pass has hundreds of short parallel regions, and at the end of each the threads wait for the last one. GNU's
    OpenMP lets them spin for milliseconds there; when another process has the core that the last one needs, they spin
    for its whole time slice, and a pass takes several times as long. What the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
