"""`bulkhead serve` takes up what changes on disk, all of it or nothing."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from bulkhead.v1 import reviews_pb2, reviews_pb2_grpc
from tests.support.certificates import Authority, Pair
from tests.support.guests import PRELUDE, printing
from tests.support.served import Served, command, serve, wait_until

Wat = Callable[[str], bytes]

TOKEN_REVIEW = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "t"}}
CONFIGURATION = """
authentication: {modules: [{name: who, module: who.wasm}]}
server: {gracePeriod: 5s}
"""
NOT_WASM = b"this is no module"


def knows(user: str) -> str:
    """Output of a module that takes every token for that user's."""
    status = {"authenticated": True, "user": {"username": user}}
    response = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}
    return json.dumps({"response": response})


def slow(text: str, seconds: float) -> str:
    """A module of `printing` that sleeps first."""
    prelude = PRELUDE.replace("3600000000000", str(int(seconds * 1e9)))
    return text.replace(PRELUDE, prelude).replace(
        '(func (export "authn")', '(func (export "authn") (call $sleep_an_hour)'
    )


def replace_file(path: Path, data: bytes) -> None:
    """As careful tools do it: never half a file under the name."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.rename(path)


class Reloading:
    """A service, and the files that it was started with."""

    def __init__(self, folder: Path, wat: Wat, served: Served) -> None:
        self.folder = folder
        self.served = served
        self._wat = wat
        self._ready_file = folder / "ready.json"

    def user(self) -> str | None:
        """Whom the service takes the token for, over HTTPS; over gRPC it must say the same."""
        user: str | None = (
            self.served.review("/authn", TOKEN_REVIEW)["status"].get("user", {}).get("username")
        )
        return user

    def user_over_grpc(self) -> str:
        stub = reviews_pb2_grpc.ReviewServiceStub(self.served.channel())
        request = reviews_pb2.AuthenticateRequest(review=json.dumps(TOKEN_REVIEW).encode())
        return str(json.loads(stub.Authenticate(request).review)["status"]["user"]["username"])

    def put(self, name: str, text: str) -> None:
        replace_file(self.folder / name, self._wat(text))

    def configure(self, text: str) -> None:
        replace_file(self.folder / "bulkhead.yaml", text.encode())

    def hang_up(self) -> None:
        self.served.process.send_signal(signal.SIGHUP)

    @property
    def generation(self) -> int:
        return int(json.loads(self._ready_file.read_bytes())["generation"])

    def wait_for_generation(self, number: int) -> None:
        wait_until(lambda: self.generation >= number, f"generation {number}; {self.served.log()[-2000:]}")

    def wait_for_log(self, event: str, times: int = 1) -> str:
        """Waits until the log has an event; returns its last line of it."""
        wait_until(lambda: self.served.log().count(event) >= times, event)
        return [line for line in self.served.log().splitlines() if event in line][-1]


Start = Callable[..., Any]


@contextmanager
def reloading(
    folder: Path, wat: Wat, configuration: str = CONFIGURATION, *options: str
) -> Iterator[Reloading]:
    folder.mkdir(exist_ok=True)
    (folder / "bulkhead.yaml").write_text(configuration)
    if not (folder / "who.wasm").exists():
        (folder / "who.wasm").write_bytes(wat(printing("authn", knows("first"))))
    with serve(folder, "--config", str(folder / "bulkhead.yaml"), *options) as served:
        yield Reloading(folder, wat, served)


@pytest.fixture
def service(tmp_path: Path, wat: Wat) -> Iterator[Reloading]:
    with reloading(tmp_path, wat) as service:
        yield service


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, wat: Wat) -> Iterator[Reloading]:
    """Tests repair what they break."""
    with reloading(tmp_path_factory.mktemp("shared"), wat) as service:
        yield service


def test_a_changed_module_is_taken_up_by_both_front_ends(service: Reloading) -> None:
    assert service.user() == "first"
    service.put("who.wasm", printing("authn", knows("second")))
    service.wait_for_generation(2)
    assert service.user() == service.user_over_grpc() == "second"
    assert "reloaded" in service.wait_for_log("reloaded")


def test_a_changed_configuration_is_taken_up(service: Reloading) -> None:
    service.put("other.wasm", printing("authn", knows("other")))
    service.configure("authentication: {modules: [{name: other, module: other.wasm}]}")
    service.wait_for_generation(2)
    assert service.user() == service.user_over_grpc() == "other"
    modules = json.loads((service.folder / "ready.json").read_bytes())["modules"]
    assert [module["name"] for module in modules] == ["other"]


def test_links_are_followed_when_they_are_swapped(tmp_path: Path, wat: Wat) -> None:
    """As Kubernetes mounts a ConfigMap."""
    for version, user in (("..one", "first"), ("..two", "second")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "who.wasm").write_bytes(wat(printing("authn", knows(user))))
    (tmp_path / "..data").symlink_to("..one")
    (tmp_path / "who.wasm").symlink_to("..data/who.wasm")
    with reloading(tmp_path, wat) as service:
        assert service.user() == "first"
        (tmp_path / "..data_tmp").symlink_to("..two")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        service.wait_for_generation(2)
        assert service.user() == "second"


def test_sighup_reloads_even_where_nothing_has_changed(service: Reloading) -> None:
    service.hang_up()
    service.wait_for_generation(2)
    assert service.user() == "first"


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (
            lambda service: replace_file(service.folder / "who.wasm", NOT_WASM),
            "authentication.modules[0].module: module who:",
        ),
        (lambda service: (service.folder / "who.wasm").unlink(), "No such file or directory"),
        (lambda service: service.put("who.wasm", printing("authz", "{}")), "no export 'authn'"),
        (lambda service: service.configure("authentication: {modules: [}"), "not YAML"),
        (lambda service: service.configure("authentification: {}"), "did you mean authentication?"),
        (lambda service: (service.folder / "bulkhead.yaml").unlink(), "No such file or directory"),
        (
            lambda service: service.configure(
                CONFIGURATION + "admission: {modules: [{module: who.wasm, rules: []}]}"
            ),
            "no export 'validate'",
        ),
    ],
    ids=["no module", "module gone", "wrong export", "no YAML", "unknown key", "file gone", "one of two"],
)
def test_a_broken_set_is_refused_whole_and_the_old_one_goes_on(
    shared: Reloading, break_it: Callable[[Reloading], None], told: str
) -> None:
    before, refusals = shared.generation, shared.served.log().count("reload_refused")
    break_it(shared)
    shared.hang_up()
    assert told in shared.wait_for_log("reload_refused", refusals + 1)
    assert shared.generation == before
    assert shared.user() == shared.user_over_grpc() == "first"
    shared.put("who.wasm", printing("authn", knows("first")))
    shared.configure(CONFIGURATION)
    shared.hang_up()
    shared.wait_for_generation(before + 1)
    assert shared.user() == "first"


def test_a_broken_set_is_told_once_and_not_every_second(service: Reloading) -> None:
    service.configure("nothing: {}")
    service.wait_for_log("reload_refused")
    service.configure("nothing: {}  # at all")
    service.wait_for_log("reload_refused", times=2)
    assert service.served.log().count("reload_refused") == 2


def test_a_review_that_has_begun_ends_with_the_modules_that_it_began_with(tmp_path: Path, wat: Wat) -> None:
    (tmp_path / "who.wasm").write_bytes(wat(slow(printing("authn", knows("first")), 4.0)))
    configuration = """
