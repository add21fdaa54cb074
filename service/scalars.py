"""The scalars of a configuration: sizes, durations, addresses, paths, names."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Strict, ValidationInfo

from bulkhead.sandbox import parse_duration, parse_quantity
from bulkhead.service.words import cut

MAX_NAME_LENGTH = 63

# As Kubernetes names things (RFC 1123). Without `_`, which separates the name in audit annotations.
_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_HOST = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9.]*[A-Za-z0-9])?")


def _read_bytes(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("expected a quantity of bytes such as 65536, 64Mi or 1.5Gi")
    if isinstance(value, int) and value < 0:
        raise ValueError("expected a quantity of bytes such as 65536, 64Mi or 1.5Gi")
    try:
        return parse_quantity(str(value))
    except ValueError as error:
        raise ValueError(f"expected a quantity of bytes: {error}") from None


def _read_seconds(value: object) -> float:
    if not isinstance(value, str):
        raise ValueError("expected a duration with its unit, such as 500ms, 2s or 1m30s")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f"expected a duration: {error}") from None


Bytes = Annotated[int, BeforeValidator(_read_bytes)]
"""Bytes, written as a Kubernetes quantity."""
Seconds = Annotated[float, BeforeValidator(_read_seconds)]
"""Seconds, written as a Go duration."""
OptionalBytes = Annotated[int | None, BeforeValidator(_read_bytes)]
OptionalSeconds = Annotated[float | None, BeforeValidator(_read_seconds)]

_T = TypeVar("_T")
# YAML lists become tuples, so that nothing in a configuration can change.
Many = Annotated[tuple[_T, ...], Strict(False)]


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Port 0: any that is free."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads `127.0.0.1:8443`, `[::1]:8443` or `localhost:0`. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        if not colon or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
            raise ValueError(
                "expected HOST:PORT such as 127.0.0.1:8443 or [::1]:8443, with a port from 0 to 65535"
            )
        if bracketed != (":" in host):
            raise ValueError("expected an IPv6 address to stand in brackets, as in [::1]:8443, and no other")
        if not host:
            raise ValueError(f"expected a host before the port; for all addresses write 0.0.0.0:{port}")
        if bracketed:
            _require_ipv6(host)
        elif _HOST.fullmatch(host) is None:
            raise ValueError(f"expected a host name or an IP address, got {host!r}")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. A name other than `localhost` may be anything."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _require_ipv6(host: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError(f"expected an IPv6 address in the brackets, got {host!r}") from None


def read_address(value: object) -> Address:
    if isinstance(value, Address):
        return value
    if not isinstance(value, str):
        raise ValueError("expected HOST:PORT such as 127.0.0.1:8443")
    return Address.parse(value)


def read_path(value: object, info: ValidationInfo) -> Path:
    """A path is relative to the folder of the configuration file."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("expected the path of a file or folder")
    return folder_of(info) / value


def folder_of(info: ValidationInfo) -> Path:
    """What paths in a configuration are relative to."""
    context: Mapping[str, Path] = info.context or {}
    return context.get("folder", Path.cwd())


def require_file(path: Path) -> Path:
    """For files that are read as soon as the configuration is used."""
    if not path.exists():
        raise ValueError(f"expected the path of a file, but there is no file {path}")
    if not path.is_file():
        raise ValueError(f"expected the path of a file, but {path} is not a file")
    return path


def require_name(name: str) -> str:
    if _NAME.fullmatch(name) is None or len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"expected a name of at most {MAX_NAME_LENGTH} lower-case letters, digits, '-' and '.', "
            f"got {cut(name, 80)!r}"
        )
    return name


def require_json(value: object) -> object:
    for path, problem in _not_json(value, ""):
        raise ValueError(f"expected settings that can be written as JSON; {path or 'the value'} is {problem}")
    return value


def _not_json(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, child in value.items():
            if isinstance(key, str):
                yield from _not_json(child, f"{path}.{key}".removeprefix("."))
            else:
                yield path, f"a mapping with the key {key!r}, which is not a string: put it in quotes"
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _not_json(child, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, "not a finite number"
    elif not isinstance(value, str | int | float | bool | None):
        yield path, f"a {type(value).__name__}: put it in quotes"


# As they are written in the models.
OneAddress = Annotated[Address, BeforeValidator(read_address)]
OptionalPath = Annotated[Path | None, BeforeValidator(read_path)]
ExistingFile = Annotated[Path, BeforeValidator(read_path), AfterValidator(require_file)]
Name = Annotated[str, AfterValidator(require_name)]
Json = Annotated[Any, AfterValidator(require_json)]
