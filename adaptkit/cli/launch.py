"""Several GPUs on one machine: how many processes, starting them with Accelerate's launcher, and how that ended.

The first process makes the run and becomes the launcher; the processes it starts are `adaptkit resume RUN`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import click

from adaptkit.errors import Interrupted, MachineError, UsageError
from adaptkit.owner import is_alive_elsewhere
from adaptkit.signals import AGAIN_SECONDS, STOP_SECONDS, heeded_signals

if TYPE_CHECKING:
    from adaptkit.run import Run

# what every launcher of PyTorch processes sets, and what Accelerate's sets for a single process too
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_DYNAMO_MODE")
TRUE = ("1", "true", "t", "yes", "y", "on")  # as Accelerate reads them

gpus_option = click.option(
    "--gpus",
    type=click.IntRange(min=0),
    metavar="N",
    help="How many of the visible GPUs to use, one process each; 0: the CPU.  [default: all; resume: as before]",
)


def is_launched() -> bool:
    """Whether a launcher started this process, as one of several or alone."""
    return any(name in os.environ for name in LAUNCHED)


def check_gpus(gpus: int | None) -> None:
    """Before a run directory is made: can that many GPUs be used? With 0 they are hidden from this process.

    Raises `UsageError`. Imports torch only where a number above 0 is asked for.
    """
    if is_launched():
        if gpus is not None:
            raise UsageError("--gpus: a launcher started this process and decides how many there are; leave it out")
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # set by srun for its tasks, not for a batch script
    if tasks != "1":
        raise UsageError(
            f"this is one of {tasks} SLURM tasks that know nothing of each other; "
            "start one task on each node, with a launcher: see examples/slurm"
        )
    if gpus == 0:
        os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    elif gpus is not None and gpus > (visible := visible_gpus()):
        raise UsageError(f"--gpus {gpus}: {visible} visible here; lower it, or see what CUDA_VISIBLE_DEVICES hides")


def visible_gpus() -> int:
    """Only torch knows: it may be built without CUDA, or without the kernels, that the driver offers."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE:
        return 0
    import torch

    return torch.cuda.device_count()


def processes_here(gpus: int | None = None) -> int | None:
    """How many processes a new run would have on this machine; None under a launcher, which decides. Imports torch."""
    return None if is_launched() else max(1, visible_gpus() if gpus is None else gpus)


def count_processes(run: Run, gpus: int | None) -> int:
    """How many processes the run needs on this machine; 1: this one does the work itself. Imports torch.

    A run that is resumed gets as many as it began with, if there are GPUs for them; else as many as its batch can be
    divided among. `check_gpus` has passed.
    """
    if is_launched():
        return 1
    before = (run.read_json("manifest.json") or {}).get("num_processes")
    if gpus is not None or not isinstance(before, int):
        return processes_here(gpus) or 1
    visible = visible_gpus()
    if before <= visible:
        return max(1, before)
    return next((count for count in range(visible, 1, -1) if run.recipe.batch_size % count == 0), 1)


def launch(run: Run, num_processes: int, options: Sequence[str] = ()) -> int:
    """Let that many processes of this machine do what is left of the run; returns the exit code it ended with.

    They print for themselves. Raises `MachineError` if one was killed before it could say why.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    _quieten()
    # the handlers are ours: of a burst of signals the launcher's own would let all but the first end it
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGQUIT")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", f"{STOP_SECONDS:.0f}")
    words = ["-m", "adaptkit", "resume", str(run.path), *options]
    arguments = launch_command_parser().parse_args([*_how(num_processes), *words])
    failures: Mapping[int, ProcessFailure] = {}
    with Relay(SignalException) as relay:
        try:
            launch_command(arguments)
        except ChildFailedError as error:
            failures = error.failures
        except SignalException:
            pass
    return _ending(run, {rank: failure.exitcode for rank, failure in failures.items()}, relay.since is not None)


def _how(num_processes: int) -> list[str]:
    """Everything said, so that nothing is taken from a file that `accelerate config` wrote."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus // num_processes))
    how = ["--multi_gpu", "--num_processes", str(num_processes), "--num_machines", "1", "--gpu_ids", "all"]
    how += ["--main_process_port", "0", "--num_cpu_threads_per_process", threads]  # port 0: any that is free
    return [*how, "--mixed_precision", "no", "--dynamo_backend", "no"]


def _quieten() -> None:
    """The processes say themselves what is wrong; pages about which of them ended first would bury it."""
    logger = logging.getLogger("torch.distributed")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False


class Relay:
    """While active, a signal to stop reaches the launcher, which passes it on and waits; again after 2 seconds."""

    def __init__(self, error: type[Any]) -> None:
        self.error = error
        self.since: float | None = None

    def __enter__(self) -> Relay:
        self.previous = {number: signal.signal(number, self._handle) for number in heeded_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.since is not None and time.monotonic() - self.since <= AGAIN_SECONDS:
            return
        self.since = time.monotonic()
        raise self.error(f"signal {number}", signal.Signals(number))


def _ending(run: Run, exit_codes: Mapping[int, int], stopped: bool) -> int:
    """What `status.json` says, as launchers know only that something failed; if nobody could write it, what is known.

    `exit_codes`: of the processes that failed, by number; negative: the signal that killed it.
    """
    from adaptkit.run import RUNNING, read_status

    status = read_status(run.path)
    if status.get("state") != RUNNING:
        code = status.get("exit_code")
        return code if isinstance(code, int) else 1
    if stopped:
        if not is_alive_elsewhere(status):
            message = f"stopped before the state was saved; go on with: adaptkit resume {run.path}"
            run.status("interrupted", Interrupted.exit_code, message)
        return Interrupted.exit_code
    for rank, code in exit_codes.items():
        if code < 0 and code != -signal.SIGTERM:  # which the launcher sends to those that are left
            name = signal.Signals(-code).name
            advice = f"go on with `adaptkit resume {run.path}`"
            raise MachineError(f"process {rank} was killed ({name}), perhaps for want of memory; {advice}")
    code = next((code for code in exit_codes.values() if code > 0), 1)
    if not is_alive_elsewhere(status):  # else the run is another's, which it said
        run.status("failed", code, f"a process ended with exit code {code}")
    return code
