"""`python -m ptq`."""

import sys

from ptq.cli import main

sys.exit(main())
