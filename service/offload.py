"""Keeps large documents from holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

# Reading a dense document takes about 15 µs for each KiB; a thread costs about 100 µs.
INLINE_BYTES = 64 << 10

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def run_sized(
    size_bytes: int, function: Callable[_P, _T], /, *arguments: _P.args, **keywords: _P.kwargs
) -> _T:
    """Calls `function`, in a thread if it has more than `INLINE_BYTES` to work on."""
    if size_bytes <= INLINE_BYTES:
        return function(*arguments, **keywords)
    return await asyncio.to_thread(function, *arguments, **keywords)
