"""Adapt a backbone to a folder of images, then ask the result what changed.

python examples/adapt_from_python.py nano ./target runs/from-python
"""

from __future__ import annotations

import sys

import adaptkit
from adaptkit.errors import AdaptkitError


def main(backbone: str, data: str, output: str) -> None:
    # Any setting of the recipe is a keyword, two underscores for a dot: epochs=5, labels="./labelled", optim__lr=1e-4.
    result = adaptkit.adapt(backbone, data, output=output)

    print(result.report["message"])
    for metric, delta in result.report["probes"]["delta"].items():
        if delta["ci95"] is not None:  # too few images give no interval
            low, high = delta["ci95"]
            print(f"{metric:20} {delta['value']:+.2f}, 95 % between {low:+.2f} and {high:+.2f}")
    if result.verdict == "improved":
        print(f"use the adapted backbone: {result.backbone}")
    else:
        print(f"{result.verdict}: nothing here is better beyond doubt than the backbone you have")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except AdaptkitError as error:  # one line that says what, where and what to do; every kind has its exit code
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
