"""Moved: `hcms-lab compare` does this now. The README once gave this path, so it says so."""

import sys

print("error: experiments/compare.py has moved; now:", "hcms-lab compare", *sys.argv[1:], file=sys.stderr)
sys.exit(2)
