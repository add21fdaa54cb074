"""Rules match as kube-apiserver's do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.service.rules import Rule, Target, any_matches, split_resource


def rule(
    operations: str = "*", groups: str = "*", versions: str = "*", resources: str = "*/*", scope: str = "*"
) -> Rule:
    """A rule; lists are written with blanks between, `core` is the group without a name."""
    return Rule(
        operations=frozenset(operations.split()),
        groups=frozenset("" if group == "core" else group for group in groups.split()),
        versions=frozenset(versions.split()),
        resources=tuple(split_resource(pattern) for pattern in resources.split()),
        scope=scope,
    )


def target(
    resource: str = "pods",
    operation: str = "CREATE",
    group: str = "",
    version: str = "v1",
    namespace: str = "default",
) -> Target:
    name, subresource = split_resource(resource)
    return Target(
        operation=operation,
        group=group,
        version=version,
        resource=name,
        subresource=subresource,
        namespace=namespace,
    )


@pytest.mark.parametrize(
    ("patterns", "resource", "expected"),
    [
        ("pods", "pods", True),
        ("pods", "pods/exec", False),
        ("pods", "services", False),
        ("*", "pods", True),
        ("*", "pods/exec", False),
        ("pods/*", "pods/exec", True),
        ("pods/*", "pods", True),  # as in kube-apiserver's code, whatever its documentation says
        ("pods/*", "services/status", False),
        ("*/scale", "deployments/scale", True),
        ("*/scale", "deployments/status", False),
        ("*/scale", "deployments", False),
        ("*/*", "pods", True),
        ("*/*", "pods/exec", True),
        ("pods/exec", "pods/exec", True),
        ("pods/exec", "pods", False),
        ("services pods/exec", "pods/exec", True),
    ],
)
def test_matches_resources_and_subresources(patterns: str, resource: str, expected: bool) -> None:
    assert rule(resources=patterns).matches(target(resource)) is expected


@pytest.mark.parametrize(
    ("operations", "operation", "expected"),
    [
        ("CREATE", "CREATE", True),
        ("CREATE UPDATE", "DELETE", False),
        ("*", "CONNECT", True),
        ("CONNECT", "CONNECT", True),
    ],
)
def test_matches_operations(operations: str, operation: str, expected: bool) -> None:
    assert rule(operations=operations).matches(target(operation=operation)) is expected


@pytest.mark.parametrize(
    ("groups", "versions", "group", "version", "expected"),
    [
        ("core", "v1", "", "v1", True),
        ("core", "v1", "apps", "v1", False),
        ("apps", "v1", "", "v1", False),
        ("apps core", "v1 v1beta1", "apps", "v1beta1", True),
        ("apps", "v1", "apps", "v1beta1", False),
        ("*", "*", "example.com", "v1alpha1", True),
    ],
)
def test_matches_groups_and_versions(
    groups: str, versions: str, group: str, version: str, expected: bool
) -> None:
    assert rule(groups=groups, versions=versions).matches(target(group=group, version=version)) is expected


@pytest.mark.parametrize(
    ("scope", "resource", "group", "namespace", "expected"),
    [
        ("Namespaced", "pods", "", "default", True),
        ("Namespaced", "nodes", "", "", False),
        ("Cluster", "pods", "", "default", False),
        ("Cluster", "nodes", "", "", True),
        ("*", "pods", "", "default", True),
        ("*", "nodes", "", "", True),
        # A Namespace is cluster-scoped, though its requests carry its own name as namespace.
        ("Namespaced", "namespaces", "", "default", False),
        ("Cluster", "namespaces", "", "default", True),
        ("Cluster", "namespaces/status", "", "default", True),
        ("Namespaced", "namespaces", "example.com", "default", True),
    ],
)
def test_matches_scopes(scope: str, resource: str, group: str, namespace: str, expected: bool) -> None:
    asked = target(resource, group=group, namespace=namespace)
    assert rule(scope=scope).matches(asked) is expected


def test_without_rules_nothing_matches() -> None:
    assert any_matches((), target()) is False


def test_one_matching_rule_is_enough() -> None:
    assert any_matches((rule(resources="services"), rule(resources="pods")), target()) is True


_WORDS = st.sampled_from(["*", "a", "b"])
_LISTS = st.lists(_WORDS, min_size=1, max_size=3)
_RESOURCES = st.sampled_from(
    ["*", "pods", "namespaces", "*/*", "pods/*", "*/scale", "pods/scale", "namespaces/scale"]
)


def reference(  # the words of the Kubernetes documentation, one after the other
    operations: list[str],
    groups: list[str],
    versions: list[str],
    resources: list[str],
    scope: str,
    asked: Target,
) -> bool:
    def one_of(listed: list[str], value: str) -> bool:
        return any(each in ("*", value) for each in listed)

    def resource_fits(pattern: str) -> bool:
        if "/" not in pattern:
            return asked.subresource == "" and pattern in ("*", asked.resource)
        name, sub = pattern.split("/")
        return name in ("*", asked.resource) and sub in ("*", asked.subresource)

    is_namespace = asked.resource == "namespaces" and asked.group == "" and asked.version == "v1"
    in_namespace = asked.namespace != "" and not is_namespace
    scope_fits = {"*": True, "Namespaced": in_namespace, "Cluster": not in_namespace}[scope]
    return (
        one_of(operations, asked.operation)
        and one_of(groups, asked.group)
        and one_of(versions, asked.version)
        and any(resource_fits(pattern) for pattern in resources)
        and scope_fits
    )


@given(
    operations=_LISTS,
    groups=st.lists(st.sampled_from(["*", "", "a"]), min_size=1, max_size=3),
    versions=st.lists(st.sampled_from(["*", "v1", "b"]), min_size=1, max_size=3),
    resources=st.lists(_RESOURCES, min_size=1, max_size=3),
    scope=st.sampled_from(["*", "Cluster", "Namespaced"]),
    asked=st.builds(
        Target,
        operation=st.sampled_from(["a", "b", "c"]),
        group=st.sampled_from(["", "a", "c"]),
        version=st.sampled_from(["v1", "b", "c"]),
        resource=st.sampled_from(["pods", "namespaces", "nodes"]),
        subresource=st.sampled_from(["", "scale", "status"]),
        namespace=st.sampled_from(["", "default"]),
    ),
)
def test_agrees_with_the_documentation_over_all_rules(
    operations: list[str],
    groups: list[str],
    versions: list[str],
    resources: list[str],
    scope: str,
    asked: Target,
) -> None:
    built = Rule(
        operations=frozenset(operations),
        groups=frozenset(groups),
        versions=frozenset(versions),
        resources=tuple(split_resource(pattern) for pattern in resources),
        scope=scope,
    )
    assert built.matches(asked) == reference(operations, groups, versions, resources, scope, asked)
    assert built.matches(asked) == (not built.mismatches(asked))


def test_says_which_keys_of_a_rule_do_not_match() -> None:
    built = rule(operations="UPDATE", groups="apps", versions="v2", resources="pods/*", scope="Cluster")
    assert built.mismatches(target("nodes")) == [
        "operations", "apiGroups", "apiVersions", "resources", "scope",
    ]  # fmt: skip
    assert built.mismatches(target("pods/exec", "UPDATE", "apps", "v2")) == ["scope"]
