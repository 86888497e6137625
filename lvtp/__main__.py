"""`python -m lvtp` is the `lvtp` command."""

import sys

from lvtp.cli import main

sys.exit(main())
