"""The files that kube-apiserver reads from its own host, and the flags that name them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from bulkhead.service.config import Config
from bulkhead.service.manifest_admission import timeout_seconds
from bulkhead.service.manifest_endpoint import AdmissionEndpoint, UrlEndpoint
from bulkhead.service.manifest_trust import ClientPair
from bulkhead.service.manifest_yaml import Document

AUTHENTICATION_KUBECONFIG = "authentication.kubeconfig"
AUTHORIZATION_KUBECONFIG = "authorization.kubeconfig"
AUTHORIZATION_CONFIGURATION = "authorization.yaml"
ADMISSION_KUBECONFIG = "admission.kubeconfig"
ADMISSION_CONFIGURATION = "admission.yaml"
CLIENT_CERTIFICATE, CLIENT_KEY = "client.crt", "client.key"

BULKHEAD = "Bulkhead"  # its place among the authorizers
AUTHORIZERS = ("Node", "RBAC", "ABAC")
_GRANTING = frozenset({"RBAC", "ABAC"})

_API_GROUP = "apiserver.config.k8s.io/v1"
_AUTHORIZED_TTL, _UNAUTHORIZED_TTL = "5m0s", "30s"

# Who keeps a cluster running, and how kube-apiserver's own probes ask: none of that may hang on a webhook.
_NOT_FOR_THE_CONTROL_PLANE = (
    "!('system:nodes' in request.groups)",
    "!('system:serviceaccounts:kube-system' in request.groups)",
    "!(request.user in ['system:kube-controller-manager', 'system:kube-scheduler', 'system:kube-proxy'])",
    "!(has(request.nonResourceAttributes) && "
    "request.nonResourceAttributes.path in ['/healthz', '/livez', '/readyz'])",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiServerOptions:
    """What the configuration does not say of the files on kube-apiserver's host."""

    name: str
    """Of the authorizer, and of what the kubeconfigs hold."""
    url: UrlEndpoint | None
    """For authentication and authorization: None if there are no modules of these."""
    admission: AdmissionEndpoint | None
    """None if there are no admission webhooks."""
    authorities: bytes
    """PEM: what kube-apiserver trusts."""
    client: ClientPair | None
    embed_client: bool
    """Client certificate and key inside of the kubeconfigs, instead of beside them."""
    folder: PurePosixPath
    """Where the files will be on the host."""
    authorizer_order: tuple[str, ...]
    authorization_failure_policy: Literal["Deny", "NoOpinion"]

    def path_of(self, name: str) -> str:
        """The path of one of the files on the host."""
        return str(self.folder / name)


def apiserver_documents(config: Config, options: ApiServerOptions) -> dict[str, Document]:
    """The files by their names."""
    documents: dict[str, Document] = {}
    if config.authentication.modules and options.url:
        documents[AUTHENTICATION_KUBECONFIG] = _kubeconfig(options.url.url("/authn"), options)
    if config.authorization.modules and options.url:
        documents[AUTHORIZATION_KUBECONFIG] = _kubeconfig(options.url.url("/authz"), options)
        documents[AUTHORIZATION_CONFIGURATION] = _authorization_configuration(config, options)
    if options.admission and options.client:
        documents[ADMISSION_KUBECONFIG] = _admission_kubeconfig(options.admission, options.client, options)
        documents[ADMISSION_CONFIGURATION] = _admission_configuration(options)
    return documents


def flags(names: Sequence[str], options: ApiServerOptions) -> list[str]:
    """The flags of kube-apiserver that put these files to use."""
    by_file = {
        AUTHENTICATION_KUBECONFIG: (
            f"--authentication-token-webhook-config-file={options.path_of(AUTHENTICATION_KUBECONFIG)}",
            "--authentication-token-webhook-version=v1",
        ),
        AUTHORIZATION_CONFIGURATION: (
            f"--authorization-config={options.path_of(AUTHORIZATION_CONFIGURATION)}",
        ),
        ADMISSION_CONFIGURATION: (
            f"--admission-control-config-file={options.path_of(ADMISSION_CONFIGURATION)}",
        ),
    }
    return [flag for name, its in by_file.items() if name in names for flag in its]


