"""Bulkhead changes, stops and comes back while a cluster goes on asking."""

from __future__ import annotations

import itertools
import json
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from tests.e2e.cluster import OPERATOR_TOKEN
from tests.e2e.environment import Environment, Webhooks, environment
from tests.e2e.guests import patching, refusing
from tests.e2e.load import load
from tests.e2e.test_reviews import config_map, refusal
from tests.support.guests import TRAPPING_AUTHN, TRAPPING_AUTHZ
from tests.support.served import wait_until

pytestmark = pytest.mark.e2e

Wat = Callable[[str], bytes]


@pytest.fixture
def webhooks(tmp_path: Path, wat: Wat) -> Webhooks:
    """Of this test only: it changes them."""
    return Webhooks.prepare(tmp_path / "bulkhead", wat)


@pytest.fixture
def changing(built: Path, etcd_url: str, webhooks: Webhooks, tmp_path: Path) -> Iterator[Environment]:
    """A cluster whose Bulkhead the test changes; it may also end it."""
    with (
        webhooks.serve() as served,
        environment(built, tmp_path / tmp_path.name, etcd_url, webhooks, served) as env,
    ):
        yield env


def create(env: Environment) -> Callable[[], Any]:
    """Creates a ConfigMap, which two modules are asked about; returns what became of it."""
    core = env.core

    def request() -> Any:
        return core.create_namespaced_config_map("default", {"metadata": {"generateName": "load-"}}).data

    return request


def generation(env: Environment) -> int:
    ready = env.webhooks.folder / "served" / "ready.json"
    return int(json.loads(ready.read_bytes())["generation"])


def certificate(env: Environment) -> str:
    """What Bulkhead shows."""
    return ssl.get_server_certificate(("127.0.0.1", env.webhooks.port))


def ask_about_everything(env: Environment) -> Callable[[], Any]:
    """One review of each kind; kube-apiserver remembers answers, so the questions are always others."""
    create_one, numbers = create(env), itertools.count()
    authentication, authorization = (
        client.AuthenticationV1Api(env.api()),
        client.AuthorizationV1Api(env.api()),
    )

    def request() -> Any:
        number = next(numbers)
        review = authentication.create_token_review({"spec": {"token": f"unknown-{number}"}})
        # What failed would be told after this.
        assert (review.status.authenticated, review.status.error) == (None, "invalid bearer token")
        review = authorization.create_subject_access_review(access(f"asked-{number}"))
        assert (review.status.allowed, review.status.evaluation_error) == (True, None)
        return create_one()

    return request


def access(name: str, user: str = "magic-user", *groups: str, resource: str = "configmaps") -> Any:
    attributes = {"verb": "get", "resource": resource, "name": name, "namespace": "default"}
    who = {"user": user, "groups": groups or ["magic-group"]}
    return {"spec": {**who, "resourceAttributes": attributes}}


def test_configuration_and_certificates_change_and_no_request_fails(changing: Environment, wat: Wat) -> None:
    env = changing
    with load(ask_about_everything(env)) as requests:
        requests.wait_for_more()
        # Another module under the same name.
        (env.webhooks.folder / "modules" / "another.wasm").write_bytes(
            wat(patching({"op": "add", "path": "/data", "value": {"another": "module"}}))
        )
        configuration = env.webhooks.configuration()
        another = {"name": "magic-mutate", "module": "../modules/another.wasm"}
        configuration["admission"]["modules"][0] |= another
        env.webhooks.configure(configuration)
        wait_until(lambda: generation(env) == 2, "the new configuration")
        requests.wait_for_more()
        # New certificates. kube-apiserver keeps its connections: a new one shows which it is.
        for _ in range(2):
            before = certificate(env)
            env.webhooks.renew_certificate()
            wait_until(lambda before=before: certificate(env) != before, "the new certificate")
            requests.wait_for_more()
        # A broken configuration changes nothing.
        env.webhooks.configure({"nonsense": {}})
        wait_until(lambda: "reload_refused" in env.served.log(), "the refusal")
        requests.wait_for_more()
    assert requests.failures == []
    assert requests.answers[0] == {"magic-value": "foobar"}
    assert requests.answers[-1] == {"another": "module"}
    assert all(each in ({"magic-value": "foobar"}, {"another": "module"}) for each in requests.answers)
    # Connections have stayed all the time. New ones are made with the new certificate, and what serves
    # them is the configuration that was good, whatever lies there now.
    env.served.worker("https").kill()
    wait_until(lambda: answered(create(env)) == {"another": "module"}, "an answer over a new connection", 60)


def answered(request: Callable[[], Any]) -> Any:
    try:
        return request()
    except client.ApiException:
        return None


def test_no_object_passes_unseen_while_it_restarts_under_load(changing: Environment) -> None:
    env = changing
    with load(create(env)) as requests:
        requests.wait_for_more()
        stop(env)
        wait_until(lambda: requests.failures, "a request that nobody answers")
        with env.webhooks.serve():
            requests.wait_for_more()
    assert all(answer == {"magic-value": "foobar"} for answer in requests.answers)
    for error in requests.failures:
        assert isinstance(error, client.ApiException)
        assert (error.status, "failed calling webhook" in error.body) == (500, True), error.body


def test_requests_are_answered_again_when_a_worker_was_killed(changing: Environment) -> None:
    env = changing
    with load(create(env)) as requests:
        requests.wait_for_more()
        env.served.worker("https").kill()
        requests.wait_for_more(100)
    assert all(answer == {"magic-value": "foobar"} for answer in requests.answers)


