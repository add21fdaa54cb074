"""Which admission requests a module is asked about: Kubernetes' webhook rules.

The semantics are those of kube-apiserver's matcher
(apiserver/pkg/admission/plugin/webhook/predicates/rules), subtleties included: `pods/*` matches
`pods` itself as well, and objects of kind Namespace count as cluster-scoped although their
requests name a namespace.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ANY = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What of an admission request the rules look at."""

    operation: str
    group: str
    version: str
    resource: str
    subresource: str
    """Empty if the request is for the resource itself."""
    namespace: str
    """Empty for cluster-scoped objects; their own name for Namespaces."""

    @property
    def is_namespace(self) -> bool:
        return (self.group, self.version, self.resource) == ("", "v1", "namespaces")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: a request must match each of its parts."""

    operations: frozenset[str]
    groups: frozenset[str]
    versions: frozenset[str]
    resources: tuple[tuple[str, str], ...]
    """Resource and subresource; see `split_resource`."""
    scope: str
    """`Cluster`, `Namespaced` or `*`."""

    def matches(self, target: Target) -> bool:
        """Whether the rule is about this request."""
        return (
            _has(self.operations, target.operation)
            and _has(self.groups, target.group)
            and _has(self.versions, target.version)
            and self._matches_resource(target)
            and self._matches_scope(target)
        )

    def mismatches(self, target: Target) -> list[str]:
        """The keys of the rule that keep it from matching; none if it matches."""
        parts = {
            "operations": _has(self.operations, target.operation),
            "apiGroups": _has(self.groups, target.group),
            "apiVersions": _has(self.versions, target.version),
            "resources": self._matches_resource(target),
            "scope": self._matches_scope(target),
        }
        return [key for key, matches in parts.items() if not matches]

    def _matches_resource(self, target: Target) -> bool:
        return any(
            resource in (ANY, target.resource) and subresource in (ANY, target.subresource)
            for resource, subresource in self.resources
        )

    def _matches_scope(self, target: Target) -> bool:
        if self.scope == ANY:
            return True
        cluster_scoped = target.is_namespace or not target.namespace
        return cluster_scoped == (self.scope == "Cluster")


def split_resource(pattern: str) -> tuple[str, str]:
    """`pods` is (`pods`, ``), `pods/*` is (`pods`, `*`)."""
    resource, _, subresource = pattern.partition("/")
    return resource, subresource


def any_matches(rules: Iterable[Rule], target: Target) -> bool:
    """Whether one of the rules is about this request. Without rules: never."""
    return any(rule.matches(target) for rule in rules)


def _has(allowed: frozenset[str], value: str) -> bool:
    return ANY in allowed or value in allowed
