"""Words of modules, made safe to show: to clients, in logs, on terminals."""

from __future__ import annotations

ELLIPSIS = "…"


def clean(text: str, most: int) -> str:
    """One line of printable characters, at most `most` of them.

    Control characters, line ends, lone surrogates and the invisible marks that turn the direction
    of writing become spaces.
    """
    # Only what can end up in the result is looked at: a module's text may have megabytes.
    short = text[: most + 1]
    printable = short if short.isprintable() else "".join(c if c.isprintable() else " " for c in short)
    return cut(printable, most)


def cut(text: str, most: int) -> str:
    """At most `most` characters; what was cut shows."""
    return text if len(text) <= most else text[: most - 1] + ELLIPSIS


def counted(number: int, thing: str) -> str:
    """`1 module`, `2 modules`"""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
