"""How a run ends before its time: the error that the user is told, and its record in `status.json`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from adaptkit.errors import (
    AdaptkitError,
    Collapsed,
    ConnectionLost,
    GainNotMet,
    Interrupted,
    MachineError,
)
from adaptkit.run import Run
from adaptkit.shortage import shortage


@contextmanager
def recorded_ending(run: Run) -> Iterator[None]:
    """Whatever ends the block early is in `status.json` before it goes on upwards, as an error that says what to do."""
    try:
        yield
    except Interrupted as error:
        _record(run, "interrupted", error)
        raise
    except Exception as error:
        error = run.failed_elsewhere(error) or _of_machine(error, run) or error
        _record(run, "failed", error)
        raise error


def _of_machine(error: Exception, run: Run) -> AdaptkitError | None:
    """Memory that ran out, here or in a loader process; or a lost process."""
    if (of_memory := shortage(error)) is not None:
        return of_memory
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
        advice = f"unless its message says otherwise, go on with: adaptkit resume {run.path}"
        return ConnectionLost(f"another process ended or was killed; {advice}")
    return None


def _record(run: Run, state: str, error: Exception) -> None:
    """A disk too full for the record must not hide what it is about, nor a lost process why it ended."""
    if isinstance(error, ConnectionLost) and (run.read_json("status.json") or {}).get("state") == "failed":
        return
    with suppress(MachineError):
        run.status(state, error.exit_code if isinstance(error, AdaptkitError) else 1, str(error), error)


def record_leaving(run: Run) -> None:
    """A second signal ends the process at once; what another process or the end of the run wrote stays."""
    if (run.read_json("status.json") or {}).get("state") == "running":
        message = f"left at once at a second signal; go on with: adaptkit resume {run.path}"
        run.status("interrupted", Interrupted.exit_code, message)


def exit_code(report: dict[str, Any]) -> int:
    if report["verdict"] == "collapsed":
        return Collapsed.exit_code  # wins over a gain that was not met
    asked = report["require_gain"]
    return GainNotMet.exit_code if asked and not asked["met"] else 0
