"""What `bulkhead serve` says when it is ready: where it is, what it serves, what to try."""

from __future__ import annotations

import shlex
import sys

from bulkhead.service.supervisor import Serving
from bulkhead.service.tls import TlsMaterial

_REVIEW = '{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","spec":{"token":"magic-token"}}'

# Who listens on all addresses is called by one.
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - shown, not listened on

_SNIPPET = """\
{python} - <<'EOF'
import grpc
from bulkhead.v1 import reviews_pb2, reviews_pb2_grpc
with grpc.insecure_channel("{address}") as channel:
    reviews = reviews_pb2_grpc.ReviewServiceStub(channel)
    review = b'{review}'
    print(reviews.Authenticate(reviews_pb2.AuthenticateRequest(review=review)).review.decode())
EOF"""


def banner(serving: Serving, *, demo: bool) -> str:
    """The text, with commands that work as they are pasted."""
    runtime = serving.runtime
    which = "wasmtime-min" if runtime.minimal else "the full binary"
    generation = serving.generation
    https = "https" if generation.https_tls else "http"
    lines = [
        f"Bulkhead is ready{', on its built-in demo configuration' if demo else ''}.",
        "",
        f"  HTTPS           {https}://{serving.https_address}  /authn /authz /validate /mutate"
        f"{_clients(generation.https_tls)}",
        f"  gRPC            {serving.grpc_address}{_clients(generation.grpc_tls)}",
        *([f"  CA certificate  {serving.ca_certificate}"] if serving.ca_certificate else []),
        f"  state           {serving.options.state_dir}",
        f"  wasmtime        {runtime.version}, runs use {which}",
        "",
        *_modules(serving),
        "",
        *_first_tries(serving, f"{https}://{_reachable(serving.https_address)}/authn"),
        "Ctrl-C stops it.",
    ]
    return "\n".join(lines)


def _clients(tls: TlsMaterial | None) -> str:
    if tls is None:
        return "  (plain text)"
    return "  (clients need a certificate)" if tls.client_ca is not None else ""


def _first_tries(serving: Serving, url: str) -> list[str]:
    """What can be pasted where no client certificate is needed."""
    lines: list[str] = []
    https_tls = serving.generation.https_tls
    if https_tls is None or https_tls.client_ca is None:
        authority = serving.ca_certificate
        lines += ["Ask it over HTTPS:" if https_tls else "Ask it over HTTP:", ""]
        lines += [f"curl --cacert {shlex.quote(str(authority))} \\" if authority else "curl \\"]
        lines += [
            "  -H 'Content-Type: application/json' \\",
            f"  --data {shlex.quote(_REVIEW)} \\",
            f"  {url}",
            "",
        ]
    if serving.generation.grpc_tls is None:
        snippet = _SNIPPET.format(
            python=shlex.quote(sys.executable), address=_reachable(serving.grpc_address), review=_REVIEW
        )
        lines += ["or over gRPC:" if lines else "Ask it over gRPC:", "", snippet, ""]
    return lines


def _reachable(address: str) -> str:
    """Where a client on this machine finds it, under a name that the certificate has."""
    host, _, port = address.rpartition(":")
    return f"{_LOOPBACK_OF.get(host, host)}:{port}"


def _modules(serving: Serving) -> list[str]:
    if not serving.modules:
        return ["  no modules are configured: every review gets its default answer"]
    width = max(len(each.name) for each in serving.modules)
    return [
        f"  {each.section:<15} {each.name:<{width}}  {each.digest or 'CANNOT BE USED, see the log'}"
        for each in serving.modules
    ]
