"""Runs a function in several real processes that find each other as a launcher's do; gloo, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 120
# forked from a server that has imported everything once: started anew, each process would need seconds for it
STARTER = multiprocessing.get_context("forkserver")
STARTER.set_forkserver_preload(["adaptkit.train"])


def together(num_processes: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of the processes."""
    results = endings(num_processes, work, *arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def endings(num_processes: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns, or the error it raises, in each of the processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.pt" for rank in range(num_processes)]
        launch = [
            STARTER.Process(target=_enter, args=(rank, num_processes, port, file, work, arguments))
            for rank, file in enumerate(files)
        ]
        for process in launch:
            process.start()
        for process in launch:
            process.join(TIMEOUT)
        late = [process for process in launch if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, f"{len(late)} of {num_processes} processes wait for ever"
        assert [process.exitcode for process in launch] == [0] * num_processes
        return [torch.load(file, weights_only=False) for file in files]


def _enter(rank: int, num_processes: int, port: int, file: Path, work: Callable[..., Any], arguments: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    # Accelerate would choose a number of threads by the machine, and with it other roundings
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        result = work(*arguments)
    except Exception as error:
        result = error
    torch.save(result, file)
    if torch.distributed.is_initialized() and not isinstance(result, Exception):
        torch.distributed.destroy_process_group()
