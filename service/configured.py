"""The sandbox that the configuration and the command line ask for together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bulkhead.sandbox import SandboxOptions
from bulkhead.service.config import Config


def sandbox_options(config: Config, state_dir: Path, wasmtime: Path | None) -> SandboxOptions:
    """The configuration's sandbox; `wasmtime`, if given, instead of its own choice."""
    options = config.sandbox_options(state_dir)
    return replace(options, wasmtime=wasmtime) if wasmtime is not None else options
