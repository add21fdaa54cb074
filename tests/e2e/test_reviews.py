"""What users of a cluster see whose API server asks Bulkhead."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kubernetes import client

from tests.e2e.environment import Environment
from tests.e2e.guests import GROUP
from tests.support.served import wait_until

pytestmark = pytest.mark.e2e


def refusal(call: Any, *arguments: Any, **options: Any) -> tuple[int, str]:
    """The status and the message with which the API server refuses."""
    with pytest.raises(client.ApiException) as caught:
        call(*arguments, **options)
    return caught.value.status, json.loads(caught.value.body)["message"]


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "data": data}


# Who is this?


def test_a_token_that_a_module_knows(env: Environment) -> None:
    review = client.AuthenticationV1Api(env.api("magic-token")).create_self_subject_review({})
    user = review.status.user_info
    assert (user.username, user.uid) == ("magic-user", "0")
    assert set(user.groups) == {"magic-group", "system:authenticated"}


def test_a_token_that_nobody_knows(env: Environment) -> None:
    status, _ = refusal(client.AuthenticationV1Api(env.api("another")).create_self_subject_review, {})
    assert status == 401


# May they?


def test_what_a_module_allows_and_what_nobody_allows(env: Environment) -> None:
    magic = client.CoreV1Api(env.api("magic-token"))
    magic.create_namespaced_config_map("default", config_map("by-magic-user"))
    assert magic.read_namespaced_config_map("by-magic-user", "default").metadata.name == "by-magic-user"
    magic.delete_namespaced_config_map("by-magic-user", "default")
    status, message = refusal(magic.list_namespaced_pod, "default")
    assert status == 403
    assert 'User "magic-user" cannot list resource "pods"' in message


# May this object pass, and how should it change?


def test_objects_are_changed(env: Environment) -> None:
    made = env.core.create_namespaced_config_map("default", config_map("changed", a="b"))
    assert made.data == {"a": "b", "magic-value": "foobar"}
    assert env.core.read_namespaced_config_map("changed", "default").data == made.data
    replaced = env.core.replace_namespaced_config_map("changed", "default", config_map("changed", c="d"))
    assert replaced.data == {"c": "d", "magic-value": "foobar"}
    patched = env.core.patch_namespaced_config_map("changed", "default", {"data": {"magic-value": "mine"}})
    assert patched.data == {"c": "d", "magic-value": "foobar"}
    env.core.delete_namespaced_config_map("changed", "default")


@pytest.mark.parametrize("how", ["create", "replace", "patch", "apply"])
def test_objects_are_refused_however_they_come(env: Environment, how: str) -> None:
    core, name = env.core, f"refused-{how}"
    bad = config_map(name, **{"not-allowed-value": "x"})
    if how == "create":
        status, message = refusal(core.create_namespaced_config_map, "default", bad)
    else:
        core.create_namespaced_config_map("default", config_map(name, a="b"))
        if how == "replace":
            status, message = refusal(core.replace_namespaced_config_map, name, "default", bad)
        elif how == "patch":
            status, message = refusal(
                core.patch_namespaced_config_map, name, "default", {"data": bad["data"]}
            )
        else:
            applied = {"apiVersion": "v1", "kind": "ConfigMap", **bad}
            status, message = refusal(
                core.patch_namespaced_config_map,
                name,
                "default",
                applied,
                field_manager="e2e",
                force=True,
                _content_type="application/apply-patch+yaml",
            )
        assert core.read_namespaced_config_map(name, "default").data == {"a": "b", "magic-value": "foobar"}
    assert 400 <= status < 500
    assert "magic-validate" in message


def test_dry_runs_are_reviewed_and_change_nothing(env: Environment) -> None:
    made = env.core.create_namespaced_config_map("default", config_map("dry"), dry_run="All")
    assert made.data == {"magic-value": "foobar"}
    bad = config_map("dry", **{"not-allowed-value": "x"})
    status, _ = refusal(env.core.create_namespaced_config_map, "default", bad, dry_run="All")
    assert 400 <= status < 500
    status, _ = refusal(env.core.read_namespaced_config_map, "dry", "default")
    assert status == 404


def test_several_mutators_see_the_work_of_those_before(env: Environment) -> None:
    made = env.create_custom("widgets", "stamped-in-order")
    assert made["metadata"]["labels"] == {"made-by": "e2e", "first": "stamped", "second": "stamped"}


def test_a_mutator_is_asked_again_when_another_has_changed_the_object(env: Environment) -> None:
    """reinvocationPolicy IfNeeded: the first sees what the second has done."""
    env.create_custom("widgets", "stamped")
    reviews = env.reviews(resource="widgets", name="stamped", stage="mutating")
    asked = [module["name"] for review in reviews for module in review["modules"]]
    assert asked == ["stamp-first", "stamp-second", "stamp-first"]


def test_subresources_are_refused(env: Environment) -> None:
    apps = client.AppsV1Api(env.api())
    labels = {"app": "scaled"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod}
    apps.create_namespaced_deployment("default", {"metadata": {"name": "scaled"}, "spec": spec})
    scale = {"spec": {"replicas": 3}}
    status, message = refusal(apps.patch_namespaced_deployment_scale, "scaled", "default", scale)
    assert (status, "no scaling here" in message) == (403, True)
    assert apps.read_namespaced_deployment("scaled", "default").spec.replicas == 1


def test_connecting_is_refused(env: Environment) -> None:
    pod = {"metadata": {"name": "shell"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    env.core.create_namespaced_pod("default", pod)
    status, message = refusal(
        env.core.connect_post_namespaced_pod_exec, "shell", "default", command=["sh"], stdout=True
    )
    assert (status, "no shells here" in message) == (403, True)


def test_deleting_is_refused(env: Environment) -> None:
    env.core.create_namespaced_secret("default", {"metadata": {"name": "kept"}, "stringData": {"a": "b"}})
    status, message = refusal(env.core.delete_namespaced_secret, "kept", "default")
    assert (status, "secrets stay" in message) == (403, True)
    assert env.core.read_namespaced_secret("kept", "default").metadata.name == "kept"


def test_deleting_all_at_once_is_refused(env: Environment) -> None:
    env.core.create_namespaced_secret("default", {"metadata": {"name": "one-of-all"}})
    status, message = refusal(env.core.delete_collection_namespaced_secret, "default")
    assert (status, "secrets stay" in message) == (403, True)
    assert env.core.read_namespaced_secret("one-of-all", "default").metadata.name == "one-of-all"


def test_custom_resources_are_refused_only_where_a_rule_says_so(env: Environment) -> None:
    assert env.create_custom("frozen", "one")["metadata"]["name"] == "one"
    status, message = refusal(env.patch_custom, "frozen", "one", {"spec": {"a": 1}})
    assert (status, "stays as it is" in message) == (403, True)
    assert "spec" not in env.custom.get_namespaced_custom_object(GROUP, "v1", "default", "frozen", "one")
    env.custom.delete_namespaced_custom_object(GROUP, "v1", "default", "frozen", "one")


def test_warnings_reach_the_client_and_annotations_the_audit_log(env: Environment) -> None:
    _, headers = env.create_custom_with_headers("talking", "one")
    assert "talks: mind the gap" in headers["Warning"]
    wait_until(lambda: env.cluster.audited("one"), "the audit event")
    annotations = [
        each for each in env.cluster.audited("one") if "talks.validate.bulkhead/talks_seen" in each
    ]
    assert [each["talks.validate.bulkhead/talks_seen"] for each in annotations] == ["yes"]


def test_nobody_but_the_api_server_is_answered(env: Environment) -> None:
    assert env.webhooks.ask_as(env.webhooks.client_ca.client("kube-apiserver")) == 200
    assert env.webhooks.ask_as(env.webhooks.client_ca.client("somebody")) == 403
    assert env.webhooks.ask_as(None) == 401


# What a failure becomes


def test_a_failure_with_policy_fail_denies(env: Environment) -> None:
    status, message = refusal(env.create_custom, "failing", "one")
    assert status == 500
    assert "module fails failed: trap" in message
    assert "failed calling webhook" not in message, "it is a denial, which the cluster cannot ignore"


def test_a_failure_with_policy_ignore_lets_pass(env: Environment) -> None:
    assert env.create_custom("ignoring", "one")["metadata"]["name"] == "one"


def test_a_failure_with_policy_error_is_left_to_the_cluster(env: Environment) -> None:
    status, message = refusal(env.create_custom, "erring", "one")
    assert status == 500
    assert "failed calling webhook" in message


def test_a_module_that_is_too_slow_has_failed(env: Environment) -> None:
    status, message = refusal(env.create_custom, "sleeping", "one")
    assert (status, "module sleeps failed: timeout" in message) == (500, True)
    assert env.create_custom("dozing", "one")["metadata"]["name"] == "one"
    status, message = refusal(env.create_custom, "napping", "one")
    assert (status, "failed calling webhook" in message) == (500, True)
