"""What a module is: its digest, its ABI, what it imports and exports, and whether we can run it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import msgspec

from bulkhead.sandbox.errors import InvalidModule, InvalidModuleReason, UnknownModule
from bulkhead.sandbox.limits import Limits, format_quantity
from bulkhead.sandbox.wasi import WASI_FUNCTIONS, WASI_MODULE
from bulkhead.sandbox.wasm import (
    ExternKind,
    MemoryType,
    TableType,
    WasmExport,
    WasmImport,
    WasmModule,
    parse,
    shown,
)

MAX_RUNNABLE_TABLES = 8  # compilers emit one; reference types add one or two. For `-W max-tables`.
MAX_KUBEWARDEN_METADATA_BYTES = 1 << 20  # real ones are a few KiB

KUBEWARDEN_METADATA_SECTION = "io.kubewarden.metadata"

ENTRY_POINT_SIGNATURE = "() -> ()"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_K8S_WASM_ENTRY_POINTS = frozenset({"authn", "authz", "validate"})
_OPA_ENTRY_POINTS = frozenset({"opa_eval", "eval"})
_SHOWN_EXPORTS = 10

# Whoever exports one of these means it to be called; any other type is a mistake in the build.
# The runtime calls `_initialize` first and unasked, and prefers the export without a name to
# `_start`: of another type, the first fails every run, and the second's result goes to stdout.
_CALLED_BY_NAME = _K8S_WASM_ENTRY_POINTS | {"_start"}
_CALLED_UNASKED = frozenset({"_initialize", ""})


class Abi(StrEnum):
    """How a module wants to be called."""

    K8S_WASM = "k8s-wasm"
    WASI_COMMAND = "wasi-command"
    WASI_REACTOR = "wasi-reactor"
    KUBEWARDEN_WAPC = "kubewarden-wapc"
    KUBEWARDEN_WASI = "kubewarden-wasi"
    OPA = "opa"
    GATEKEEPER = "gatekeeper"


# The values of `executionMode` in Kubewarden's metadata.
_EXECUTION_MODES = {
    "kubewarden-wapc": Abi.KUBEWARDEN_WAPC,
    "wasi": Abi.KUBEWARDEN_WASI,
    "opa": Abi.OPA,
    "gatekeeper": Abi.GATEKEEPER,
}

# Host modules of ABIs that we know of and cannot serve.
_UNSUPPORTED_ABIS = {
    Abi.KUBEWARDEN_WAPC: "Kubewarden waPC policies are",
    Abi.KUBEWARDEN_WASI: "host calls of Kubewarden policies are",
    Abi.OPA: "Rego (OPA) policies are",
    Abi.GATEKEEPER: "Rego (Gatekeeper) policies are",
}
_IMPORT_HINTS = {
    "wasi_unstable": f"; it was built for an older WASI: build it for {WASI_MODULE} (target wasm32-wasip1)",
    "wasi": "; threads are not supported: build it without",
    "env": "; a symbol may be undefined in the build",
}


@dataclass(frozen=True, slots=True)
class Import:
    """What a module wants from its host. The names are the module's own: escape before printing."""

    module: str
    name: str
    kind: ExternKind
    signature: str
    """`(i32, i32) -> (i32)`, `1 or more pages`, `funcref, 4 to 4`, `mut i32`."""


@dataclass(frozen=True, slots=True)
class Export:
    """What a module offers. The name is the module's own: escape before printing."""

    name: str
    kind: ExternKind
    signature: str
    """As for imports; empty for a global that the module defines itself."""
    runnable: bool
    """A run can call it: a function that takes and returns nothing, and is not `_initialize`."""


@dataclass(frozen=True, kw_only=True)
class ModuleInfo:
    """All that we know of a module without running it."""

    digest: str
    """`sha256:` and 64 hexadecimal digits."""
    size_bytes: int
    abi: Abi
    imports: tuple[Import, ...]
    exports: tuple[Export, ...]
    tables: tuple[TableType, ...]
    """Imported ones first, then the module's own; so for the memories."""
    memories: tuple[MemoryType, ...]
    kubewarden_metadata: bytes | None
    """JSON as the module carries it, checked to be an object; `read_kubewarden_metadata` reads it."""

    @cached_property
    def _exports_by_name(self) -> Mapping[str, Export]:
        return {export.name: export for export in self.exports}

    def require_entry_point(self, name: str) -> None:
        """Checks that a run can call the export `name`.

        Raises InvalidModule with NO_ENTRY_POINT or WRONG_SIGNATURE.
        """
        export = self._exports_by_name.get(name)
        if export is None:
            raise InvalidModule(
                InvalidModuleReason.NO_ENTRY_POINT,
                f"the module has no export {shown(name)}; {self._what_can_run()}",
            )
        if export.runnable:
            return
        if name == "_initialize":
            raise InvalidModule(
                InvalidModuleReason.NO_ENTRY_POINT,
                f"'_initialize' prepares a module and is not an entry point; {self._what_can_run()}",
            )
        raise _wrong_signature(export)

    def _what_can_run(self) -> str:
        names = [shown(export.name) for export in self.exports if export.runnable]
        if not names:
            return f"nothing it exports can run: it needs an exported function {ENTRY_POINT_SIGNATURE}"
        more = ", …" if len(names) > _SHOWN_EXPORTS else ""
        return f"it can run {', '.join(names[:_SHOWN_EXPORTS])}{more}"


