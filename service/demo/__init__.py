"""The demo: a configuration with the four magic modules, shipped with the package."""

from __future__ import annotations

from pathlib import Path

CONFIGURATION = Path(__file__).with_name("bulkhead.yaml")
"""An ordinary configuration file; the modules lie next to it."""