def webhook_mode(order: Sequence[str]) -> str:
    """The order of authorizers as the flag --authorization-mode has it."""
    return ",".join("Webhook" if each == BULKHEAD else each for each in order)


def _kubeconfig(server: str, options: ApiServerOptions) -> Document:
    authorities = base64.b64encode(options.authorities).decode("ascii")
    user = _user(options.client, options) if options.client else {}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": options.name, "cluster": {"server": server, "certificate-authority-data": authorities}}
        ],
        "users": [{"name": "kube-apiserver", "user": user}],
        "contexts": [{"name": options.name, "context": {"cluster": options.name, "user": "kube-apiserver"}}],
        "current-context": options.name,
    }


def _admission_kubeconfig(
    endpoint: AdmissionEndpoint, client: ClientPair, options: ApiServerOptions
) -> Document:
    """kube-apiserver finds its certificate for a webhook by the webhook's host and port."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "users": [{"name": endpoint.host_and_port, "user": _user(client, options)}],
    }


def _user(client: ClientPair, options: ApiServerOptions) -> dict[str, str]:
    if options.embed_client:
        return {
            "client-certificate-data": base64.b64encode(client.certificate).decode("ascii"),
            "client-key-data": base64.b64encode(client.key).decode("ascii"),
        }
    return {
        "client-certificate": options.path_of(CLIENT_CERTIFICATE),
        "client-key": options.path_of(CLIENT_KEY),
    }


def _authorization_configuration(config: Config, options: ApiServerOptions) -> Document:
    return {
        "apiVersion": _API_GROUP,
        "kind": "AuthorizationConfiguration",
        "authorizers": [
            {"type": "Webhook", "name": options.name, "webhook": _authorizer(config, options)}
            if each == BULKHEAD
            else {"type": each, "name": each.lower()}
            for each in options.authorizer_order
        ],
    }


def _authorizer(config: Config, options: ApiServerOptions) -> Document:
    # Modules are asked one after the other.
    seconds = sum(config.limits_of(module).wall_seconds for module in config.authorization.modules)
    webhook: dict[str, Any] = {
        "authorizedTTL": _AUTHORIZED_TTL,
        "unauthorizedTTL": _UNAUTHORIZED_TTL,
        "timeout": f"{timeout_seconds(seconds)}s",
        "subjectAccessReviewVersion": "v1",
        "matchConditionSubjectAccessReviewVersion": "v1",
        "failurePolicy": options.authorization_failure_policy,
        "connectionInfo": {
            "type": "KubeConfigFile",
            "kubeConfigFile": options.path_of(AUTHORIZATION_KUBECONFIG),
        },
    }
    if asked_before_others(options.authorizer_order):
        webhook["matchConditions"] = [{"expression": each} for each in _NOT_FOR_THE_CONTROL_PLANE]
    return webhook


def asked_before_others(order: Sequence[str]) -> bool:
    """Whether Bulkhead is asked about what a later authorizer would have allowed."""
    return not _GRANTING.isdisjoint(order[order.index(BULKHEAD) + 1 :])


def _admission_configuration(options: ApiServerOptions) -> Document:
    configuration = {
        "apiVersion": _API_GROUP,
        "kind": "WebhookAdmissionConfiguration",
        "kubeConfigFile": options.path_of(ADMISSION_KUBECONFIG),
    }
    return {
        "apiVersion": _API_GROUP,
        "kind": "AdmissionConfiguration",
        "plugins": [
            {"name": name, "configuration": configuration}
            for name in ("MutatingAdmissionWebhook", "ValidatingAdmissionWebhook")
        ],
    }
