"""Bulkhead: Kubernetes webhook decisions by WebAssembly modules, a process per run."""

from importlib.metadata import version

__version__ = version("bulkhead")
