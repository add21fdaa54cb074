"""The cluster's webhook configurations, made from the rules of admission modules."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bulkhead.service.config import AdmissionModuleConfig, Config, FailurePolicy, RuleConfig
from bulkhead.service.manifest_endpoint import AdmissionEndpoint
from bulkhead.service.manifest_yaml import Document
from bulkhead.service.rules import ANY, Target, any_matches, split_resource

MOST_SECONDS = 30  # kube-apiserver waits for no webhook longer
ANSWER_SECONDS = 1  # beyond what a module may take: to get there and back, and to wait for a turn
NAMESPACE_LABEL = "kubernetes.io/metadata.name"

ClusterPolicy = Literal["Fail", "Ignore"]

# What keeps the nodes of a cluster Ready.
_NODE_LEASE = Target(
    operation="UPDATE",
    group="coordination.k8s.io",
    version="v1",
    resource="leases",
    subresource="",
    namespace="kube-node-lease",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionOptions:
    """What the configuration does not say of the webhooks."""

    name: str
    """Of the two objects; webhooks are named below it."""
    endpoint: AdmissionEndpoint
    authorities: bytes
    """PEM: what kube-apiserver trusts."""
    excluded_namespaces: tuple[str, ...]
    error_policy: ClusterPolicy
    """What `failurePolicy: Error`, which leaves a failure to the cluster, is in the cluster."""
    reinvocation_policy: Literal["IfNeeded", "Never"]
    combined: bool
    """One webhook for each stage, instead of one for each module."""


@dataclass(frozen=True, slots=True)
class _Stage:
    kind: str
    path: str
    mutating: bool

    @property
    def verb(self) -> str:
        return self.path.strip("/")


_STAGES = (
    _Stage("MutatingWebhookConfiguration", "/mutate", True),
    _Stage("ValidatingWebhookConfiguration", "/validate", False),
)


@dataclass(frozen=True, slots=True)
class _Webhook:
    """What differs from one webhook to the next."""

    name: str
    path: str
    rules: Sequence[Document]
    failure_policy: ClusterPolicy
    seconds: float
    """What the modules behind it may take together."""


def webhook_configurations(config: Config, options: AdmissionOptions) -> list[Document]:
    """One object for each stage that has modules with rules; mutating ones first."""
    found: list[Document] = []
    for stage in _STAGES:
        modules = _asked(config, stage)
        if modules:
            webhooks = [
                _document(each, stage, options) for each in _webhooks(config, modules, stage, options)
            ]
            found.append(
                {
                    "apiVersion": "admissionregistration.k8s.io/v1",
                    "kind": stage.kind,
                    "metadata": {"name": options.name, "labels": {"app.kubernetes.io/name": "bulkhead"}},
                    "webhooks": webhooks,
                }
            )
    return found


def admission_notes(config: Config, options: AdmissionOptions) -> list[str]:
    """What is good to know of them."""
    notes = []
    for module in config.admission.modules:
        if not module.rules:
            notes.append(f"module {module.name} has no rules: it is left out, and never asked")
    for stage in _STAGES:
        for webhook in _webhooks(config, _asked(config, stage), stage, options):
            if webhook.seconds + ANSWER_SECONDS > MOST_SECONDS:
                notes.append(
                    f"webhook {webhook.name} may take {webhook.seconds:g} s, but kube-apiserver waits for "
                    f"{MOST_SECONDS} s at most; lower limits.timeout"
                )
    blocking = [
        module.name
        for module in config.admission.modules
        if _cluster_policy(module, options) == "Fail"
        and _NODE_LEASE.namespace not in options.excluded_namespaces
        and any_matches([rule.rule() for rule in module.rules], _NODE_LEASE)
    ]
    if blocking:
        notes.append(
            f"the rules of {', '.join(blocking)} cover the heartbeats of nodes, which stop being Ready "
            "while Bulkhead does not answer; narrow them, or give "
            f"--exclude-namespace {_NODE_LEASE.namespace}"
        )
    return notes


def timeout_seconds(module_seconds: float) -> int:
    """How long kube-apiserver should wait for modules that may take so long."""
    return max(1, min(MOST_SECONDS, math.ceil(module_seconds) + ANSWER_SECONDS))


def _asked(config: Config, stage: _Stage) -> list[AdmissionModuleConfig]:
    return [each for each in config.admission.modules if each.rules and each.mutating == stage.mutating]


def _webhooks(
    config: Config, modules: Sequence[AdmissionModuleConfig], stage: _Stage, options: AdmissionOptions
) -> list[_Webhook]:
    if not options.combined:
        return [
            _Webhook(
                f"{module.name}.{stage.verb}.{options.name}",
                f"{stage.path}/{module.name}",
                [cluster_rule(rule) for rule in module.rules],
                _cluster_policy(module, options),
                config.limits_of(module).wall_seconds,
            )
            for module in modules
        ]
    if not modules:
        return []
    rules: list[Document] = []
    for module in modules:
        rules += [rule for rule in map(cluster_rule, module.rules) if rule not in rules]
    times = [config.limits_of(module).wall_seconds for module in modules]
    strictest: ClusterPolicy = (
        "Fail" if any(_cluster_policy(each, options) == "Fail" for each in modules) else "Ignore"
    )
    # Mutating modules are asked one after the other, validating ones at the same time.
    seconds = sum(times) if stage.mutating else max(times)
    return [_Webhook(f"all.{stage.verb}.{options.name}", stage.path, rules, strictest, seconds)]


def _cluster_policy(module: AdmissionModuleConfig, options: AdmissionOptions) -> ClusterPolicy:
    """What becomes of a request when Bulkhead gives no answer."""
    match module.failure_policy:
        case FailurePolicy.FAIL:
            return "Fail"
        case FailurePolicy.IGNORE:
            return "Ignore"
        case FailurePolicy.ERROR:
            return options.error_policy


def cluster_rule(rule: RuleConfig) -> dict[str, Any]:
    """The rule as kube-apiserver takes it: it refuses entries beside a wildcard that covers them."""
    return {
        "operations": _unless_any(rule.operations),
        "apiGroups": _unless_any(rule.api_groups),
        "apiVersions": _unless_any(rule.api_versions),
        "resources": [
            each
            for each in dict.fromkeys(rule.resources)
            if not any(_covers(other, each) for other in rule.resources if other != each)
        ],
        "scope": rule.scope,
    }


def _unless_any(values: Sequence[str]) -> list[str]:
    return [ANY] if ANY in values else list(dict.fromkeys(values))


def _covers(pattern: str, other: str) -> bool:
    """Whether kube-apiserver refuses `other` beside `pattern`, which matches all that it matches."""
    if pattern == f"{ANY}/{ANY}":
        return True
    mine, its = split_resource(pattern), split_resource(other)
    if bool(mine[1]) != bool(its[1]):
        return False  # it takes `pods` beside `pods/*`
    return all(part in (ANY, theirs) for part, theirs in zip(mine, its, strict=True))


def _document(webhook: _Webhook, stage: _Stage, options: AdmissionOptions) -> Document:
    bundle = base64.b64encode(options.authorities).decode("ascii")
    document: dict[str, Any] = {
        "name": webhook.name,
        "clientConfig": {**options.endpoint.client_config(webhook.path), "caBundle": bundle},
        "rules": list(webhook.rules),
        "failurePolicy": webhook.failure_policy,
        "matchPolicy": "Equivalent",
    }
    if options.excluded_namespaces:
        document["namespaceSelector"] = {
            "matchExpressions": [
                {"key": NAMESPACE_LABEL, "operator": "NotIn", "values": list(options.excluded_namespaces)}
            ]
        }
    document["sideEffects"] = "None"
    document["timeoutSeconds"] = timeout_seconds(webhook.seconds)
    document["admissionReviewVersions"] = ["v1"]
    if stage.mutating:
        document["reinvocationPolicy"] = options.reinvocation_policy
    return document
