"""The processes of a run, as ``torchrun`` starts them: who this one is, what is its share, and how all agree.

Each process computes the gradient of its share of every batch; the averages, and so the weights, are equal everywhere. The
first process writes and prints. What it finds out or refuses, the others learn from it; where one fails, all end.

Gradients are averaged here and not by ``DistributedDataParallel``: that groups them anew after the first step, so that a run
of three or more processes that goes on would round differently, and it refuses models that leave parameters unused. The price
is that nothing is sent while backpropagation goes on.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # one may read data while the others wait; a process that ends is noticed at once
REACH = timedelta(minutes=5)  # for all processes to start
FAREWELL = 3.0  # seconds that the others leave the first one to say what it has to say, at most
SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset")  # of a message that another process has gone


class Elsewhere(Exception):
    """Another process has failed. It says why; the message, if there is one, is what the first process has to add."""


class Workers:
    """The processes of a run, as one of them sees them. One that is alone agrees with itself.

    Args:
        rank: The number of this process.
        size: How many there are.
        local: Its number on this machine, and that of its GPU.
        store: Where they leave notes for one another; none for one that is alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local, self._store = rank, size, local, store

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def check(self, device: torch.device) -> None:
        """Refuse a GPU that is not there.

        Raises:
            ValueError: If there are fewer of them than processes on this machine.
        """
        if self.size > 1 and device.type == "cuda" and self.local >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.rank} has no GPU: there are {torch.cuda.device_count()} here, and it is number {self.local} "
                "from 0; start fewer processes, or take --device cpu"
            )

    # Shares

    def share(self, count: int) -> tuple[slice, float]:
        """Which examples of a batch are this process's, and the weight of their mean in the average over processes.

        With these weights the average is the mean over the batch. Where there are fewer examples than processes, some take one
        that counts nothing.

        Example:
            >>> Workers(1, 3).share(7), Workers(2, 3).share(2)
            ((slice(1, None, 3), 0.8571428571428571), (slice(0, 1, None), 0.0))
        """
        mine = len(range(self.rank, count, self.size))
        return (slice(self.rank, None, self.size), mine * self.size / count) if mine else (slice(0, 1), 0.0)

    def seed(self, *numbers: int) -> int:
        """A seed from numbers and the number of this process.

        Example:
            >>> Workers(1, 2).seed(0, 7) == Workers(2, 3).seed(0, 7)
            False
        """
        words = " ".join(map(str, (self.rank, *numbers))).encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the average over all processes in the place of each gradient; one that no process has stays none."""
        if self.size == 1:
            return
        kinds: dict[Any, list[nn.Parameter]] = {}
        for p in parameters:
            if p.requires_grad:
                kinds.setdefault((p.dtype, p.device), []).append(p)
        for (dtype, device), some in kinds.items():
            there = torch.tensor([p.grad is not None for p in some], dtype=dtype, device=device)
            parts = [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in some]
            sums = torch.cat([there, *parts])
            with noticing():
                dist.all_reduce(sums)
            there, *parts = sums.split([len(some), *(p.numel() for p in some)])
            for p, has, part in zip(some, there.tolist(), parts, strict=True):
                if has:
                    p.grad = torch.empty_like(p) if p.grad is None else p.grad
                    p.grad.copy_(part.view_as(p)).div_(self.size)

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes what the first one has in these tensors."""
        if self.size == 1:
            return
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for some in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            with noticing():
                dist.broadcast(flat, 0)
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    # Agreeing

    def total(self, *numbers: float) -> list[float]:
        """Sums over all processes, added in their order: bit-equal everywhere."""
        if self.size == 1:
            return list(numbers)
        return [sum(column) for column in zip(*(t.tolist() for t in self._gather(torch.tensor(numbers).double())), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.size == 1 else self.total(float(flag))[0] > 0

    def first(self, work: Callable[[], T]) -> T:
        """What the first process finds out, all learn; the others wait meanwhile. It must be fit for JSON.

        Raises:
            Elsewhere: In the others, if it fails.
        """
        if self.size == 1:
            return work()
        if self.is_first:
            try:
                found = work()
            except BaseException:
                with contextlib.suppress(Elsewhere):
                    self._tell(None)
                raise
            self._tell([found])
            return found
        told = self._tell(None)
        if told is None:
            raise Elsewhere
        return told[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do what may fail in one process and not in another.

        Raises:
            Elsewhere: If it fails in another.
        """
        try:
            found = work()
        except BaseException:
            with contextlib.suppress(Elsewhere):
                self.any(True)
            raise
        if self.any(False):
            raise Elsewhere
        return found

    def _tell(self, words: Any) -> Any:
        """The words of the first process."""
        text = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        length = int(self._gather(torch.tensor([len(text)]))[0])
        text = text if self.is_first else torch.zeros(length, dtype=torch.uint8)
        with noticing():
            dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with noticing():
            dist.all_gather(found, tensor)
        return found

    # Ending

    def says(self, words: str) -> bool:
        """Whether this process is the first to say this, so that what all have to say is said once."""
        if self.size == 1:
            return True
        try:
            said: int = self._store.add(f"said {hashlib.blake2b(words.encode(), digest_size=16).hexdigest()}", 1)
        except RuntimeError:
            return self.is_first  # the first process kept the store, and has gone
        return said == 1

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """Go, the first process first: ``torchrun`` ends all others when one has failed, and it may still be writing."""
        if self.size == 1:
            return
        with contextlib.suppress(RuntimeError, KeyboardInterrupt):
            if self.is_first:
                self._store.set("first has gone", "")
        with contextlib.suppress(RuntimeError, KeyboardInterrupt):
            dist.destroy_process_group()  # so that those who wait for this process notice
            last = time.monotonic() + FAREWELL
            while not self._store.check(["first has gone"]) and time.monotonic() < last:
                time.sleep(0.01)


ALONE = Workers()


@contextmanager
def noticing() -> Iterator[None]:
    """Notice inside that another process has gone.

    Raises:
        Elsewhere: If so.
    """
    try:
        yield
    except RuntimeError as error:
        raise Elsewhere("another process has ended, and so does this one") from error


def is_loss(error: BaseException) -> bool:
    """Whether this means that another process has gone or failed."""
    return isinstance(error, Elsewhere) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))


def join(surroundings: Mapping[str, str] = os.environ) -> Workers:
    """The processes of this run: those that ``torchrun`` started, or this one alone.

    Raises:
        ValueError: If variables contradict one another, or the others cannot be reached.
    """
    rank, size, local = numbers_of(surroundings)
    if size == 1:
        return ALONE
    if not dist.is_available():
        raise ValueError(f"this torch has no torch.distributed, which {size} processes need; start one alone")
    cuda = torch.cuda.is_available()
    if cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=REACH)))  # type: ignore[attr-defined]  # is documented
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"process {rank} of {size} does not reach the others: {why}; start them with torchrun") from error
    return Workers(rank, size, local, store)


def numbers_of(surroundings: Mapping[str, str]) -> tuple[int, int, int]:
    """The number of this process, how many there are, and its number on this machine.

    Raises:
        ValueError: If they contradict one another, or it is not said how the others are reached.

    Example:
        >>> numbers_of({})
        (0, 1, 0)
    """
    said = {name: surroundings.get(name, default) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"))}
    said["LOCAL_RANK"] = surroundings.get("LOCAL_RANK", said["RANK"])
    for name, value in said.items():
        if not value.isdecimal():
            raise ValueError(f"{name} must be a whole number, got {value!r}; start several processes with torchrun, or unset it")
    size, rank, local = map(int, said.values())
    if size <= 1:
        return 0, 1, 0
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in surroundings]:
        raise ValueError(f"WORLD_SIZE is {size}, but {missing[0]} is not set; start several processes with torchrun, or unset it")
    if rank >= size:
        raise ValueError(f"RANK must be below WORLD_SIZE ({size}), got {rank}; start several processes with torchrun")
    return rank, size, local
