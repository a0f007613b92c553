"""What every test needs before its first import of Airflow or torch, in this process and in those that it starts."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

AIRFLOW_HOME = tempfile.mkdtemp(prefix="moegen-airflow-home-")
atexit.register(shutil.rmtree, AIRFLOW_HOME, ignore_errors=True)
os.environ |= {
    "AIRFLOW_HOME": AIRFLOW_HOME,
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    # Tiny models have no work for threads; on a busy machine they would only wait for each other.
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}
