"""Where Bulkhead keeps what it makes: modules, compiled code, certificates."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "BULKHEAD_STATE_DIR"


def state_dir(chosen: Path | None) -> Path:
    """The state directory: chosen, $BULKHEAD_STATE_DIR, $XDG_STATE_HOME/bulkhead, ~/.local/state/bulkhead."""
    if chosen is not None:
        return chosen.absolute()
    if from_environment := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(from_environment).absolute()
    if from_xdg := os.environ.get("XDG_STATE_HOME"):
        return Path(from_xdg).absolute() / "bulkhead"
    return Path.home() / ".local" / "state" / "bulkhead"
