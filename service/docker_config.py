"""What `docker login` leaves behind: credentials of registries, or programs that know them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bulkhead.service.fetch_error import NotFetched


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """Docker's configuration file, as far as it is about registries."""

    as_read: dict[str, Any] = field(repr=False)
    """`auths` by the host of the registry, `credHelpers`, `credsStore`."""


class _File(msgspec.Struct, rename="camel"):
    auths: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    cred_helpers: dict[str, str] = msgspec.field(default_factory=dict)
    creds_store: str = ""


def read_docker_config() -> DockerConfig:
    """Reads the file in $DOCKER_CONFIG or else ~/.docker; there need not be one. Raises NotFetched."""
    folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    path = Path(folder, "config.json")
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (FileNotFoundError, NotADirectoryError):
        file = _File()
    except OSError as error:
        raise NotFetched(f"{path}, which may have credentials, cannot be read: {error.strerror}") from None
    except ValueError:  # whose text may quote a part of it
        raise NotFetched(f"{path}, which may have credentials, is not as Docker writes it") from None
    auths: dict[str, dict[str, Any]] = {}
    for name, credentials in file.auths.items():
        auths.setdefault(name, credentials)
        auths.setdefault(_host(name), credentials)
    return DockerConfig({"auths": auths, "credHelpers": file.cred_helpers, "credsStore": file.creds_store})


def _host(name: str) -> str:
    """Old versions wrote URLs."""
    return name.removeprefix("https://").removeprefix("http://").partition("/")[0]