def allow_operator(env: Environment) -> client.ApiClient:
    """Somebody who may administer webhooks because RBAC says so, not because nothing is asked about them."""
    rbac = client.RbacAuthorizationV1Api(env.api())
    rules = [{"apiGroups": ["admissionregistration.k8s.io"], "resources": ["*"], "verbs": ["*"]}]
    rules += [{"apiGroups": [""], "resources": ["configmaps", "namespaces"], "verbs": ["*"]}]
    rbac.create_cluster_role({"metadata": {"name": "operator"}, "rules": rules})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "operator"}
    subjects = [{"kind": "User", "name": "operator", "apiGroup": "rbac.authorization.k8s.io"}]
    rbac.create_cluster_role_binding(
        {"metadata": {"name": "operator"}, "roleRef": reference, "subjects": subjects}
    )
    review = access("any", "operator", "nobody")
    wait_until(lambda: allowed(env, review), "RBAC's permission")
    return env.api(OPERATOR_TOKEN)


def allowed(env: Environment, review: Any) -> bool:
    return bool(client.AuthorizationV1Api(env.api()).create_subject_access_review(review).status.allowed)


def who(env: Environment, token: str) -> str | None:
    """The name of the token's owner; None if the API server does not know one."""
    try:
        review = client.AuthenticationV1Api(env.api(token)).create_self_subject_review({})
    except client.ApiException as error:
        if error.status != 401:
            raise
        return None
    name: str = review.status.user_info.username
    return name


def stop(env: Environment) -> None:
    env.served.process.send_signal(signal.SIGTERM)
    env.served.process.wait(30)


def test_tokens_and_access_without_bulkhead(changing: Environment) -> None:
    env = changing
    allow_operator(env)
    stop(env)
    assert who(env, "magic-token") is None
    assert not allowed(env, access("unseen"))
    # Those that need no answer of Bulkhead's
    assert who(env, OPERATOR_TOKEN) == "operator"
    assert allowed(env, access("unseen", "operator", "nobody"))
    with env.webhooks.serve():
        # Not one failure is remembered for an answer.
        assert who(env, "magic-token") == "magic-user"
        assert allowed(env, access("unseen"))


def test_modules_that_fail_authenticate_and_allow_nobody(changing: Environment, wat: Wat) -> None:
    env = changing
    allow_operator(env)
    good = env.webhooks.configuration()
    failing = json.loads(json.dumps(good))
    for section, guest in (("authentication", TRAPPING_AUTHN), ("authorization", TRAPPING_AUTHZ)):
        (env.webhooks.folder / "modules" / f"{section}.wasm").write_bytes(wat(guest))
        failing[section]["modules"] = [{"module": f"../modules/{section}.wasm"}]
    env.webhooks.configure(failing)
    wait_until(lambda: generation(env) == 2, "the modules that fail")
    assert who(env, "magic-token") is None
    assert not allowed(env, access("unseen"))
    assert allowed(env, access("unseen", "operator", "nobody"))
    env.webhooks.configure(good)
    wait_until(lambda: generation(env) == 3, "the modules that work")
    assert who(env, "magic-token") == "magic-user"
    assert allowed(env, access("unseen"))


def test_a_cluster_without_bulkhead_can_be_repaired(changing: Environment) -> None:
    env = changing
    operator = allow_operator(env)
    core, registration = client.CoreV1Api(operator), client.AdmissionregistrationV1Api(operator)
    stop(env)
    # failurePolicy Fail, Error and Ignore: what the cluster does without an answer
    status, message = refusal(core.create_namespaced_config_map, "default", config_map("unseen"))
    assert (status, "failed calling webhook" in message) == (500, True)
    assert refusal(env.create_custom, "erring", "two")[0] == 500
    assert env.create_custom("ignoring", "two")["metadata"]["name"] == "two"
    # What keeps the cluster, and Bulkhead, running is never asked about,
    core.create_namespaced_config_map("kube-system", config_map("unseen"))
    core.create_namespace({"metadata": {"name": "bulkhead"}})
    core.create_namespaced_config_map("bulkhead", config_map("bulkhead-config"))
    # nor are the webhook configurations: who may, can change them, or take them away.
    registration.delete_mutating_webhook_configuration("bulkhead")
    webhooks = registration.read_validating_webhook_configuration("bulkhead").webhooks
    lenient = [{"name": webhook.name, "failurePolicy": "Ignore"} for webhook in webhooks]
    registration.patch_validating_webhook_configuration("bulkhead", {"webhooks": lenient})
    one = {"metadata": {"generateName": "repaired-"}}
    wait_until(lambda: answered(lambda: core.create_namespaced_config_map("default", one)), "the repair", 30)
    assert env.create_custom("erring", "three")["metadata"]["name"] == "three"
    registration.delete_validating_webhook_configuration("bulkhead")


def test_a_broken_policy_can_be_repaired(changing: Environment, wat: Wat) -> None:
    """One that refuses everything, in place of one that worked."""
    env = changing
    env.webhooks.replace_module("stamp-second", wat(refusing("nothing at all")))
    wait_until(lambda: generation(env) == 2, "the broken policy")
    assert "nothing at all" in refusal(env.create_custom, "widgets", "one")[1]
    env.core.create_namespaced_config_map("default", config_map("others-still-work"))
    env.webhooks.replace_module("stamp-second", wat(patching()))
    wait_until(lambda: generation(env) == 3, "the repaired policy")
    assert env.create_custom("widgets", "one")["metadata"]["name"] == "one"
