"""Running one WebAssembly module once, in a process of its own.

Knows modules, limits and processes; knows nothing of Kubernetes or gRPC. What is imported here is
the public list; everything else is free to change.
"""

from bulkhead.sandbox.errors import (
    DeadlinePassed,
    InvalidModule,
    InvalidModuleReason,
    InvalidRequest,
    Overloaded,
    SandboxError,
    UnknownModule,
)
from bulkhead.sandbox.limits import Limits, format_quantity, largest, parse_duration, parse_quantity
from bulkhead.sandbox.module import Abi, ModuleInfo, check_runnable, describe, digest_of, parse_digest
from bulkhead.sandbox.outcome import Outcome, RunResult, Usage
from bulkhead.sandbox.sandbox import Sandbox, SandboxOptions
from bulkhead.sandbox.store import ModuleStore, StoreFull
from bulkhead.sandbox.wasmtime import Runtime

__all__ = [
    "Abi",
    "DeadlinePassed",
    "InvalidModule",
    "InvalidModuleReason",
    "InvalidRequest",
    "Limits",
    "ModuleInfo",
    "ModuleStore",
    "Outcome",
    "Overloaded",
    "RunResult",
    "Runtime",
    "Sandbox",
    "SandboxError",
    "SandboxOptions",
    "StoreFull",
    "UnknownModule",
    "Usage",
    "check_runnable",
    "describe",
    "digest_of",
    "format_quantity",
    "largest",
    "parse_digest",
    "parse_duration",
    "parse_quantity",
]
