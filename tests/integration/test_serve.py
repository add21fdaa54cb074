"""`bulkhead serve` as a whole: starting, stopping, dying, and refusing to start."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.guests import SLEEPING_VALIDATE, TRAPPING_AUTHN, TRAPPING_AUTHZ
from tests.support.served import Served, command, gone, recorded, serve, wait_until

TOKEN_REVIEW = {
    "apiVersion": "authentication.k8s.io/v1",
    "kind": "TokenReview",
    "spec": {"token": "magic-token"},
}


def authenticates(served: Served) -> bool:
    try:
        return bool(served.review("/authn", TOKEN_REVIEW)["status"]["authenticated"])
    except OSError:
        return False


def snippets(log: str) -> list[str]:
    """The commands that the banner offers for pasting."""
    banner = log[log.index("Ask it over HTTPS:") : log.index("Ctrl-C stops it.")]
    over_https, over_grpc = banner.split("or over gRPC:")
    return [over_https.removeprefix("Ask it over HTTPS:"), over_grpc]


def test_prints_what_it_serves_and_commands_that_work_as_pasted(demo: Served) -> None:
    log = demo.log()
    for needed in (demo.ready["httpsAddress"], demo.ready["grpcAddress"], demo.ready["caCertificate"]):
        assert needed in log
    assert re.findall(r"magic-\w+ +sha256:[0-9a-f]{64}", log)[3:]
    environment = {"PATH": os.environ["PATH"], "HOME": str(demo.state_dir)}
    for snippet in snippets(log):
        pasted = subprocess.run(["sh", "-c", snippet], capture_output=True, text=True, env=environment)
        assert pasted.returncode == 0, pasted.stderr
        assert json.loads(pasted.stdout)["status"]["user"]["username"] == "magic-user"


def test_tells_programs_what_it_serves(demo: Served) -> None:
    names = [(module["section"], module["name"]) for module in demo.ready["modules"]]
    assert ("authentication", "magic-authn") in names
    assert ("admission", "magic-mutate") in names
    assert demo.ready["pid"] == demo.process.pid


def test_never_logs_a_token(demo: Served) -> None:
    review = {**TOKEN_REVIEW, "spec": {"token": "a-very-secret-token"}}
    demo.review("/authn", review)
    wait_until(lambda: "not_authenticated" in demo.log(), "the decision in the log")
    assert "a-very-secret-token" not in demo.log()


def test_stops_when_it_is_told_to_and_leaves_nothing(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        assert authenticates(served)
        processes = served.tree()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=20) == 0
        wait_until(lambda: gone(processes), "all processes to end")
        assert not (tmp_path / "ready.json").exists()


def sleeping(folder: Path, wat: Callable[[str], bytes], grace: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sleep.wasm").write_bytes(wat(SLEEPING_VALIDATE))
    (folder / "bulkhead.yaml").write_text(
        f"""
server: {{gracePeriod: {grace}}}
limits: {{timeout: 2s}}
admission:
  modules:
    - module: sleep.wasm
      rules: [{{operations: ["*"], apiGroups: ["*"], apiVersions: ["*"], resources: ["*"]}}]