authentication:
  modules:
    - {name: fails, module: fails.wasm}
    - {name: who, module: who.wasm, limits: {timeout: 30s}}
limits: {timeout: 30s}
"""
    (tmp_path / "fails.wasm").write_bytes(wat(slow(printing("authn", "{}"), 3.0)))
    with reloading(tmp_path, wat, configuration) as service, ThreadPoolExecutor(1) as pool:
        begun = pool.submit(service.user)
        wait_until(lambda: service.served.runs() == 1, "the run")
        service.put("other.wasm", printing("authn", knows("other")))
        service.configure("authentication: {modules: [{name: other, module: other.wasm}]}")
        service.wait_for_generation(2)
        assert service.user() == "other"
        assert not begun.done()
        assert begun.result() == "first", "its second module ran after the switch"


def test_no_request_fails_while_everything_is_reloaded(service: Reloading) -> None:
    stop, users, failures = threading.Event(), set(), []
    users_over_grpc: set[str] = set()

    def ask() -> None:
        connection = service.served.connect()
        while not stop.is_set():
            body = json.dumps(TOKEN_REVIEW)
            connection.request("POST", "/authn", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            answer = json.loads(reply.read())
            if reply.status != 200 or not answer["status"]["authenticated"]:
                failures.append(answer)
            else:
                users.add(answer["status"]["user"]["username"])
        connection.close()

    def ask_over_grpc() -> None:
        stub = reviews_pb2_grpc.ReviewServiceStub(service.served.channel())
        request = reviews_pb2.AuthenticateRequest(review=json.dumps(TOKEN_REVIEW).encode())
        while not stop.is_set():
            users_over_grpc.add(json.loads(stub.Authenticate(request).review)["status"]["user"]["username"])

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(3)] + [pool.submit(ask_over_grpc)]
        try:
            for number in range(2, 7):
                service.put("who.wasm", printing("authn", knows(f"user-{number}")))
                service.hang_up()
                service.wait_for_generation(number)
        finally:
            stop.set()
        for each in asking:
            each.result()
    assert failures == []
    assert {"first", "user-2", "user-5"} < users
    assert {"user-2", "user-5"} < users_over_grpc


def test_a_worker_that_dies_is_replaced_by_one_that_serves_the_same(service: Reloading) -> None:
    """Not what lies on the disk by then."""
    service.put("who.wasm", printing("authn", knows("second")))
    service.hang_up()
    service.wait_for_generation(2)
    replace_file(service.folder / "who.wasm", NOT_WASM)
    service.hang_up()
    service.wait_for_log("reload_refused")
    for role in ("https", "grpc"):
        service.served.worker(role).kill()
    service.wait_for_log("worker_restarted", times=2)
    assert service.user() == service.user_over_grpc() == "second"


@pytest.mark.slow
def test_whatever_dies_while_it_reloads_all_workers_end_up_with_the_same(tmp_path: Path, wat: Wat) -> None:
    with reloading(tmp_path, wat, CONFIGURATION, "--workers", "2") as service:
        chance = random.Random(7)
        for number in range(15):
            service.put("who.wasm", printing("authn", knows(f"user-{number}")))
            for _ in range(chance.randint(1, 3)):
                service.hang_up()
                time.sleep(chance.random() * 0.25)
                if chance.random() < 0.5:
                    with suppress(AssertionError):  # it is dead already
                        service.served.worker(chance.choice(["https", "grpc"])).kill()

            def all_know(user: str = f"user-{number}") -> bool:
                try:
                    # Whichever answers each of them.
                    return {service.user() for _ in range(4)} == {service.user_over_grpc()} == {user}
                except (OSError, grpc.RpcError):
                    return False

            wait_until(all_know, f"user-{number}", 60)
        assert "Traceback" not in service.served.log()
        ours = ("wasmtime", "bulkhead-spawner")

        def rest() -> list[psutil.Process]:
            return [process for process in service.served.tree() if not process.name().startswith(ours)]

        wait_until(lambda: len(rest()) == 4, "a supervisor and three workers")
        assert service.served.spawner().is_running()


def test_says_which_changes_need_a_restart(service: Reloading) -> None:
    service.configure(CONFIGURATION + "limits: {maxConcurrentRuns: 3, memory: 32Mi}")
    service.hang_up()
    service.wait_for_generation(2)
    line = service.wait_for_log("restart_needed")
    assert "limits.maxConcurrentRuns" in line
    assert "memory" not in line


def test_limits_may_grow(service: Reloading) -> None:
    """Beyond what callers of the gRPC API could ask for when the workers were started."""
    service.configure(
        "authentication: {modules: [{name: who, module: who.wasm, limits: {memory: 2Gi, timeout: 2m}}]}"
    )
    service.hang_up()
    service.wait_for_generation(2)
    assert service.user() == service.user_over_grpc() == "first"


def test_workers_do_not_keep_modules_that_are_gone(service: Reloading) -> None:
    def files(role: str) -> int:
        worker = service.served.worker(role)
        return sum("bulkhead-module" in os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in fds(worker.pid))

    def fds(pid: int) -> list[str]:
        return os.listdir(f"/proc/{pid}/fd")

    before = {role: files(role) for role in ("https", "grpc")}
    for number in range(2, 6):
        service.put("who.wasm", printing("authn", knows(f"user-{number}")))
        service.hang_up()
        service.wait_for_generation(number)
        assert service.user() == f"user-{number}"
    assert {role: files(role) for role in ("https", "grpc")} == before == {"https": 1, "grpc": 1}


# Broken modules at the start

BROKEN = """
authentication:
  modules: [{name: broken, module: broken.wasm}, {name: who, module: who.wasm}]
