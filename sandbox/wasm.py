"""Reads the outline of a WebAssembly module: everything but the instructions.

The bytes come from outside, so this is the first thing they meet and the cheapest: sections,
types, imports, exports and sizes are read here; function bodies, segments and initial values
are only counted, because wasmtime validates those when it compiles. Every loop is bounded by a
cap or by the bytes at hand, nothing is quadratic, and nothing but `InvalidModule` comes out.

The format: https://webassembly.github.io/spec/core/binary/modules.html
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple

from bulkhead.sandbox.errors import InvalidModule, InvalidModuleReason
from bulkhead.sandbox.limits import WASM_PAGE_BYTES

# Caps of our own, each far above what real modules have (thousands at the very most), so that
# a hostile module costs milliseconds. The ones for functions, parameters and results are wasmtime's.
MAX_TYPES = 20_000
MAX_IMPORTS = 10_000
MAX_EXPORTS = 20_000
MAX_FUNCTIONS = 1_000_000
MAX_PARAMETERS = 1_000
MAX_TABLES = 100
MAX_MEMORIES = 100
MAX_CUSTOM_SECTIONS = 1_000
MAX_NAME_BYTES = 4_096
MAX_MEMORY_PAGES = (4 << 30) // WASM_PAGE_BYTES

_MAGIC = b"\0asm"
_VERSION = b"\x01\0\0\0"
_COMPONENT = b"\x0d\0\x01\0"
_SHOWN_NAME_CHARACTERS = 80

_VALUE_TYPES = {
    0x7F: "i32",
    0x7E: "i64",
    0x7D: "f32",
    0x7C: "f64",
    0x7B: "v128",
    0x70: "funcref",
    0x6F: "externref",
}
_REFERENCE_TYPES = {0x70: "funcref", 0x6F: "externref"}
_VALUE_TYPE_BYTES = bytes(_VALUE_TYPES)

# What we refuse by name where it first shows in the binary format, with the proposal's name.
_GC = "garbage collection (gc)"
_FUNCTION_REFERENCES = "typed function references (function-references)"
_EXCEPTIONS = "exception handling (exceptions)"
_STACK_SWITCHING = "stack switching (stack-switching)"
_SHARED = "shared memory (threads)"
_MEMORY64 = "64-bit memories and tables (memory64)"
_COMPACT_IMPORTS = "the compact form of the import section (compact-imports)"
_CUSTOM_DESCRIPTORS = "custom descriptors (custom-descriptors)"
_PAGE_SIZES = "custom page sizes (custom-page-sizes)"
_TYPE_FORM_FEATURES = {
    0x4C: _CUSTOM_DESCRIPTORS,
    0x4D: _CUSTOM_DESCRIPTORS,
    0x4E: _GC,  # a recursion group
    0x4F: _GC,  # a final subtype
    0x50: _GC,  # a subtype
    0x5D: _STACK_SWITCHING,
    0x5E: _GC,  # an array
    0x5F: _GC,  # a struct
    0x65: "shared-everything threads (threads)",
}
_VALUE_TYPE_FEATURES = {
    0x63: _FUNCTION_REFERENCES,
    0x64: _FUNCTION_REFERENCES,
    0x65: "shared-everything threads (threads)",
    0x67: "reference-typed strings (stringref)",
    0x68: _STACK_SWITCHING,
    0x69: _EXCEPTIONS,
    0x6A: _GC,
    0x6B: _GC,
    0x6C: _GC,
    0x6D: _GC,
    0x6E: _GC,
    0x71: _GC,
    0x72: _GC,
    0x73: _GC,
    0x74: _EXCEPTIONS,
    0x75: _STACK_SWITCHING,
}

# A LEB128 number of at most 32 bits; the upper bound of four keeps a failing match cheap.
_LEB_U32 = re.compile(rb"[\x80-\xff]{0,4}[\x00-\x7f]")


class ExternKind(StrEnum):
    """What a module can import or export."""

    FUNCTION = "func"
    TABLE = "table"
    MEMORY = "memory"
    GLOBAL = "global"


class FunctionType(NamedTuple):
    """A signature, as the bytes of the binary format; `str()` writes `(i32, i64) -> (i32)`."""

    parameters: bytes
    results: bytes

    def __str__(self) -> str:
        parameters, results = (", ".join(_VALUE_TYPES[byte] for byte in part) for part in self)
        return f"({parameters}) -> ({results})"


@dataclass(frozen=True, slots=True)
class TableType:
    """A table's element type and size in elements."""

    element: str
    minimum: int
    maximum: int | None

    def __str__(self) -> str:
        return f"{self.element}, {_span(self.minimum, self.maximum)}"


