"""The layers that isolate a run from the host: their names, and which of them work here."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.spawner import PROGRAM


class Layer(IntFlag):
    """One wall around a run. The numbers are those of native/confine.h."""

    LIMITS = 1
    """Resource limits and a timer of CPU time, set by the kernel's own means."""
    NO_NEW_PRIVS = 2
    """Nothing that it executes can raise its privileges."""
    NAMESPACES = 4
    """Its own users, processes, network, IPC, host name and mounts, all empty."""
    CAPABILITIES = 8
    """It has none, not even where the service is root."""
    EMPTY_ROOT = 16
    """Its root directory is empty."""
    LANDLOCK = 32
    """It may open no file."""
    SECCOMP = 64
    """It may make a few dozen system calls; any other kills it."""


NO_LAYERS = Layer(0)
NAMES = {layer.name.lower().replace("_", "-"): layer for layer in Layer if layer.name}
"""As configuration and people write them."""
_PROBE_SECONDS = 20.0


def parse_layers(names: Iterable[str]) -> Layer:
    """Raises ValueError, naming what there is."""
    layers = Layer(0)
    for name in names:
        if name not in NAMES:
            raise ValueError(f"there is no isolation layer {name!r}; there are {', '.join(NAMES)}")
        layers |= NAMES[name]
    return layers


def names_of(layers: int) -> list[str]:
    """The names of the layers that are set."""
    return [name for name, layer in NAMES.items() if layer & layers]


@dataclass(frozen=True, slots=True)
class LayerFinding:
    """Whether a layer works on this machine, for this user."""

    layer: Layer
    name: str
    obstacle: str
    """What stands in its way; empty where it works."""

    @property
    def works(self) -> bool:
        return not self.obstacle


def find_layers() -> list[LayerFinding]:
    """Tries each layer in a process of its own. Takes some milliseconds. Raises SandboxError."""
    try:
        done = subprocess.run(
            [str(PROGRAM), "--isolation"], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"cannot find out what isolation works here: {error}") from error
    by_layer = {layer: name for name, layer in NAMES.items()}
    findings = []
    for line in done.stdout.splitlines():
        number, word, *rest = line.split(" ", 2)
        layer = Layer(int(number))
        findings.append(LayerFinding(layer, by_layer[layer], "" if word == "yes" else " ".join(rest)))
    return findings


def require_layers(required: Layer, working: int) -> None:
    """Raises SandboxError, with what stands in the way, if a required layer does not work here."""
    missing = required & ~working
    if not missing:
        return
    obstacles = {finding.layer: finding.obstacle for finding in find_layers()}
    told = [f"{name} ({obstacles.get(NAMES[name]) or 'not available'})" for name in names_of(missing)]
    raise SandboxError(
        f"isolation that is required does not work here: {', '.join(told)}; "
        "`bulkhead doctor` has more; allow it on this host, or take it out of isolation.require"
    )
