"""Connections spread over the workers that accept from one socket.

Whoever wakes first could take them all, and keep them: kube-apiserver opens few connections, for long.
So each worker says in memory that all of them see how many it holds, and one that holds more than
another lets that one go first. Where it stays ahead, because the other one is new, it ends some.
"""

from __future__ import annotations

import mmap
import os

_MISSING = 2**31 - 1
_ENTRY_BYTES = 4


class Balance:
    """A number of connections for each worker. Each entry has one writer at a time, and all read all."""

    def __init__(self, fd: int) -> None:
        """Takes the descriptor over."""
        self.fd = fd
        self._counts = memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("i")

    @classmethod
    def of(cls, workers: int) -> Balance:
        """A new one, in which all workers are missing."""
        fd = os.memfd_create("bulkhead-balance", os.MFD_CLOEXEC)
        os.ftruncate(fd, workers * _ENTRY_BYTES)
        balance = cls(fd)
        for index in range(workers):
            balance.retire(index)
        return balance

    def hold(self, index: int, connections: int) -> None:
        """A worker holds so many, and accepts."""
        self._counts[index] = connections

    def retire(self, index: int) -> None:
        """A worker accepts no more: nobody waits for it."""
        self._counts[index] = _MISSING

    def lead(self, index: int) -> int:
        """How many more a worker holds than the one that holds fewest; 0 where that is itself."""
        return max(0, self._counts[index] - min(self._counts))

    def close(self) -> None:
        # The memory goes with the last view of it.
        os.close(self.fd)


class Share:
    """One worker's part in a balance."""

    def __init__(self, balance: Balance, index: int) -> None:
        self._balance = balance
        self._index = index

    @classmethod
    def all(cls) -> Share:
        """That of a worker without others."""
        return cls(Balance.of(1), 0)

    def hold(self, connections: int) -> None:
        self._balance.hold(self._index, connections)

    def retire(self) -> None:
        self._balance.retire(self._index)

    @property
    def lead(self) -> int:
        return self._balance.lead(self._index)


def part(total: int, index: int, parts: int) -> int:
    """What one of several gets, so that all together have the total."""
    return total // parts + (index < total % parts)
