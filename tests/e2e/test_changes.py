"""Bulkhead changes, stops and comes back while a cluster goes on asking."""

from __future__ import annotations

import json
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from tests.e2e.environment import Environment, Webhooks, environment
from tests.e2e.guests import patching, refusing
from tests.e2e.load import load
from tests.e2e.test_reviews import config_map, refusal
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


def replace_file(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.rename(path)


def generation(env: Environment) -> int:
    ready = env.webhooks.folder / "served" / "ready.json"
    return int(json.loads(ready.read_bytes())["generation"])


def certificate(env: Environment) -> str:
    """What Bulkhead shows."""
    return ssl.get_server_certificate(("127.0.0.1", env.webhooks.port))


def test_configuration_and_certificates_change_and_no_request_fails(changing: Environment, wat: Wat) -> None:
    env, folder = changing, changing.webhooks.folder
    with load(create(env)) as requests:
        requests.wait_for_more()
        # Another module under the same name.
        module = wat(patching({"op": "add", "path": "/data", "value": {"another": "module"}}))
        config = json.loads(env.webhooks.config.read_text())
        (folder / "another.wasm").write_bytes(module)
        config["admission"]["modules"][0] |= {"name": "magic-mutate", "module": "another.wasm"}
        replace_file(env.webhooks.config, json.dumps(config).encode())
        wait_until(lambda: generation(env) == 2, "the new configuration")
        requests.wait_for_more()
        # A new certificate, swapped in as Kubernetes does it: first a file, now a link.
        before = certificate(env)
        env.webhooks.server_ca.server().write(folder / "..data")
        for name in ("tls.crt", "tls.key"):
            (folder / f"{name}.new").symlink_to(f"..data/{name}")
            (folder / f"{name}.new").rename(folder / name)
        wait_until(lambda: certificate(env) != before, "the new certificate")
        requests.wait_for_more()
        # A broken configuration changes nothing.
        replace_file(env.webhooks.config, b"nonsense: {}")
        wait_until(lambda: "reload_refused" in env.served.log(), "the refusal")
        requests.wait_for_more()
    assert requests.failures == []
    assert requests.answers[0] == {"magic-value": "foobar"}
    assert requests.answers[-1] == {"another": "module"}
    assert all(each in ({"magic-value": "foobar"}, {"another": "module"}) for each in requests.answers)


def test_no_object_passes_unseen_while_it_restarts_under_load(changing: Environment) -> None:
    env = changing
    with load(create(env)) as requests:
        requests.wait_for_more()
        env.served.process.send_signal(signal.SIGTERM)
        env.served.process.wait(30)
        wait_until(lambda: requests.failures, "a request that nobody answers")
        with env.webhooks.serve():
            requests.wait_for_more()
    assert all(answer == {"magic-value": "foobar"} for answer in requests.answers)
    assert all(isinstance(error, client.ApiException) and error.status == 500 for error in requests.failures)


def test_requests_are_answered_again_when_a_worker_was_killed(changing: Environment) -> None:
    env = changing
    with load(create(env)) as requests:
        requests.wait_for_more()
        env.served.worker("https").kill()
        requests.wait_for_more(100)
    assert all(answer == {"magic-value": "foobar"} for answer in requests.answers)


def test_a_cluster_without_bulkhead_can_be_repaired(changing: Environment) -> None:
    env = changing
    env.served.process.send_signal(signal.SIGTERM)
    env.served.process.wait(30)
    # failurePolicy Fail, Error and Ignore: what the cluster does without an answer
    status, message = refusal(env.core.create_namespaced_config_map, "default", config_map("unseen"))
    assert (status, "failed calling webhook" in message) == (500, True)
    assert refusal(env.create_custom, "erring", "two")[0] == 500
    assert env.create_custom("ignoring", "two")["metadata"]["name"] == "two"
    # What keeps the cluster, and Bulkhead, running is never asked about,
    env.core.create_namespaced_config_map("kube-system", config_map("unseen"))
    env.core.create_namespace({"metadata": {"name": "bulkhead"}})
    env.core.create_namespaced_config_map("bulkhead", config_map("bulkhead-config"))
    # nor are the webhook configurations: who may, can take them away.
    registration = client.AdmissionregistrationV1Api(env.api())
    registration.delete_mutating_webhook_configuration("bulkhead")
    registration.delete_validating_webhook_configuration("bulkhead")

    def passes() -> bool:
        try:
            env.core.create_namespaced_config_map("default", {"metadata": {"generateName": "repaired-"}})
        except client.ApiException:
            return False
        return True

    wait_until(passes, "requests without webhooks", 30)


def test_a_broken_policy_can_be_repaired(changing: Environment, wat: Wat) -> None:
    """One that refuses everything, in place of one that worked."""
    env, folder = changing, changing.webhooks.folder
    replace_file(folder / "stamp-second.wasm", wat(refusing("nothing at all")))
    wait_until(lambda: generation(env) == 2, "the broken policy")
    assert "nothing at all" in refusal(env.create_custom, "widgets", "one")[1]
    env.core.create_namespaced_config_map("default", config_map("others-still-work"))
    replace_file(folder / "stamp-second.wasm", wat(patching()))
    wait_until(lambda: generation(env) == 3, "the repaired policy")
    assert env.create_custom("widgets", "one")["metadata"]["name"] == "one"