@dataclass(frozen=True, slots=True)
class MemoryType:
    """A memory's size in pages of 64 KiB."""

    minimum_pages: int
    maximum_pages: int | None

    @property
    def minimum_bytes(self) -> int:
        return self.minimum_pages * WASM_PAGE_BYTES

    def __str__(self) -> str:
        return f"{_span(self.minimum_pages, self.maximum_pages)} pages"


@dataclass(frozen=True, slots=True)
class GlobalType:
    """A global's value type."""

    value: str
    mutable: bool

    def __str__(self) -> str:
        return f"mut {self.value}" if self.mutable else self.value


ExternType = FunctionType | TableType | MemoryType | GlobalType


class WasmImport(NamedTuple):
    """What the module wants from its host."""

    module: str
    name: str
    kind: ExternKind
    type: ExternType


class WasmExport(NamedTuple):
    """What the module offers.

    `type` is None for a global that the module defines itself: reading those would mean
    decoding the instructions that initialise them.
    """

    name: str
    kind: ExternKind
    type: ExternType | None


class CustomSection(NamedTuple):
    """Where a custom section's content lies in the file. Names may repeat."""

    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WasmModule:
    """A module's outline. Imported and own tables and memories are in `tables` and `memories`."""

    imports: tuple[WasmImport, ...]
    exports: tuple[WasmExport, ...]
    tables: tuple[TableType, ...]
    memories: tuple[MemoryType, ...]
    function_count: int
    """Imported ones included."""
    has_start: bool
    """A function runs when the module is instantiated, before any entry point."""
    custom_sections: tuple[CustomSection, ...]


def parse(data: bytes) -> WasmModule:
    """Reads a module's outline.

    Raises InvalidModule with NOT_WASM (another kind of file), MALFORMED, UNSUPPORTED_FEATURE (a
    proposal that is switched off) or LIMIT (more of something than any module needs).
    """
    _check_header(data)
    return _Parser(data).module()


def shown(name: str) -> str:
    """Quotes a name that a module chose, so that it can stand in a message or a log line.

    Control and non-ASCII characters are escaped, and long names are cut.
    """
    if len(name) > _SHOWN_NAME_CHARACTERS:
        return ascii(name[:_SHOWN_NAME_CHARACTERS]) + "…"
    return ascii(name)


def _span(minimum: int, maximum: int | None) -> str:
    return f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"


def _unsupported(feature: str) -> InvalidModule:
    return InvalidModule(
        InvalidModuleReason.UNSUPPORTED_FEATURE,
        f"the module uses {feature}, which is switched off; build it without",
    )


def _check_header(data: bytes) -> None:
    """Nothing else may reach wasmtime: it would take other files for WAT text and compile them."""
    if data[:4] == _MAGIC and data[4:8] == _VERSION:
        return
    raise InvalidModule(InvalidModuleReason.NOT_WASM, f"not a WebAssembly module: {_what_it_is(data)}")


def _what_it_is(data: bytes) -> str:
    if not data:
        return "the file is empty"
    text = data[:256].lstrip(b" \t\r\n\xef\xbb\xbf")
    if text.startswith((b"(", b";;")):
        return (
            "this looks like WebAssembly text (WAT); assemble it first, for example with `wasm-tools parse`"
        )
    if _MAGIC.startswith(data[:4]) and len(data) < 8:
        return f"the file ends after {len(data)} bytes, within the header"
    if data.startswith(_MAGIC):
        version = data[4:8]
        if version == _COMPONENT:
            return "this is a WebAssembly component; build a core module for wasm32-wasip1 instead"
        return f"version bytes {version.hex(' ')} are unknown; only version 1 is supported"
    if data.startswith(b"\x7fELF"):
        return "this is an ELF file (native code, or a precompiled module); bring the .wasm file itself"
    if data.startswith(b"\x1f\x8b"):
        return "this is a gzip file; unpack it first"
    return f"it must start with the bytes {_MAGIC.hex(' ')}, and starts with {data[:4].hex(' ')}"


