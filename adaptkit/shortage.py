"""Which exceptions mean that memory ran out, and what the user is told then. Imports no torch."""

from __future__ import annotations

import sys

from adaptkit.errors import DeviceMemoryError, MachineError

LESS_MEMORY = "--set micro_batch=N, --set grad_checkpointing=true or a lower --batch-size"
OF_THE_GPU = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
OF_THE_MACHINE = ("DefaultCPUAllocator: can't allocate memory", "not enough memory")


def shortage(error: BaseException) -> DeviceMemoryError | MachineError | None:
    """The error to raise instead if `error` says that memory ran out: the GPU's, this process's or a worker's."""
    torch, text = sys.modules.get("torch"), str(error)
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return DeviceMemoryError(f"out of GPU memory; use {LESS_MEMORY}")
    if isinstance(error, MemoryError):
        return MachineError(f"the machine ran out of memory; lower --workers, or use {LESS_MEMORY}")
    if not isinstance(error, RuntimeError):
        return None
    if any(words in text for words in OF_THE_GPU):
        return DeviceMemoryError(f"out of GPU memory; use {LESS_MEMORY}")
    if any(words in text for words in OF_THE_MACHINE):
        return MachineError(f"the machine ran out of memory; use {LESS_MEMORY}")
    if "DataLoader worker" in text:  # killed, perhaps by the system
        return MachineError("a loader process was killed, perhaps for want of memory; lower --workers or --batch-size")
    return None
