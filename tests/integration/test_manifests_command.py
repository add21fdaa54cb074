"""`bulkhead manifests` as it is used from a shell, and whether a service answers where the files point."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from bulkhead.service import demo
from bulkhead.service.objectyaml import read_object_file, read_object_yaml
from tests.support.certificates import Authority
from tests.support.served import command, recorded, serve

DEMO_MODULES = demo.CONFIGURATION.parent


def manifests(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = command("manifests", *map(str, arguments))
    return subprocess.run(line, capture_output=True, timeout=60, text=True)


def write_configuration(folder: Path) -> Path:
    """The demo, behind client certificates of an authority whose client is at `client.crt`."""
    servers, clients = Authority("servers"), Authority("clients")
    certificate, _ = servers.server().write(folder)
    certificate.write_bytes(certificate.read_bytes() + servers.pem)
    (folder / "clients.crt").write_bytes(clients.pem)
    clients.client("kube-apiserver").write(folder, "client")
    https = {"certificate": "tls.crt", "key": "tls.key", "clientCA": "clients.crt"}
    document = {
        **read_object_file(demo.CONFIGURATION).value,
        "server": {"https": {**https, "allowedNames": ["kube-apiserver"]}},
    }
    for section in ("authentication", "authorization", "admission"):
        for module in document[section]["modules"]:
            module["module"] = str(DEMO_MODULES / module["module"])
    path = folder / "bulkhead.yaml"
    path.write_text(json.dumps(document))
    return path


def ask(url: str, authority: str, user: dict[str, Any], body: Any) -> Any:
    """Posts as kube-apiserver would with this CA, in base64, and this user of a kubeconfig."""
    context = ssl.create_default_context(cadata=base64.b64decode(authority).decode())
    context.load_cert_chain(user["client-certificate"], user["client-key"])
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, context=context, timeout=30) as reply:
        return json.load(reply)


def test_a_service_answers_where_the_files_point(tmp_path: Path) -> None:
    configuration = write_configuration(tmp_path)
    out = tmp_path / "out"
    with serve(tmp_path / "service", "--config", str(configuration)) as served:
        done = manifests(
            *("--config", configuration, "--url", f"https://{served.ready['httpsAddress']}", "--output", out),
            *("--client-certificate", tmp_path / "client.crt", "--client-key", tmp_path / "client.key"),
            *("--apiserver-dir", out / "apiserver"),
        )
        assert done.returncode == 0, done.stderr
        for section, review in (
            ("authentication", "tokenreview-v1-magic-token"),
            ("authorization", "subjectaccessreview-v1-create-configmaps"),
        ):
            kubeconfig = read_object_file(out / f"apiserver/{section}.kubeconfig").value
            cluster, user = kubeconfig["clusters"][0]["cluster"], kubeconfig["users"][0]["user"]
            sent = recorded(review)["body"]
            answer = ask(cluster["server"], cluster["certificate-authority-data"], user, sent)
            assert answer["kind"] == sent["kind"]
        for stage, review in (
            ("validating", "admission-validate-create-configmaps"),
            ("mutating", "admission-mutate-create-configmaps"),
        ):
            (webhook,) = read_object_file(out / f"cluster/{stage}.yaml").value["webhooks"]
            where, sent = webhook["clientConfig"], recorded(review)["body"]
            (user,) = read_object_file(out / "apiserver/admission.kubeconfig").value["users"]
            answer = ask(where["url"], where["caBundle"], user["user"], sent)
            assert answer["response"]["uid"] == sent["request"]["uid"]
            assert user["name"] == served.ready["httpsAddress"]


def test_without_an_output_it_prints_what_is_for_kubectl_and_nothing_else(tmp_path: Path) -> None:
    configuration = tmp_path / "bulkhead.yaml"
    done = manifests(
        *("--config", demo.CONFIGURATION, "--url", "https://127.0.0.1:8443"),
        *("--state-dir", tmp_path / "state", "--output", "-"),
    )
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(each)["kind"] for each in read_object_yaml(done.stdout)]
    assert kinds == ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"]
    assert "note: " in done.stderr  # of the generated certificate
    assert not configuration.exists()
    assert not Path("bulkhead-manifests").exists()


def test_what_is_written_is_told_and_is_in_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = (
        "--config",
        demo.CONFIGURATION,
        "--url",
        "https://127.0.0.1:8443",
        "--state-dir",
        tmp_path / "state",
    )
    done = manifests(*line, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "  cluster/validating.yaml\n" in done.stdout
    readme = (out / "README.txt").read_text()
    assert readme.partition("\n")[2] in done.stdout
    assert "--authorization-config=/etc/kubernetes/bulkhead/authorization.yaml" in readme
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert manifests(*line, "--output", out).returncode == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == first
    (out / "README.txt").write_text("mine")
    refused = manifests(*line, "--output", out)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1].startswith("bulkhead: ")
    assert "--force" in refused.stderr
    assert manifests(*line, "--output", out, "--force").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "http://127.0.0.1:8443"), "bulkhead: --url: expected https://HOST:PORT"),
        ((), "bulkhead: say where kube-apiserver finds Bulkhead"),
        (("--url", "https://127.0.0.1:8443", "--ca", "/no/such/file"), "bulkhead: cannot read /no/such/file"),
        (("--url", "https://127.0.0.1:8443", "--client-key", "x"), "belong together"),
        (("--url", "https://127.0.0.1:8443", "--error-policy", "Maybe"), "'Maybe'"),
    ],
)
def test_wrong_usage_is_told_in_a_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    out = tmp_path / "out"
    done = manifests("--config", demo.CONFIGURATION, "--state-dir", tmp_path, "--output", out, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_broken_configuration_is_told_as_everywhere(tmp_path: Path) -> None:
    (tmp_path / "bulkhead.yaml").write_text("admission: {modules: [{}]}\n")
    done = manifests("--config", tmp_path / "bulkhead.yaml", "--url", "https://127.0.0.1:8443")
    assert done.returncode == 2
    assert "admission.modules[0].module: expected a value" in done.stderr