class _Cursor:
    """Reads one section front to back. Running out of bytes is InvalidModule, never IndexError."""

    __slots__ = ("_at", "_content", "_section")

    def __init__(self, content: bytes, section: str) -> None:
        self._content = content
        self._section = section
        self._at = 0

    @property
    def position(self) -> int:
        return self._at

    def malformed(self, problem: str) -> InvalidModule:
        return InvalidModule(InvalidModuleReason.MALFORMED, f"malformed {self._section} section: {problem}")

    def byte(self) -> int:
        try:
            value = self._content[self._at]
        except IndexError:
            raise self.malformed("it ends too soon") from None
        self._at += 1
        return value

    def u32(self) -> int:
        first = self.byte()
        if first < 0x80:
            return first
        value = first & 0x7F
        for shift in (7, 14, 21, 28):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 32:
                    raise self.malformed("a number is larger than 32 bits")
                return value
        raise self.malformed("a number is longer than 5 bytes")

    def count(self, what: str, most: int, smallest_bytes: int) -> int:
        """The length of a list whose items take at least `smallest_bytes` each."""
        count = self.u32()
        if count > most:
            raise InvalidModule(
                InvalidModuleReason.LIMIT, f"the module has {count} {what}; at most {most} are allowed"
            )
        if count * smallest_bytes > len(self._content) - self._at:
            raise self.malformed(f"it promises {count} {what}, more than fit into it")
        return count

    def take(self, size_bytes: int) -> bytes:
        start = self._at
        piece = self._content[start : start + size_bytes]
        if len(piece) != size_bytes:
            raise self.malformed("it ends too soon")
        self._at = start + size_bytes
        return piece

    def name(self) -> str:
        size_bytes = self.u32()
        if size_bytes > MAX_NAME_BYTES:
            raise InvalidModule(
                InvalidModuleReason.LIMIT,
                f"a name in the {self._section} section has {size_bytes} bytes; "
                f"at most {MAX_NAME_BYTES} are allowed",
            )
        raw = self.take(size_bytes)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.malformed("a name is not valid UTF-8") from None

    def value_types(self) -> bytes:
        types = self.take(self.count("parameters or results in one type", MAX_PARAMETERS, 1))
        if odd := types.translate(None, _VALUE_TYPE_BYTES):
            raise self._odd_value_type(odd[0])
        return types

    def value_type(self) -> str:
        byte = self.byte()
        if byte not in _VALUE_TYPES:
            raise self._odd_value_type(byte)
        return _VALUE_TYPES[byte]

    def reference_type(self) -> str:
        byte = self.byte()
        if byte == 0x40:  # the form with an initial value, of the same proposal
            raise _unsupported(_FUNCTION_REFERENCES)
        if byte in _REFERENCE_TYPES:
            return _REFERENCE_TYPES[byte]
        if byte in _VALUE_TYPES:
            raise self.malformed(f"a table of {_VALUE_TYPES[byte]}")
        raise self._odd_value_type(byte)

    def _odd_value_type(self, byte: int) -> InvalidModule:
        if byte in _VALUE_TYPE_FEATURES:
            return _unsupported(_VALUE_TYPE_FEATURES[byte])
        return self.malformed(f"unknown value type 0x{byte:02x}")

    def table_type(self) -> TableType:
        return TableType(self.reference_type(), *self._size("table"))

    def memory_type(self) -> MemoryType:
        memory = MemoryType(*self._size("memory"))
        for pages in (memory.minimum_pages, memory.maximum_pages or 0):
            if pages > MAX_MEMORY_PAGES:
                raise InvalidModule(
                    InvalidModuleReason.LIMIT,
                    f"the module has a memory of {pages} pages; at most {MAX_MEMORY_PAGES} (4 GiB) can be",
                )
        return memory

    def _size(self, what: str) -> tuple[int, int | None]:
        flags = self.byte()
        if flags & 0b0010:
            raise _unsupported(_SHARED)
        if flags & 0b0100:
            raise _unsupported(_MEMORY64)
        if flags & 0b1000:
            raise _unsupported(_PAGE_SIZES)
        if flags > 1:
            raise self.malformed(f"unknown {what} flags 0x{flags:02x}")
        minimum = self.u32()
        if not flags:
            return minimum, None
        maximum = self.u32()
        if maximum < minimum:
            raise self.malformed(f"a {what} has a maximum of {maximum}, below its minimum of {minimum}")
        return minimum, maximum

    def global_type(self) -> GlobalType:
        value = self.value_type()
        mutability = self.byte()
        if mutability == 2:
            raise _unsupported("shared-everything threads (threads)")
        if mutability > 2:
            raise self.malformed(f"unknown mutability 0x{mutability:02x}")
        return GlobalType(value, mutable=mutability == 1)

    def rest(self) -> bytes:
        piece = self._content[self._at :]
        self._at = len(self._content)
        return piece

    def finish(self) -> None:
        if self._at != len(self._content):
            raise self.malformed(f"{len(self._content) - self._at} bytes too many")


