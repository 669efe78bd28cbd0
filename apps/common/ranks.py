"""The processes of one run: which device each takes, and how they agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from apps.common.errors import BadInput

TIMEOUT = timedelta(hours=3)  # rank 0 may evaluate or write for long


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. ``torchrun`` sets the numbers; without it there is one process."""

    rank: int
    size: int
    local: int
    device: torch.device
    talk: Any = None
    """A gloo group: small host-side messages that never wait for the GPU."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, message: str = "") -> None:
        if self.first:
            print(message, flush=True)

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        if self.size == 1:
            return flag
        verdict = torch.tensor(int(flag))
        dist.all_reduce(verdict, dist.ReduceOp.MAX, group=self.talk)
        return bool(verdict)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.talk)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on rank 0; the others get nothing."""
        if self.size == 1:
            return [value]
        box: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, box, 0, group=self.talk)
        return box or []

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Bad input that one rank meets inside is raised on all of them. Nothing inside may wait for another rank."""
        mistake = None
        try:
            yield
        except BadInput as error:
            mistake = str(error)
        if self.size > 1:
            mistakes: list[str | None] = [None] * self.size
            dist.all_gather_object(mistakes, mistake, group=self.talk)
            mistake = next((each for each in mistakes if each is not None), None)
        if mistake is not None:
            raise BadInput(mistake)


def start(device: str) -> Ranks:
    """Joins the other processes: nccl on CUDA, gloo elsewhere."""
    rank, size, local, local_size = (
        _environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    chosen = choose_device(device, local, local_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return Ranks(rank, size, local, chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(rank, size, local, chosen, dist.new_group(backend="gloo", timeout=TIMEOUT))


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _environment(name: str) -> int:
    return int(os.environ.get(name, "1" if name.endswith("SIZE") else "0"))


def choose_device(device: str, local: int, local_size: int) -> torch.device:
    """``--device``: empty, ``cpu``, ``mps``, ``cuda:0``, or one CUDA index per process, as ``0,1``."""
    wanted = device.strip().lower()
    if wanted in ("cpu", "mps"):
        if wanted == "mps" and not torch.backends.mps.is_available():
            raise BadInput("--device: no mps device here, got mps; use --device cpu")
        if wanted == "mps" and local_size > 1:
            raise BadInput(f"--device: mps runs one process, got {local_size}; start it without torchrun")
        return torch.device(wanted)
    if not wanted:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        wanted = ",".join(str(i) for i in range(local_size))
    indices = wanted.removeprefix("cuda:").split(",")
    if not all(index.isdecimal() for index in indices):
        raise BadInput(f"--device: unknown device, got {device}; use cpu, mps, cuda:0 or indices such as 0,1")
    if not torch.cuda.is_available():
        raise BadInput(f"--device: no CUDA device here, got {device}; use --device cpu")
    if len(indices) != local_size or len(set(indices)) != len(indices):
        do = f"start with torchrun --nproc_per_node {len(indices)}, or give {local_size} different indices"
        raise BadInput(f"--device: one CUDA device per process, got {device} for {local_size}; {do}")
    highest = max(int(index) for index in indices)  # of all ranks: rank 0 speaks, and would wait for the others
    if highest >= torch.cuda.device_count():
        raise BadInput(f"--device: {torch.cuda.device_count()} CUDA devices here, got index {highest}; count from 0")
    return torch.device("cuda", int(indices[local]))
