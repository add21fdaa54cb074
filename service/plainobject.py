"""A plain Kubernetes object as the AdmissionReview that a cluster would send for it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import Raw

from bulkhead.service import strictjson
from bulkhead.service.admission_answer import ADMISSION_REVIEW
from bulkhead.service.kinds import Resource, guess_resource, is_cluster_scoped
from bulkhead.service.strictjson import Mismatch

DEFAULT_NAMESPACE = "default"
DEFAULT_USER = "bulkhead-review"

_ANONYMOUS = "system:anonymous"
_RESOURCE = re.compile(r"([a-z0-9][-a-z0-9]*)(?:\.(v[0-9][a-z0-9]*)\.([a-z0-9][-a-z0-9.]*))?")
_OPTIONS = {"CREATE": "CreateOptions", "UPDATE": "UpdateOptions", "DELETE": "DeleteOptions"}


class BadObject(ValueError):
    """No request can be made of the object, or not with these options. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an object does not say of the request for it; None and empty: to be guessed."""

    operation: str = "CREATE"
    """`CREATE`, `UPDATE`, `DELETE` or `CONNECT`."""
    namespace: str | None = None
    cluster_scoped: bool = False
    resource: str | None = None
    """`pods`, or with version and group `deployments.v1.apps`."""
    subresource: str | None = None
    name: str | None = None
    user: str = DEFAULT_USER
    groups: Sequence[str] = ()


class _Metadata(msgspec.Struct):
    name: str | None = None
    namespace: str | None = None


class _Object(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    metadata: _Metadata | None = None

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.api_version.rpartition("/")[2]

    @property
    def name(self) -> str:
        return (self.metadata and self.metadata.name) or ""

    @property
    def namespace(self) -> str:
        return (self.metadata and self.metadata.namespace) or ""


@dataclass(frozen=True, slots=True)
class PlainReview:
    """The review that was made."""

    body: bytes
    guess: str
    """What of it was guessed, for people."""


def identity(document: bytes) -> tuple[str, str, str]:
    """apiVersion, kind and name of an object, as JSON. Raises BadObject."""
    read = _read(document)
    return read.api_version, read.kind, read.name


def review_of(document: bytes, request: Request, old: bytes | None = None) -> PlainReview:
    """The AdmissionReview of a request for this object, as JSON; `old` is what it was before an UPDATE.

    Raises BadObject.
    """
    read = _read(document)
    resource = _resource(read, request)
    namespace = _namespace(read, request)
    if namespace and resource.resource != "namespaces":
        # As kube-apiserver does before it asks anybody.
        document = _in_namespace(document, namespace)
        old = None if old is None else _in_namespace(old, namespace)
    kind = {"group": read.group, "version": read.version, "kind": read.kind}
    plural = {"group": resource.group, "version": resource.version, "resource": resource.resource}
    is_delete = request.operation == "DELETE"
    members: dict[str, object] = {
        "uid": str(uuid.uuid4()),
        "kind": kind,
        "resource": plural,
        **({"subResource": resource.subresource} if resource.subresource else {}),
        "requestKind": kind,
        "requestResource": plural,
        **({"requestSubResource": resource.subresource} if resource.subresource else {}),
        "name": request.name or read.name,
        **({"namespace": namespace} if namespace else {}),
        "operation": request.operation,
        "userInfo": {"username": request.user, "groups": _groups(request)},
        "object": None if is_delete else Raw(document),
        "oldObject": Raw(document) if is_delete else None if old is None else Raw(old),
        "dryRun": False,
        "options": _options(request.operation),
    }
    review = {
        "kind": ADMISSION_REVIEW.kind,
        "apiVersion": "admission.k8s.io/v1",
        "request": {key: value for key, value in members.items() if (key, value) != ("name", "")},
    }
    where = f"in namespace {namespace}" if namespace else "cluster-scoped"
    return PlainReview(strictjson.encode(review), f"resource {resource}, {where}, user {request.user}")


def _read(document: bytes) -> _Object:
    try:
        read = strictjson.read(document, _Object)
    except Mismatch as error:
        raise BadObject(f"expected a Kubernetes object or a review: {error}") from None
    if not read.kind or not read.version:
        raise BadObject("expected a Kubernetes object or a review, with apiVersion and kind")
    return read


def _resource(read: _Object, request: Request) -> Resource:
    guess = guess_resource(read.group, read.version, read.kind)
    if request.resource is None:
        return Resource(guess.group, guess.version, guess.resource, request.subresource or guess.subresource)
    match = _RESOURCE.fullmatch(request.resource)
    if match is None:
        raise BadObject(
            f"--resource: expected a plural such as pods, or deployments.v1.apps, got {request.resource!r}"
        )
    resource, version, group = match.groups()
    return Resource(
        guess.group if group is None else group,
        version or guess.version,
        resource,
        request.subresource or guess.subresource,
    )


def _namespace(read: _Object, request: Request) -> str:
    """Empty: none."""
    if request.cluster_scoped or is_cluster_scoped(read.group, read.kind):
        if request.namespace:
            raise BadObject(f"--namespace: a {read.kind} is in no namespace")
        is_namespace = (read.group, read.kind) == ("", "Namespace")
        return read.name if is_namespace else ""  # their requests name the namespace itself
    if request.namespace and read.namespace and request.namespace != read.namespace:
        raise BadObject(f"--namespace: the object says that it is in {read.namespace!r}")
    return request.namespace or read.namespace or DEFAULT_NAMESPACE


def _in_namespace(document: bytes, namespace: str) -> bytes:
    """The object, with its namespace if it had none."""
    members = strictjson.split(document)
    metadata = members.get("metadata")
    inner = {} if metadata is None or bytes(metadata) == b"null" else strictjson.split(metadata)
    if "metadata" not in members or "namespace" in inner:
        return document
    inner["namespace"] = Raw(strictjson.encode(namespace))
    return strictjson.join({**members, "metadata": Raw(strictjson.join(inner))})


def _groups(request: Request) -> list[str]:
    """With the group that kube-apiserver gives to everybody."""
    everybody = "system:unauthenticated" if request.user == _ANONYMOUS else "system:authenticated"
    return list(dict.fromkeys([*request.groups, everybody]))


def _options(operation: str) -> dict[str, str] | None:
    kind = _OPTIONS.get(operation)
    return None if kind is None else {"kind": kind, "apiVersion": "meta.k8s.io/v1"}