def _decoded(type_index: int | bytes) -> int:
    """An item of the function section: a number already, or LEB128."""
    return type_index if isinstance(type_index, int) else _Cursor(type_index, "function").u32()


class _Parser:
    """Walks over the sections of one module. Made for one call of `parse`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._types: list[FunctionType] = []
        self._imports: list[WasmImport] = []
        self._exports: list[WasmExport] = []
        self._custom_sections: list[CustomSection] = []
        # The index spaces: imported ones come first.
        self._imported_functions: list[FunctionType] = []
        self._own_functions: list[bytes] | bytes = b""  # a type index each, as LEB128
        self._tables: list[TableType] = []
        self._memories: list[MemoryType] = []
        self._imported_globals: list[GlobalType] = []
        self._own_global_count = 0
        self._has_start = False
        self._body_count = 0
        self._segment_count = 0
        self._announced_segment_count: int | None = None

    def module(self) -> WasmModule:
        at, last_rank = 8, 0
        while at < len(self._data):
            section_id = self._data[at]
            start, size_bytes = self._section_extent(at + 1, section_id)
            at = start + size_bytes
            if section_id == 0:
                self._custom(start, at)
                continue
            last_rank = self._check_order(section_id, last_rank)
            name, read, counted_only = self._SECTIONS[section_id]
            # Code and data make up nearly all of a module: do not even copy them.
            content = self._data[start : start + 5 if counted_only else at][:size_bytes]
            cursor = _Cursor(content, name)
            read(self, cursor)
            if not counted_only:
                cursor.finish()
        self._check_totals()
        return WasmModule(
            imports=tuple(self._imports),
            exports=tuple(self._exports),
            tables=tuple(self._tables),
            memories=tuple(self._memories),
            function_count=len(self._imported_functions) + len(self._own_functions),
            has_start=self._has_start,
            custom_sections=tuple(self._custom_sections),
        )

    def _section_extent(self, at: int, section_id: int) -> tuple[int, int]:
        """Start and size of the content of the section whose size stands at `at`."""
        header = _Cursor(self._data[at : at + 5], self._section_name(section_id))
        size_bytes = header.u32()
        start = at + header.position
        left = len(self._data) - start
        if size_bytes > left:
            raise header.malformed(f"it has {size_bytes} bytes, and the file ends after {left} of them")
        return start, size_bytes

    def _section_name(self, section_id: int) -> str:
        if section_id == 0:
            return "custom"
        if section_id in self._SECTIONS:
            return self._SECTIONS[section_id][0]
        if section_id == 13:
            raise _unsupported(_EXCEPTIONS)
        if section_id == 14:
            raise _unsupported("reference-typed strings (stringref)")
        raise InvalidModule(
            InvalidModuleReason.MALFORMED, f"malformed module: unknown section id {section_id}"
        )

    def _check_order(self, section_id: int, last_rank: int) -> int:
        rank = self._RANKS[section_id]
        if rank <= last_rank:
            problem = "twice" if rank == last_rank else "out of order"
            name = self._SECTIONS[section_id][0]
            raise InvalidModule(
                InvalidModuleReason.MALFORMED, f"malformed module: the {name} section comes {problem}"
            )
        return rank

    def _custom(self, start: int, end: int) -> None:
        if len(self._custom_sections) == MAX_CUSTOM_SECTIONS:
            raise InvalidModule(
                InvalidModuleReason.LIMIT,
                f"the module has more than {MAX_CUSTOM_SECTIONS} custom sections",
            )
        cursor = _Cursor(self._data[start : min(end, start + 5 + MAX_NAME_BYTES)], "custom")
        name = cursor.name()
        offset = start + cursor.position
        self._custom_sections.append(CustomSection(name, offset, end - offset))

    def _read_types(self, cursor: _Cursor) -> None:
        types = self._types
        for _ in range(cursor.count("types", MAX_TYPES, 2)):
            form = cursor.byte()
            if form != 0x60:
                if form in _TYPE_FORM_FEATURES:
                    raise _unsupported(_TYPE_FORM_FEATURES[form])
                raise cursor.malformed(f"unknown form of type 0x{form:02x}")
            types.append(FunctionType(cursor.value_types(), cursor.value_types()))

    def _read_imports(self, cursor: _Cursor) -> None:
        for _ in range(cursor.count("imports", MAX_IMPORTS, 4)):
            module, name = cursor.name(), cursor.name()
            kind, type_ = self._read_import(cursor)
            self._imports.append(WasmImport(module, name, kind, type_))

    def _read_import(self, cursor: _Cursor) -> tuple[ExternKind, ExternType]:
        code = cursor.byte()
        if code == 0:
            index = cursor.u32()
            if index >= len(self._types):
                raise cursor.malformed(f"a function has type {index}, and there are {len(self._types)}")
            function = self._types[index]
            self._imported_functions.append(function)
            return ExternKind.FUNCTION, function
        if code == 1:
            table = cursor.table_type()
            self._add_table(table)
            return ExternKind.TABLE, table
        if code == 2:
            memory = cursor.memory_type()
            self._add_memory(memory)
            return ExternKind.MEMORY, memory
        if code == 3:
            global_ = cursor.global_type()
            self._imported_globals.append(global_)
            return ExternKind.GLOBAL, global_
        if code == 4:
            raise _unsupported(_EXCEPTIONS)
        if code in (0x7E, 0x7F):
            raise _unsupported(_COMPACT_IMPORTS)
        if code == 0x20:  # a function of exactly that type
            raise _unsupported(_CUSTOM_DESCRIPTORS)
        raise cursor.malformed(f"unknown kind of import 0x{code:02x}")

    def _add_table(self, table: TableType) -> None:
        if len(self._tables) == MAX_TABLES:
            raise InvalidModule(InvalidModuleReason.LIMIT, f"the module has more than {MAX_TABLES} tables")
        self._tables.append(table)

    def _add_memory(self, memory: MemoryType) -> None:
        if len(self._memories) == MAX_MEMORIES:
            raise InvalidModule(
                InvalidModuleReason.LIMIT, f"the module has more than {MAX_MEMORIES} memories"
            )
        self._memories.append(memory)

    def _read_functions(self, cursor: _Cursor) -> None:
        """A type index for each function: up to a million, so none is decoded unless it is needed."""
        count = cursor.count("functions", MAX_FUNCTIONS, 1)
        content = cursor.rest()
        if len(content) > 5 * count:
            raise cursor.malformed(f"it is too long for {count} functions")
        if len(content) == count and content.isascii():
            self._own_functions = content
        else:
            indices: list[bytes] = _LEB_U32.findall(content)
            if len(indices) != count or sum(map(len, indices)) != len(content):
                raise cursor.malformed(f"it does not hold {count} numbers")
            self._own_functions = indices
        distinct: set[int | bytes] = set(self._own_functions)
        for index in map(_decoded, distinct):
            if index >= len(self._types):
                raise cursor.malformed(f"a function has type {index}, and there are {len(self._types)}")

    def _function_type(self, index: int) -> FunctionType | None:
        """The type of a function of the module; None if there is no such function."""
        if index < len(self._imported_functions):
            return self._imported_functions[index]
        own = index - len(self._imported_functions)
        if own >= len(self._own_functions):
            return None
        return self._types[_decoded(self._own_functions[own])]

    def _read_tables(self, cursor: _Cursor) -> None:
        for _ in range(cursor.count("tables", MAX_TABLES, 3)):
            self._add_table(cursor.table_type())

    def _read_memories(self, cursor: _Cursor) -> None:
        for _ in range(cursor.count("memories", MAX_MEMORIES, 2)):
            self._add_memory(cursor.memory_type())

    def _count_globals(self, cursor: _Cursor) -> None:
        self._own_global_count = cursor.u32()

    def _read_exports(self, cursor: _Cursor) -> None:
        names: set[str] = set()
        for _ in range(cursor.count("exports", MAX_EXPORTS, 3)):
            name = cursor.name()
            if name in names:
                raise cursor.malformed(f"the name {shown(name)} comes twice")
            names.add(name)
            code, index = cursor.byte(), cursor.u32()
            if code == 4:
                raise _unsupported(_EXCEPTIONS)
            if code > 4:
                raise cursor.malformed(f"unknown kind of export 0x{code:02x}")
            kind = _EXPORT_KINDS[code]
            self._exports.append(WasmExport(name, kind, self._exported_type(cursor, kind, index)))

    def _exported_type(self, cursor: _Cursor, kind: ExternKind, index: int) -> ExternType | None:
        if kind is ExternKind.FUNCTION:
            function = self._function_type(index)
            if function is not None:
                return function
        elif kind is ExternKind.TABLE:
            if index < len(self._tables):
                return self._tables[index]
        elif kind is ExternKind.MEMORY:
            if index < len(self._memories):
                return self._memories[index]
        elif index < len(self._imported_globals):
            return self._imported_globals[index]
        elif index < len(self._imported_globals) + self._own_global_count:
            return None
        raise cursor.malformed(f"{kind} {index} is exported, and does not exist")

    def _read_start(self, cursor: _Cursor) -> None:
        index = cursor.u32()
        function = self._function_type(index)
        if function is None:
            raise cursor.malformed(f"function {index} does not exist")
        if any(function):
            raise cursor.malformed(f"the function must be () -> (), and is {function}")
        self._has_start = True

    def _skip(self, cursor: _Cursor) -> None:
        cursor.u32()

    def _count_bodies(self, cursor: _Cursor) -> None:
        self._body_count = cursor.u32()

    def _count_segments(self, cursor: _Cursor) -> None:
        self._segment_count = cursor.u32()

    def _read_announced_segments(self, cursor: _Cursor) -> None:
        self._announced_segment_count = cursor.u32()

    def _check_totals(self) -> None:
        """Promises that sections make about one another; a file cut between sections breaks them."""
        functions = len(self._own_functions)
        if self._body_count != functions:
            raise InvalidModule(
                InvalidModuleReason.MALFORMED,
                f"malformed module: {functions} functions are declared, and {self._body_count} have code",
            )
        announced = self._announced_segment_count
        if announced is not None and announced != self._segment_count:
            raise InvalidModule(
                InvalidModuleReason.MALFORMED,
                f"malformed module: {announced} data segments are announced, "
                f"and there are {self._segment_count}",
            )

    # id: (name, reader, whether only the number at its start is read), in the order of the file.
    _SECTIONS: ClassVar[dict[int, tuple[str, Callable[[_Parser, _Cursor], None], bool]]] = {
        1: ("type", _read_types, False),
        2: ("import", _read_imports, False),
        3: ("function", _read_functions, False),
        4: ("table", _read_tables, False),
        5: ("memory", _read_memories, False),
        6: ("global", _count_globals, True),
        7: ("export", _read_exports, False),
        8: ("start", _read_start, False),
        9: ("element", _skip, True),
        12: ("data count", _read_announced_segments, False),
        10: ("code", _count_bodies, True),
        11: ("data", _count_segments, True),
    }
    _RANKS: ClassVar = {section_id: rank for rank, section_id in enumerate(_SECTIONS, 1)}


_EXPORT_KINDS = (ExternKind.FUNCTION, ExternKind.TABLE, ExternKind.MEMORY, ExternKind.GLOBAL)
