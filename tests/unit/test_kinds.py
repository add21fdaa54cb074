"""From kinds to resources, checked against Kubernetes' own list of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import lightkube.resources
import pytest
from lightkube.core.resource import ApiInfo, GlobalResource, Resource

from bulkhead.service import kinds
from bulkhead.service.kinds import guess_resource, is_cluster_scoped


def built_in() -> Iterator[tuple[ApiInfo, bool]]:
    """Every resource of Kubernetes' OpenAPI document, and whether it is in no namespace."""
    for found in pkgutil.iter_modules(lightkube.resources.__path__):
        module = importlib.import_module(f"lightkube.resources.{found.name}")
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, Resource) and each.__module__ == module.__name__:
                info = each._api_info
                if info.parent is None:  # else it is a subresource
                    yield info, issubclass(each, GlobalResource)


def test_every_built_in_kind_is_guessed_right() -> None:
    wrong, count = [], 0
    for info, in_no_namespace in built_in():
        group, version, kind = info.resource.group, info.resource.version, info.resource.kind
        count += 1
        guess = guess_resource(group, version, kind)
        expected = (info.plural, in_no_namespace)
        if (group, kind) != ("", "Binding") and expected != (guess.resource, is_cluster_scoped(group, kind)):
            wrong.append((info.resource, expected))
    assert wrong == []
    assert count > 60


@pytest.mark.parametrize(
    ("group", "kind", "expected"),
    [
        ("", "Endpoints", "endpoints"),
        ("networking.k8s.io", "Ingress", "ingresses.v1.networking.k8s.io"),
        ("networking.k8s.io", "NetworkPolicy", "networkpolicies.v1.networking.k8s.io"),
        ("gateway.networking.k8s.io", "Gateway", "gateways.v1.gateway.networking.k8s.io"),
        ("example.com", "Widget", "widgets.v1.example.com"),
        ("", "PodExecOptions", "pods/exec"),
        ("policy", "Eviction", "pods/eviction"),
        ("", "Binding", "pods/binding"),
        ("authentication.k8s.io", "TokenRequest", "serviceaccounts/token"),
    ],
)
def test_guesses_the_resource_of_a_kind(group: str, kind: str, expected: str) -> None:
    assert str(guess_resource(group, "v1", kind)) == expected


@pytest.mark.parametrize(
    "kind", ["Endpoints", "Ingress", "NetworkPolicy", "Pod", "IPAddress", "Gateway", "Proxy"]
)
def test_the_rule_is_that_of_apimachinery(kind: str) -> None:
    said = {  # by meta.UnsafeGuessKindToResource
        "Endpoints": "endpoints", "Ingress": "ingresses", "NetworkPolicy": "networkpolicies", "Pod": "pods",
        "IPAddress": "ipaddresses", "Gateway": "gatewaies", "Proxy": "proxies",
    }  # fmt: skip
    assert kinds._plural(kind) == said[kind]
