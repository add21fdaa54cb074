"""Processes that do not outlive the tests."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def mortal(command: Sequence[str]) -> list[str]:
    """The command, killed by the kernel when the thread that starts it ends, in whatever way.

    Tests end what they start; this is for test runs that are killed themselves. Where there is no
    `setpriv` (util-linux) it is the command alone.
    """
    setpriv = shutil.which("setpriv")
    return [*([setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []), *command]
