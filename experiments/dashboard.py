"""Moved: `hcms-lab dashboard` does this now. The README once gave this path, so it says so."""

import sys

print("error: experiments/dashboard.py has moved; now:", "hcms-lab dashboard", *sys.argv[1:], file=sys.stderr)
sys.exit(2)
