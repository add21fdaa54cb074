"""The API server's older flags, in both versions of the reviews."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client

from tests.e2e.cluster import Cluster, kube_apiserver
from tests.e2e.environment import Webhooks, legacy_flags
from tests.e2e.test_reviews import config_map, refusal
from tests.support.served import Served

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=["v1", "v1beta1"])
def cluster(
    request: pytest.FixtureRequest,
    built: Path,
    etcd_url: str,
    webhooks: Webhooks,
    served: Served,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp(f"legacy-{request.param}")
    flags = legacy_flags(webhooks.manifests, request.param)
    with kube_apiserver(built, folder, etcd_url, *flags, authorization=None) as cluster:
        yield cluster


def test_tokens(cluster: Cluster) -> None:
    review = client.AuthenticationV1Api(cluster.api("magic-token")).create_self_subject_review({})
    assert review.status.user_info.username == "magic-user"
    status, _ = refusal(client.AuthenticationV1Api(cluster.api("another")).create_self_subject_review, {})
    assert status == 401


def test_access(cluster: Cluster) -> None:
    magic = client.CoreV1Api(cluster.api("magic-token"))
    magic.create_namespaced_config_map("default", config_map("by-magic-user"))
    magic.delete_namespaced_config_map("by-magic-user", "default")
    status, message = refusal(magic.list_namespaced_secret, "default")
    assert (status, 'cannot list resource "secrets"' in message) == (403, True)
