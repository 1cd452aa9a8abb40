"""Processes that train one network together, as `torchrun` starts them; usually there is one.

Every process simulates its own volumes and takes its own batches; the gradients are averaged, so
that all hold the same weights. The first one validates and writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LEADS = RANK == 0


def join(device: str) -> str:
    """Meet the other processes; the device that this one works on (`cuda` becomes `cuda:1`)."""
    if SIZE == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def average(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their mean over all processes."""
    if SIZE > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= SIZE


def wait() -> None:
    """Until all processes are here."""
    if SIZE > 1:
        dist.barrier()
