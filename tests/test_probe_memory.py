"""The probes that compare all with all stay below 2 GB, at the size that is promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "probes" / "retrieval.py"


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["knn", "retrieval"])
def test_a_hundred_thousand_by_a_hundred_thousand_stays_below_2_gb(probe: str) -> None:
    """100 queries of two blocks and more are enough: the next block takes the place of the one before."""
    command = [sys.executable, str(SCRIPT), "--timed", "100", "--only", probe]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["peak_bytes"] < 2e9