"""
    )
    return ["--config", str(folder / "bulkhead.yaml")]


@pytest.mark.parametrize(("grace", "reason"), [("20s", "timeout"), ("100ms", "cancelled")])
def test_lets_reviews_in_flight_finish_within_the_grace_period(
    tmp_path: Path, wat: Callable[[str], bytes], grace: str, reason: str
) -> None:
    review = recorded("admission-validate-create-pods")["body"]
    with serve(tmp_path, *sleeping(tmp_path, wat, grace)) as served, ThreadPoolExecutor(1) as callers:
        answer = callers.submit(served.review, "/validate", review)
        wait_until(lambda: served.runs() == 1, "the run to start")
        served.process.send_signal(signal.SIGTERM)
        response = answer.result(timeout=20)["response"]
        assert response["allowed"] is False
        assert reason in response["status"]["message"]
        assert served.process.wait(timeout=20) == 0


def test_a_second_signal_does_not_wait(tmp_path: Path, wat: Callable[[str], bytes]) -> None:
    review = recorded("admission-validate-create-pods")["body"]
    with serve(tmp_path, *sleeping(tmp_path, wat, "1h")) as served, ThreadPoolExecutor(1) as callers:
        answer = callers.submit(served.review, "/validate", review)
        wait_until(lambda: served.runs() == 1, "the run to start")
        processes = served.tree()
        served.process.send_signal(signal.SIGINT)
        wait_until(lambda: "worker_stopping" in served.log(), "the stop to begin")
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=20) == 0
        wait_until(lambda: gone(processes), "all processes to end")
        assert answer.exception(timeout=20) is not None


def test_no_process_survives_kill_9_of_the_service(tmp_path: Path, wat: Callable[[str], bytes]) -> None:
    review = recorded("admission-validate-create-pods")["body"]
    with serve(tmp_path, *sleeping(tmp_path, wat, "20s")) as served, ThreadPoolExecutor(1) as callers:
        answer = callers.submit(served.review, "/validate", review)
        wait_until(lambda: served.runs() == 1, "the run to start")
        processes = served.tree()
        assert len(processes) >= 5  # supervisor, two workers, spawner, a run
        served.process.kill()
        served.process.wait()
        wait_until(lambda: gone(processes), "all processes to end")
        assert answer.exception(timeout=20) is not None


@pytest.mark.parametrize("role", ["https", "grpc"])
def test_replaces_a_worker_that_is_killed(tmp_path: Path, role: str) -> None:
    with serve(tmp_path) as served:
        worker = served.worker(role)
        below = [worker, *worker.children(recursive=True)]
        worker.kill()
        wait_until(lambda: gone(below), "the worker's processes to end")
        wait_until(lambda: "worker_restarted" in served.log(), "another worker")
        assert served.worker(role).pid != worker.pid
        wait_until(lambda: authenticates(served), "an answer")


def test_replaces_a_spawner_that_is_killed(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        assert authenticates(served)
        spawner = served.spawner()
        spawner.kill()
        wait_until(lambda: gone([spawner]), "the spawner to end")
        assert authenticates(served)


def test_modules_that_fail_never_allow_and_nothing_of_the_host_is_told(
    tmp_path: Path, wat: Callable[[str], bytes]
) -> None:
    (tmp_path / "authn.wasm").write_bytes(wat(TRAPPING_AUTHN))
    (tmp_path / "authz.wasm").write_bytes(wat(TRAPPING_AUTHZ))
    (tmp_path / "bulkhead.yaml").write_text(
        "authentication: {modules: [{module: authn.wasm}]}\n"
        "authorization: {modules: [{module: authz.wasm}]}\n"
    )
    with serve(tmp_path, "--config", str(tmp_path / "bulkhead.yaml")) as served:
        status = served.review("/authn", TOKEN_REVIEW)["status"]
        assert status.get("authenticated", False) is False
        assert "trap" in status["error"]
        body = json.dumps(recorded("subjectaccessreview-v1-list-pods-selector")["body"]).encode()
        reply = served.request("/authz", body)
        assert reply.status == 503
        for told in (json.dumps(status), reply.body.decode()):
            assert "/proc" not in told
            assert str(tmp_path) not in told
            assert "wasm backtrace" not in told


# Refusing to start


def start(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `bulkhead serve` that is expected to end by itself."""
    line = command("serve", "--https-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0", *arguments)
    return subprocess.run(
        line, capture_output=True, text=True, timeout=60, cwd=cwd, env={**os.environ, **environment}
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that it ends with."""
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("bulkhead: ")][-1]


@pytest.mark.parametrize("option", ["--https-address", "--grpc-address"])
def test_says_in_one_line_that_a_port_is_taken(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = start("--state-dir", str(tmp_path / "state"), option, address)
    assert done.returncode == 1
    assert f"cannot listen on {address}" in complaint(done)
    assert option in complaint(done)


def test_says_in_one_line_that_wasmtime_is_missing(tmp_path: Path) -> None:
    done = start("--state-dir", str(tmp_path / "state"), "--wasmtime", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert str(tmp_path / "nowhere") in complaint(done)


def test_says_in_one_line_that_the_certificate_cannot_be_kept(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "tls").mkdir(parents=True)
    (state / "tls").chmod(0o777)
    done = start("--state-dir", str(state))
    assert done.returncode == 1
    assert "others may write" in complaint(done)


def test_reports_every_mistake_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "bulkhead.yaml"
    path.write_text(
        "server: {http: 1}\nlimits:\n  memory: lots\nauthentication: {modules: [{module: no.wasm}]}\n"
    )
    done = start("--state-dir", str(tmp_path / "state"), "--config", str(path))
    assert done.returncode == 2
    for place in (
        f"{path}:1: server.http",
        f"{path}:3: limits.memory",
        f"{path}:4: authentication.modules[0]",
    ):
        assert place in done.stderr


def test_refuses_a_module_that_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "text.wasm").write_text("(module)")
    path = tmp_path / "bulkhead.yaml"
    path.write_text("authentication:\n  modules:\n    - module: text.wasm\n")
    done = start("--state-dir", str(tmp_path / "state"), "--config", str(path))
    assert done.returncode == 2
    assert "text.wasm" in done.stderr or "module text" in done.stderr
    assert f"{path}:3" in done.stderr


def test_refuses_to_offer_grpc_without_tls_beyond_loopback(tmp_path: Path) -> None:
    done = start("--state-dir", str(tmp_path / "state"), "--grpc-address", "0.0.0.0:0")
    assert done.returncode == 2
    assert "loopback" in done.stderr


def test_starts_from_any_folder_without_a_home(tmp_path: Path) -> None:
    line = command("doctor", "--json", "--state-dir", str(tmp_path / "state"))
    done = subprocess.run(line, capture_output=True, text=True, cwd="/", env={}, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["canServe"] is True


def test_ends_when_its_terminal_is_closed(tmp_path: Path) -> None:
    """SIGHUP reloads, but not then."""
    terminal, end = os.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    ready = tmp_path / "ready.json"
    line = command("serve", "--state-dir", str(tmp_path / "state"), "--ready-file", str(ready))
    line += ["--https-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0"]
    process = subprocess.Popen(line, stdin=end, stdout=end, stderr=end, preexec_fn=own_terminal)
    os.close(end)
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, "bulkhead serve", 60)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"generation": 2' in ready.read_text(), "the reload")
        children = psutil.Process(process.pid).children(recursive=True)
        os.close(terminal)
        process.wait(20)
        wait_until(lambda: gone(children), "the end of the workers")
    finally:
        process.kill()
        process.wait()
