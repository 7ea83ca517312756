"""`python -m hcms_lab` is `hcms-lab`."""

import sys

from hcms_lab.cli import main

sys.exit(main())
