"""Running one WebAssembly module once, in a process of its own.

Knows modules, limits and processes; knows nothing of Kubernetes or gRPC. What is imported here is
the public list; everything else is free to change.
"""

from bulkhead.sandbox.cpus import usable_cpus
from bulkhead.sandbox.errors import (
    DeadlinePassed,
    InvalidModule,
    InvalidModuleReason,
    InvalidRequest,
    Overloaded,
    SandboxError,
    UnknownModule,
)
from bulkhead.sandbox.isolation import NAMES as LAYER_NAMES
from bulkhead.sandbox.isolation import Layer, LayerFinding, find_layers, names_of, parse_layers
from bulkhead.sandbox.launcher import ZygoteNews
from bulkhead.sandbox.limits import Limits, format_quantity, largest, parse_duration, parse_quantity
from bulkhead.sandbox.module import Abi, ModuleInfo, check_runnable, describe, digest_of, parse_digest
from bulkhead.sandbox.outcome import Outcome, RunResult, Usage, Way
from bulkhead.sandbox.sandbox import Sandbox, SandboxOptions
from bulkhead.sandbox.shared_spawner import SpawnerHost
from bulkhead.sandbox.spawner_protocol import ZygoteState
from bulkhead.sandbox.store import ModuleStore, StoreFull
from bulkhead.sandbox.wasmtime import Runtime

__all__ = [
    "LAYER_NAMES",
    "Abi",
    "DeadlinePassed",
    "InvalidModule",
    "InvalidModuleReason",
    "InvalidRequest",
    "Layer",
    "LayerFinding",
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
    "SpawnerHost",
    "StoreFull",
    "UnknownModule",
    "Usage",
    "Way",
    "ZygoteNews",
    "ZygoteState",
    "check_runnable",
    "describe",
    "digest_of",
    "find_layers",
    "format_quantity",
    "largest",
    "names_of",
    "parse_digest",
    "parse_duration",
    "parse_layers",
    "parse_quantity",
    "usable_cpus",
]