authorization: {modules: [{module: missing.wasm}]}
"""


def test_a_bad_module_keeps_the_service_from_starting(tmp_path: Path, wat: Wat) -> None:
    (tmp_path / "bulkhead.yaml").write_text(BROKEN)
    (tmp_path / "broken.wasm").write_bytes(NOT_WASM)
    (tmp_path / "who.wasm").write_bytes(wat(printing("authn", knows("first"))))
    line = command("serve", "--config", str(tmp_path / "bulkhead.yaml"), "--state-dir", str(tmp_path / "s"))
    line += ["--https-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "module broken:" in ended.stderr
    assert "module missing:" in ended.stderr, "every problem is told"


def test_broken_modules_may_be_allowed_at_the_start(tmp_path: Path, wat: Wat) -> None:
    (tmp_path / "broken.wasm").write_bytes(NOT_WASM)
    with reloading(tmp_path, wat, BROKEN, "--allow-broken-modules") as service:
        assert service.served.log().count("module_not_usable") == 2
        assert service.user() == "first", "the broken one is skipped, as any that fails"
        subject = {"resourceAttributes": {"verb": "get", "resource": "pods"}, "user": "u"}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": subject}
        reply = service.served.request("/authz", json.dumps(review).encode())
        assert (reply.status, reply.json["reason"]) == (503, "UNDECIDED")
        # What has been broken from the start keeps nobody from changing the rest,
        service.put("who.wasm", printing("authn", knows("second")))
        service.hang_up()
        service.wait_for_generation(2)
        assert service.user() == "second"
        # what breaks later does,
        replace_file(tmp_path / "who.wasm", NOT_WASM)
        service.hang_up()
        service.wait_for_log("reload_refused")
        assert service.user() == "second"
        # and a repaired one is taken up.
        service.put("who.wasm", printing("authn", knows("third")))
        service.put("broken.wasm", printing("authn", knows("repaired")))
        service.hang_up()
        service.wait_for_generation(3)
        assert service.user() == "repaired"


ADMISSION = {
    "apiVersion": "admission.k8s.io/v1",
    "kind": "AdmissionReview",
    "request": {
        "uid": "1",
        "operation": "CREATE",
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "namespace": "default",
        "object": {"apiVersion": "v1", "kind": "Pod"},
        "oldObject": None,
    },
}


@pytest.mark.parametrize(
    ("policy", "status", "allowed"), [("Fail", 200, False), ("Ignore", 200, True), ("Error", 500, None)]
)
def test_a_broken_admission_module_takes_its_failure_policy(
    tmp_path: Path, wat: Wat, policy: str, status: int, allowed: bool | None
) -> None:
    rules = '[{operations: ["*"], apiGroups: ["*"], apiVersions: ["*"], resources: ["*/*"]}]'
    configuration = (
        f"admission: {{modules: [{{module: missing.wasm, rules: {rules}, failurePolicy: {policy}}}]}}"
    )
    with reloading(tmp_path, wat, configuration, "--allow-broken-modules") as service:
        reply = service.served.request("/validate", json.dumps(ADMISSION).encode())
        assert reply.status == status
        if allowed is not None:
            assert reply.json["response"]["allowed"] is allowed
        assert "not_usable" in reply.body.decode()
        assert str(tmp_path) not in reply.body.decode()


# Certificates


def shown(served: Served) -> bytes:
    """The certificate that the HTTPS front end shows."""
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(served.https_address))


def first_of(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.decode())


def test_certificates_do_not_wait_until_a_policy_is_repaired(tmp_path: Path, wat: Wat) -> None:
    authority = Authority()
    before, after = authority.server(), authority.server()
    before.write(tmp_path)
    configuration = CONFIGURATION.replace(
        "server: {", "server: {https: {certificate: tls.crt, key: tls.key}, "
    )
    with reloading(tmp_path, wat, configuration) as service:
        assert shown(service.served) == first_of(before)
        replace_file(tmp_path / "who.wasm", NOT_WASM)
        replace_file(tmp_path / "tls.key", after.key)
        service.hang_up()
        service.wait_for_log("certificates_refused")
        assert shown(service.served) == first_of(before), "a key alone is no pair"
        replace_file(tmp_path / "tls.crt", after.certificate)
        service.wait_for_generation(2)
        assert "certificates_reloaded" in service.served.log()
        assert shown(service.served) == first_of(after)
        connection = http.client.HTTPSConnection(
            *service.served.https_address, context=ssl.create_default_context(cadata=authority.pem.decode())
        )
        connection.request("POST", "/authn", json.dumps(TOKEN_REVIEW), {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["status"]["user"]["username"] == "first"
        connection.close()
        assert service.served.log().count("reload_refused") == 2
