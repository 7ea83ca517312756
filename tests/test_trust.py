"""Every promise of docs/trust.md names a test, and that test exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

ROOT = Path(__file__).resolve().parent.parent
TRUST = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
ROWS = [line for line in TRUST.splitlines() if line.startswith("| ") and not re.match(r"\| (promise|---)", line)]
NAMED = re.compile(r"`(tests/test_\w+\.py)::(test_\w+)` \|$")


def test_every_promise_has_its_test() -> None:
    assert len(ROWS) >= 20
    for row in ROWS:
        named = NAMED.search(row)
        assert named, f"no test is named: {row}"
        path = ROOT / named[1]
        assert path.is_file(), f"there is no {named[1]}: {row}"
        tests = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert named[2] in tests, f"there is no {named[2]} in {named[1]}"
