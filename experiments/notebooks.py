"""Write the notebooks of all figures and tables from one template, `hcms_lab.report.notebook`.

python experiments/notebooks.py            # rewrite notebooks/<name>.ipynb
python experiments/notebooks.py --check    # change nothing; exit status 1 where one differs from the template
"""

from __future__ import annotations

import sys

from hcms_lab.report.notebook import stale


def main(argv: list[str]) -> int:
    for path, text in stale().items():
        if "--check" in argv:
            print(f"error: {path.name} differs from its template: run python experiments/notebooks.py", file=sys.stderr)
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote notebooks/{path.name}")
    return 1 if "--check" in argv and stale() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
