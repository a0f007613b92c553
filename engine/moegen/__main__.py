"""`python -m moegen`: the same as the `moegen` command."""

import sys

from moegen.cli import main

sys.exit(main())
