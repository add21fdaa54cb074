"""Where a module of the configuration comes from: a file, the store, an HTTPS server, an OCI registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from bulkhead.service.scalars import MAX_NAME_LENGTH
from bulkhead.service.words import cut

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_OCI = re.compile(
    r"oci://(?P<registry>[A-Za-z0-9][-A-Za-z0-9.]*(?::[0-9]{1,5})?|\[[0-9a-f:]+\](?::[0-9]{1,5})?)"
    r"/(?P<repository>[a-z0-9]+(?:(?:[./]|__?|-+)[a-z0-9]+)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][-A-Za-z0-9_.]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_SHOWN_DIGITS = 12  # of a digest, in a name


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of this machine."""

    path: Path

    @property
    def base_name(self) -> str:
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A module that was put into the store before, by its digest."""

    digest: str

    @property
    def base_name(self) -> str:
        return f"sha256-{self.digest.removeprefix('sha256:')[:_SHOWN_DIGITS]}"

    def __str__(self) -> str:
        return self.digest


@dataclass(frozen=True, slots=True)
class HttpsSource:
    """A file of an HTTPS server. What it must be is said by the key `digest`."""

    url: str

    @property
    def base_name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name

    def __str__(self) -> str:
        return self.shown

    @property
    def shown(self) -> str:
        """Without the query, which may hold what is secret."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl()


@dataclass(frozen=True, slots=True)
class OciSource:
    """An artifact of an OCI registry, as Kubewarden publishes policies."""

    registry: str
    repository: str
    tag: str
    """Empty if none is given; not looked at, as the digest says all."""
    manifest_digest: str

    @property
    def base_name(self) -> str:
        return self.repository.rpartition("/")[2]

    def __str__(self) -> str:
        return self.shown

    @property
    def shown(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"oci://{self.registry}/{self.repository}{tag}@{self.manifest_digest}"


ModuleSource = FileSource | StoredSource | HttpsSource | OciSource


def parse_source(text: str, folder: Path) -> ModuleSource:
    """Reads what stands behind `module`; paths are relative to `folder`. Raises ValueError."""
    if text.startswith("sha256:"):
        return StoredSource(_digest(text))
    if text.startswith("https://"):
        return _https(text)
    if text.startswith("oci://"):
        return _oci(text)
    if text.startswith("registry://"):
        raise ValueError(f"expected oci:// in place of registry://, got {cut(text, 120)!r}")
    if (scheme := re.match(r"[a-z][a-z0-9+.-]*://", text)) is not None:
        raise ValueError(f"expected a path, sha256:…, https://… or oci://…, got {scheme[0]}…")
    if not text or "\0" in text:
        raise ValueError("expected the path of a module, sha256:…, https://… or oci://…")
    return FileSource(folder / text)


def default_name(source: ModuleSource) -> str:
    """A module's name when none is given: `My_policy.wasm` is `my-policy`."""
    return name_from(source.base_name)


def name_from(text: str) -> str:
    """A name that a module can have, as close to the text as possible."""
    name = _NOT_IN_NAMES.sub("-", text.removesuffix(".wasm").lower()).strip("-")
    return name[:MAX_NAME_LENGTH].rstrip("-") or "module"


def _digest(text: str) -> str:
    if DIGEST.fullmatch(text) is None:
        raise ValueError(f"expected sha256: and 64 hexadecimal digits in lower case, got {cut(text, 80)!r}")
    return text


def _names_a_host(url: str) -> bool:
    """With a port that there is, if any."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _https(text: str) -> HttpsSource:
    if not _names_a_host(text) or not text.isprintable() or " " in text:
        raise ValueError(f"expected https://HOST/PATH, got {cut(text, 120)!r}")
    if "@" in urlsplit(text).netloc:
        raise ValueError("expected a URL without user name and password")
    return HttpsSource(text)


def _oci(text: str) -> OciSource:
    found = _OCI.fullmatch(text)
    if found is None or not _names_a_host(text):
        raise ValueError(
            f"expected oci://REGISTRY/REPOSITORY@sha256:… with 64 hexadecimal digits, got {cut(text, 120)!r}"
        )
    if found["digest"] is None:
        raise ValueError(
            "expected a reference with a digest, oci://REGISTRY/REPOSITORY@sha256:…, "
            f"because what a tag names can change, got {cut(text, 120)!r}"
        )
    return OciSource(found["registry"], found["repository"], found["tag"] or "", found["digest"])
