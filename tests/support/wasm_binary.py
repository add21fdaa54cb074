"""A small encoder of the WebAssembly binary format, for modules too large or too broken for text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

HEADER = b"\0asm\x01\0\0\0"
FUNCTION_TYPE = b"\x60\x00\x00"
I32, I64 = b"\x7f", b"\x7e"
END = b"\x0b"


def leb(number: int) -> bytes:
    """Unsigned LEB128."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def sleb(number: int) -> bytes:
    """Signed LEB128."""
    encoded = bytearray()
    while not -64 <= number < 64:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number & 0x7F))


def section(number: int, content: bytes) -> bytes:
    return bytes([number]) + leb(len(content)) + content


def vector(items: Sequence[bytes]) -> bytes:
    return leb(len(items)) + b"".join(items)


def name(text: str) -> bytes:
    return leb(len(text.encode())) + text.encode()


def custom(title: str, content: bytes) -> bytes:
    return section(0, name(title) + content)


def body(code: bytes, local_groups: Iterable[tuple[int, bytes]] = ()) -> bytes:
    """A function's body: groups of locals, the code without its final `end`."""
    content = vector([leb(count) + kind for count, kind in local_groups]) + code + END
    return leb(len(content)) + content


def module(
    bodies: Sequence[bytes],
    *,
    entry: int = 0,
    pages: int = 1,
    data: Sequence[bytes] = (),
    entry_name: str = "run",
) -> bytes:
    """A module of functions `() -> ()` with a memory, which exports function `entry`."""
    exports = [name("memory") + b"\x02\x00", name(entry_name) + b"\x00" + leb(entry)]
    parts = [
        HEADER,
        section(1, vector([FUNCTION_TYPE])),
        section(3, leb(len(bodies)) + bytes(len(bodies))),
        section(5, vector([b"\x00" + leb(pages)])),
        section(7, vector(exports)),
        section(10, vector(bodies)),
    ]
    if data:
        parts.append(section(11, vector(data)))
    return b"".join(parts)


def data_segment(offset: int, content: bytes) -> bytes:
    return b"\x00\x41" + sleb(offset) + END + leb(len(content)) + content


def many_functions(count: int) -> bytes:
    return module([body(b"")] * count)


def deep_blocks(depth: int) -> bytes:
    return module([body(b"\x02\x40" * depth + END * depth)])


def wide_branch(targets: int) -> bytes:
    """A br_table with so many targets, in one block."""
    code = b"\x02\x40\x41\x00\x0e" + leb(targets) + b"\x00" * targets + b"\x00" + END
    return module([body(code)])


def many_locals(count: int) -> bytes:
    return module([body(b"", [(count, I64)])])


def register_bomb(values: int) -> bytes:
    """One function with very many values that all live from its beginning to its end.

    Each local is loaded at the start, then each is used in a chain of blocks and branches, so that
    the allocator has to keep every one apart over thousands of blocks.
    """
    count = min(values, 10_000)
    loads = b"".join(b"\x41\x00\x28\x02" + leb(4 * i % 65536) + b"\x21" + leb(i) for i in range(count))
    uses = bytearray()
    for i in range(values):
        a, b = leb(i % count), leb((i * 7919 + 1) % count)
        # if (a) { b = a + b } — a branch, a merge, two uses
        uses += b"\x20" + a + b"\x04\x40" + b"\x20" + a + b"\x20" + b + b"\x6a\x21" + b + END
    stores = b"".join(b"\x41\x00\x20" + leb(i) + b"\x36\x02" + leb(4 * i % 65536) for i in range(count))
    return module([body(loads + bytes(uses) + stores, [(count, I32)])])