def digest_of(data: bytes) -> str:
    """The name under which a module is stored: `sha256:<64 hex digits>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def parse_digest(text: str) -> str:
    """Returns `text` if it is a digest as `digest_of` writes it; only then may a path hold it.

    Raises UnknownModule if it is not: no module can have that name.
    """
    if _DIGEST.fullmatch(text) is None:
        raise UnknownModule(
            f"{shown(text)} is not a module digest; expected sha256: and 64 lowercase hexadecimal digits"
        )
    return text


def describe(data: bytes, *, max_bytes: int) -> ModuleInfo:
    """Reads what a module is, of any ABI, whether or not we can run it.

    Raises InvalidModule with TOO_LARGE, or for a file that is not a readable module (`wasm.parse`).
    """
    if len(data) > max_bytes:
        raise InvalidModule(
            InvalidModuleReason.TOO_LARGE,
            f"the module has {len(data)} bytes; at most {format_quantity(max_bytes)} are allowed",
        )
    module = parse(data)
    metadata = _find_metadata(module, data)
    return ModuleInfo(
        digest=digest_of(data),
        size_bytes=len(data),
        abi=_detect_abi(module, metadata),
        imports=tuple(_describe_import(each) for each in module.imports),
        exports=tuple(_describe_export(each) for each in module.exports),
        tables=module.tables,
        memories=module.memories,
        kubewarden_metadata=metadata,
    )


def check_runnable(info: ModuleInfo, maximum: Limits) -> None:
    """Checks that the runtime can start the module under the largest limits of this server.

    Raises InvalidModule with UNKNOWN_IMPORT, NO_MEMORY, UNSUPPORTED_FEATURE, LIMIT,
    WRONG_SIGNATURE or NO_ENTRY_POINT. What only compiling can find is not found here.
    """
    _check_imports(info)
    check_fits(info, maximum)
    _check_entry_points(info)


def check_fits(info: ModuleInfo, limits: Limits) -> None:
    """Checks that a module can start under these limits; all else about it was checked before.

    Raises InvalidModule with NO_MEMORY, UNSUPPORTED_FEATURE or LIMIT.
    """
    _check_memory(info, limits)
    _check_tables(info, limits)


def read_kubewarden_metadata(raw: bytes) -> dict[str, object]:
    """Reads the content of the custom section `io.kubewarden.metadata`.

    Raises InvalidModule with MALFORMED if it is not one JSON object, or LIMIT if it is too large.
    """
    if len(raw) > MAX_KUBEWARDEN_METADATA_BYTES:
        raise InvalidModule(
            InvalidModuleReason.LIMIT,
            f"the Kubewarden metadata has {len(raw)} bytes; "
            f"at most {format_quantity(MAX_KUBEWARDEN_METADATA_BYTES)} are allowed",
        )
    try:
        metadata = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise _malformed_metadata(f"it is not JSON: {problem}") from None
    if not isinstance(metadata, dict):
        raise _malformed_metadata("expected a JSON object")
    return metadata


def _malformed_metadata(problem: str) -> InvalidModule:
    return InvalidModule(
        InvalidModuleReason.MALFORMED,
        f"malformed Kubewarden metadata (custom section {KUBEWARDEN_METADATA_SECTION}): {problem}",
    )


def _find_metadata(module: WasmModule, data: bytes) -> bytes | None:
    sections = [each for each in module.custom_sections if each.name == KUBEWARDEN_METADATA_SECTION]
    if not sections:
        return None
    if len(sections) > 1:  # which one counts would depend on the reader
        raise _malformed_metadata(f"the module has {len(sections)} such sections")
    section = sections[0]
    return data[section.offset : section.offset + section.size_bytes]


def _detect_abi(module: WasmModule, metadata: bytes | None) -> Abi:
    if metadata is not None:
        return _declared_abi(metadata)
    functions = {export.name for export in module.exports if export.kind is ExternKind.FUNCTION}
    if "__guest_call" in functions and any(each.module == "wapc" for each in module.imports):
        return Abi.KUBEWARDEN_WAPC
    if functions & _OPA_ENTRY_POINTS and any(
        each.module == "env" and each.name.startswith("opa_") for each in module.imports
    ):
        return Abi.OPA  # Gatekeeper's look the same: only metadata or a configuration can tell
    if functions & _K8S_WASM_ENTRY_POINTS:
        return Abi.K8S_WASM
    return Abi.WASI_COMMAND if "_start" in functions else Abi.WASI_REACTOR


def _declared_abi(metadata: bytes) -> Abi:
    mode = read_kubewarden_metadata(metadata).get("executionMode")
    if mode is None:
        return Abi.KUBEWARDEN_WAPC  # Kubewarden's own default
    if isinstance(mode, str) and mode in _EXECUTION_MODES:
        return _EXECUTION_MODES[mode]
    expected = ", ".join(_EXECUTION_MODES)
    written = shown(mode) if isinstance(mode, str) else f"of type {type(mode).__name__}"
    raise _malformed_metadata(f"executionMode is {written}; expected one of {expected}")


def _describe_import(each: WasmImport) -> Import:
    return Import(each.module, each.name, each.kind, str(each.type))


def _describe_export(each: WasmExport) -> Export:
    signature = "" if each.type is None else str(each.type)
    runnable = (
        each.kind is ExternKind.FUNCTION and signature == ENTRY_POINT_SIGNATURE and each.name != "_initialize"
    )
    return Export(each.name, each.kind, signature, runnable)


def _check_imports(info: ModuleInfo) -> None:
    for each in info.imports:
        if each.module == WASI_MODULE and each.kind is ExternKind.FUNCTION:
            expected = WASI_FUNCTIONS.get(each.name)
            if expected == each.signature:
                continue
            if expected is not None:
                raise _unknown_import(each, f"; there it has the signature {expected}")
        raise _unknown_import(each, _import_hint(info, each))


def _import_hint(info: ModuleInfo, each: Import) -> str:
    if each.module != WASI_MODULE and info.abi in _UNSUPPORTED_ABIS:
        return f"; {_UNSUPPORTED_ABIS[info.abi]} not supported by this version"
    return _IMPORT_HINTS.get(each.module, "")


def _unknown_import(each: Import, hint: str) -> InvalidModule:
    return InvalidModule(
        InvalidModuleReason.UNKNOWN_IMPORT,
        f"the module imports {each.kind} {shown(each.name)} of {shown(each.module)} as {each.signature}, "
        f"and a module can only import the functions of {WASI_MODULE}{hint}",
    )


def _check_memory(info: ModuleInfo, maximum: Limits) -> None:
    if len(info.memories) > 1:
        raise InvalidModule(
            InvalidModuleReason.UNSUPPORTED_FEATURE,
            f"the module has {len(info.memories)} memories, and more than one (multi-memory) is switched off",
        )
    if not any(each.name == "memory" and each.kind is ExternKind.MEMORY for each in info.exports):
        raise InvalidModule(
            InvalidModuleReason.NO_MEMORY,
            "the module does not export its memory as 'memory', and WASI cannot read or write without it",
        )
    needed = info.memories[0].minimum_bytes
    if needed > maximum.memory_bytes:
        raise InvalidModule(
            InvalidModuleReason.LIMIT,
            f"the module needs a memory of {format_quantity(needed)} to start; "
            f"this server allows at most {format_quantity(maximum.memory_bytes)}",
        )


def _check_tables(info: ModuleInfo, maximum: Limits) -> None:
    if len(info.tables) > MAX_RUNNABLE_TABLES:
        raise InvalidModule(
            InvalidModuleReason.LIMIT,
            f"the module has {len(info.tables)} tables; at most {MAX_RUNNABLE_TABLES} are allowed",
        )
    needed = max((table.minimum for table in info.tables), default=0)
    if needed > maximum.table_elements:
        raise InvalidModule(
            InvalidModuleReason.LIMIT,
            f"the module needs a table of {needed} elements to start; "
            f"this server allows at most {maximum.table_elements}",
        )


def _check_entry_points(info: ModuleInfo) -> None:
    for export in info.exports:
        if export.name in _CALLED_BY_NAME and not export.runnable:
            raise _wrong_signature(export)
        if (
            export.name in _CALLED_UNASKED
            and export.kind is ExternKind.FUNCTION
            and export.signature != ENTRY_POINT_SIGNATURE
        ):
            raise _wrong_signature(export)
    if not any(export.runnable for export in info.exports):
        raise InvalidModule(
            InvalidModuleReason.NO_ENTRY_POINT,
            "the module exports nothing that can run: "
            f"it needs an exported function {ENTRY_POINT_SIGNATURE}, "
            "such as _start, authn, authz or validate",
        )


def _wrong_signature(export: Export) -> InvalidModule:
    actual = export.signature if export.kind is ExternKind.FUNCTION else f"a {export.kind}"
    return InvalidModule(
        InvalidModuleReason.WRONG_SIGNATURE,
        f"the export {shown(export.name)} is {actual}; to be run it must be a function "
        f"{ENTRY_POINT_SIGNATURE}: input comes on stdin and the result goes to stdout",
    )
