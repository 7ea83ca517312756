"""Moved: `hcms-lab contribute` does this now. The README once gave this path, so it says so."""

import sys

print("error: experiments/contribute.py has moved; now:", "hcms-lab contribute", *sys.argv[1:], file=sys.stderr)
sys.exit(2)
