"""What an OCI manifest says of the module that it stands for."""

from __future__ import annotations

import msgspec

from bulkhead.service.fetch_error import NotFetched
from bulkhead.service.modulesource import DIGEST

_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
ACCEPTED_TYPES = (*_MANIFEST_TYPES, *_INDEX_TYPES)
"""Of manifests; indexes are among them to say what is wrong."""
_LAYER_TYPES = frozenset(
    {
        "application/vnd.wasm.content.layer.v1+wasm",  # Kubewarden, wasm-to-oci
        "application/vnd.module.wasm.content.layer.v1+wasm",  # wasmCloud, Istio
        "application/wasm",  # the CNCF's WebAssembly working group
    }
)


class Layer(msgspec.Struct, rename="camel", frozen=True):
    """One blob of an artifact."""

    media_type: str
    digest: str
    size: int
    """In bytes."""


class _Manifest(msgspec.Struct, rename="camel"):
    media_type: str = ""
    layers: list[Layer] = msgspec.field(default_factory=list)
    manifests: list[msgspec.Raw] = msgspec.field(default_factory=list)


def wasm_layer(data: bytes) -> Layer:
    """Returns the one layer that is a module. Raises NotFetched."""
    try:
        manifest = msgspec.json.decode(data, type=_Manifest)
    except ValueError as error:
        raise NotFetched(f"its manifest is not one of OCI: {error}") from None
    if manifest.media_type in _INDEX_TYPES or manifest.manifests:
        raise NotFetched(
            "the digest is that of an index of several artifacts; expected that of the module's own manifest"
        )
    found = [layer for layer in manifest.layers if layer.media_type in _LAYER_TYPES]
    if len(found) != 1:
        types = ", ".join(layer.media_type for layer in manifest.layers) or "none"
        raise NotFetched(f"expected one layer of WebAssembly, got {types}")
    if DIGEST.fullmatch(found[0].digest) is None:
        raise NotFetched(f"the digest of its layer is not sha256: {found[0].digest[:80]!r}")
    return found[0]
