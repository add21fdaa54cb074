"""What can go wrong in the sandbox layer, by whose fault it was.

A guest that fails is not here: that is an `Outcome`, which is data.
"""

from __future__ import annotations

from enum import StrEnum


class InvalidModuleReason(StrEnum):
    """Why a module was refused. Part of the API: gRPC clients see these words."""

    NOT_WASM = "NOT_WASM"  # no WebAssembly magic, or another version (WAT text, a component)
    TOO_LARGE = "TOO_LARGE"
    MALFORMED = "MALFORMED"
    UNSUPPORTED_FEATURE = "UNSUPPORTED_FEATURE"  # a proposal that is switched off
    LIMIT = "LIMIT"  # asks for more memory, tables, … than any run can have
    UNKNOWN_IMPORT = "UNKNOWN_IMPORT"
    NO_ENTRY_POINT = "NO_ENTRY_POINT"
    WRONG_SIGNATURE = "WRONG_SIGNATURE"
    NO_MEMORY = "NO_MEMORY"  # WASI needs an exported memory
    COMPILE_LIMIT = "COMPILE_LIMIT"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    NOT_RUNNABLE = "NOT_RUNNABLE"  # all of the above is well, and the runtime does not start it


class InvalidModule(Exception):
    """The module cannot be run, and never will be. Fault of whoever brought it.

    The text names what is wrong and holds nothing of the host.
    """

    def __init__(self, reason: InvalidModuleReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnknownModule(LookupError):
    """No module of that digest or name. Fault of the caller."""


class InvalidRequest(ValueError):
    """Limits or arguments that no run can have. Fault of the caller."""


class Overloaded(Exception):
    """Too many runs at once: nothing was started. Try later."""


class DeadlinePassed(Exception):
    """The caller's deadline came before the run could be started."""


class SandboxError(Exception):
    """We could not run the guest, or do not know how it ended. Fault of the host.

    The text may name paths of the host: log it, never send it to a client.
    """
