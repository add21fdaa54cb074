"""`bulkhead manifests`: what the files say, read as Kubernetes reads them."""

from __future__ import annotations

import base64
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from lightkube.models.admissionregistration_v1 import (
    MutatingWebhookConfiguration,
    ValidatingWebhookConfiguration,
)

from bulkhead.sandbox import SandboxError
from bulkhead.service.config import Config, RuleConfig
from bulkhead.service.manifest_admission import timeout_seconds
from bulkhead.service.manifest_endpoint import ServiceEndpoint, UrlEndpoint
from bulkhead.service.manifest_folder import MARK, ManifestFile, write_files
from bulkhead.service.manifest_trust import ManifestError
from bulkhead.service.manifest_yaml import to_yaml
from bulkhead.service.manifests import ManifestOptions, Manifests, make_manifests
from bulkhead.service.objectyaml import read_object_file
from bulkhead.service.rules import Target, any_matches
from tests.support.certificates import CLIENT, SERVER, Authority

RULE = {"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}
URL = "https://127.0.0.1:8443"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("server authority")


@pytest.fixture
def ca(authority: Authority, tmp_path: Path) -> Path:
    path = tmp_path / "ca.crt"
    path.write_bytes(authority.pem)
    return path


def configuration(document: Mapping[str, Any], folder: Path = Path("/nowhere")) -> Config:
    return Config.model_validate(document, context={"folder": folder})


def admitting(*modules: Mapping[str, Any]) -> Config:
    numbered = [{"module": f"m{index}.wasm", "rules": [RULE], **each} for index, each in enumerate(modules)]
    return configuration({"admission": {"modules": numbered}})


def make(config: Config, ca: Path, **chosen: Any) -> Manifests:
    """Without a state directory: nothing of this machine is looked at."""
    options: dict[str, Any] = {"url": URL, "ca": ca, **chosen}
    return make_manifests(config, ManifestOptions(**options), ca.parent / "no-state")


def webhooks(made: Manifests, kind: str = "ValidatingWebhookConfiguration") -> list[dict[str, Any]]:
    return next((each["webhooks"] for each in made.cluster if each["kind"] == kind), [])


def read(made: Manifests, folder: Path) -> dict[str, Any]:
    """The files but README.txt, by their paths, as kubectl reads them."""
    write_files(folder, made.files, force=False)
    return {
        file.path: read_object_file(folder / file.path).value
        for file in made.files
        if file.path.endswith((".yaml", ".kubeconfig"))
    }


# Webhook configurations


def test_each_module_gets_a_webhook_of_its_own(ca: Path) -> None:
    made = make(admitting({"name": "a.b", "mutating": True}, {"name": "c"}, {"name": "d"}), ca)
    assert [each["kind"] for each in made.cluster] == [
        "MutatingWebhookConfiguration",
        "ValidatingWebhookConfiguration",
    ]
    paths = {
        each["name"]: each["clientConfig"]["url"].removeprefix(URL)
        for document in made.cluster
        for each in document["webhooks"]
    }
    assert paths == {
        "a.b.mutate.bulkhead": "/mutate/a.b",
        "c.validate.bulkhead": "/validate/c",
        "d.validate.bulkhead": "/validate/d",
    }


def test_rules_are_those_of_the_configuration(ca: Path) -> None:
    rules = [
        RULE,
        {**RULE, "operations": ["UPDATE", "DELETE"], "resources": ["pods", "pods/*"], "scope": "Cluster"},
    ]
    (webhook,) = webhooks(make(admitting({"rules": rules}), ca))
    assert webhook["rules"] == [{**RULE, "scope": "*"}, rules[1]]


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        (["*/*", "pods"], ["*/*"]),
        (["*", "pods", "pods/exec"], ["*", "pods/exec"]),
        (["pods/exec", "pods/*", "pods"], ["pods/*", "pods"]),
        (["pods/scale", "*/scale", "pods/exec"], ["*/scale", "pods/exec"]),
        (["pods", "pods"], ["pods"]),
    ],
)
def test_what_a_wildcard_covers_is_left_out_where_kubernetes_refuses_it(
    ca: Path, written: list[str], taken: list[str]
) -> None:
    (webhook,) = webhooks(make(admitting({"rules": [{**RULE, "resources": written}]}), ca))
    assert webhook["rules"][0]["resources"] == taken


@pytest.mark.parametrize("chosen", [{}, {"error_policy": "Ignore"}])
def test_failure_policies(ca: Path, chosen: dict[str, str]) -> None:
    policies = ("Fail", "Ignore", "Error")
    found = webhooks(make(admitting(*({"failurePolicy": each} for each in policies)), ca, **chosen))
    error = chosen.get("error_policy", "Fail")
    assert [each["failurePolicy"] for each in found] == ["Fail", "Ignore", error]


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [("1ms", 2), ("500ms", 2), ("2s", 3), ("2001ms", 4), ("29s", 30), ("29500ms", 30), ("1h", 30)],
)
def test_kube_apiserver_waits_a_little_longer_than_a_module_may_take(
    ca: Path, timeout: str, seconds: int
) -> None:
    made = make(admitting({"limits": {"timeout": timeout}}), ca)
    assert webhooks(made)[0]["timeoutSeconds"] == seconds
    too_long = timeout in ("29500ms", "1h")
    assert any("30 s at most" in note for note in made.notes) == too_long


def test_a_wait_is_never_shorter_than_kubernetes_takes() -> None:
    assert timeout_seconds(0) == 1


@pytest.mark.parametrize(
    ("chosen", "excluded"),
    [
        ({}, ["kube-system", "bulkhead"]),
        ({"service": "policies/hook"}, ["kube-system", "policies"]),
        ({"service": "policies/hook", "namespace": "elsewhere"}, ["kube-system", "elsewhere"]),
        ({"excluded_namespaces": ("a", "bulkhead", "a")}, ["kube-system", "bulkhead", "a"]),
        ({"excluded_namespaces": ("a",), "default_exclusions": False}, ["a"]),
        ({"default_exclusions": False}, None),
    ],
)
def test_namespaces_that_are_left_out(ca: Path, chosen: dict[str, Any], excluded: list[str] | None) -> None:
    made = make(admitting({}, {"mutating": True}), ca, **chosen)
    for document in made.cluster:
        selector = document["webhooks"][0].get("namespaceSelector")
        expected = {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": excluded}
        assert selector == (None if excluded is None else {"matchExpressions": [expected]})


@pytest.mark.parametrize("chosen", [{}, {"reinvocation_policy": "Never"}])
def test_only_mutating_webhooks_are_reinvoked(ca: Path, chosen: dict[str, str]) -> None:
    made = make(admitting({}, {"mutating": True}), ca, **chosen)
    (mutating,) = webhooks(made, "MutatingWebhookConfiguration")
    assert mutating["reinvocationPolicy"] == chosen.get("reinvocation_policy", "IfNeeded")
    assert "reinvocationPolicy" not in webhooks(made)[0]


def test_modules_without_rules_are_left_out_with_a_note(ca: Path) -> None:
    made = make(admitting({"name": "asked"}, {"name": "idle", "rules": []}), ca)
    assert [each["name"] for each in webhooks(made)] == ["asked.validate.bulkhead"]
    assert [note for note in made.notes if "idle" in note]
    nothing = make(admitting({"name": "idle", "rules": []}), ca)
    assert nothing.cluster == ()
    assert [file.path for file in nothing.files] == ["README.txt"]


def test_a_service_is_named_with_path_and_port(ca: Path) -> None:
    (webhook,) = webhooks(make(admitting({"name": "m"}), ca, service="policies/hook:8443"))
    service = {"namespace": "policies", "name": "hook", "path": "/validate/m", "port": 8443}
    assert webhook["clientConfig"]["service"] == service
    assert "url" not in webhook["clientConfig"]


def test_combined_webhooks_have_the_rules_of_all_modules_and_the_strictest_policy(ca: Path) -> None:
    other = {**RULE, "resources": ["configmaps"]}
    validating: list[dict[str, Any]] = [
        {"failurePolicy": "Ignore", "limits": {"timeout": "3s"}},
        {"failurePolicy": "Error", "rules": [other, RULE], "limits": {"timeout": "5s"}},
    ]
    mutating = [{**each, "mutating": True, "failurePolicy": "Ignore"} for each in validating]
    made = make(admitting(*validating, *mutating), ca, combined=True)
    (validate,), (mutate,) = webhooks(made), webhooks(made, "MutatingWebhookConfiguration")
    assert validate["clientConfig"]["url"] == f"{URL}/validate"
    assert [rule["resources"] for rule in validate["rules"]] == [["pods"], ["configmaps"]]
    assert (validate["failurePolicy"], mutate["failurePolicy"]) == ("Fail", "Ignore")
    # Validating modules are asked at the same time, mutating ones one after the other.
    assert (validate["timeoutSeconds"], mutate["timeoutSeconds"]) == (6, 9)


@pytest.mark.parametrize(
    ("rule", "chosen", "warned"),
    [
        ({"apiGroups": ["*"], "resources": ["*"], "operations": ["*"]}, {}, True),
        ({"apiGroups": ["*"], "resources": ["*"], "operations": ["CREATE"]}, {}, False),
        (
            {"apiGroups": ["*"], "resources": ["*"], "operations": ["*"]},
            {"excluded_namespaces": ("kube-node-lease",)},
            False,
        ),
    ],
)
def test_warns_of_rules_that_nodes_depend_on(
    ca: Path, rule: dict[str, Any], chosen: dict[str, Any], warned: bool
) -> None:
    made = make(admitting({"rules": [{**RULE, **rule}]}), ca, **chosen)
    assert any("heartbeats" in note for note in made.notes) == warned


# Against the rules of kube-apiserver

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_MODELS = {
    "ValidatingWebhookConfiguration": ValidatingWebhookConfiguration,
    "MutatingWebhookConfiguration": MutatingWebhookConfiguration,
}


def check_webhook_configuration(document: Mapping[str, Any]) -> None:
    """As validation.go of Kubernetes' admissionregistration, as far as it concerns what we write."""
    known = msgspec.convert(document, _MODELS[document["kind"]], strict=True)
    assert msgspec.to_builtins(known) == document, "unknown fields are gone"
    names = [webhook["name"] for webhook in document["webhooks"]]
    assert len(set(names)) == len(names)
    for webhook in document["webhooks"]:
        assert _SUBDOMAIN.fullmatch(webhook["name"])
        assert len(webhook["name"]) <= 253
        assert webhook["name"].count(".") >= 2
        assert webhook["failurePolicy"] in ("Fail", "Ignore")
        assert webhook["sideEffects"] == "None"
        assert webhook["admissionReviewVersions"] == ["v1"]
        assert 1 <= webhook["timeoutSeconds"] <= 30
        path = webhook["clientConfig"]["service"]["path"]
        assert all(_SUBDOMAIN.fullmatch(step) for step in path.split("/")[1:])
        for rule in webhook["rules"]:
            check_rule(rule)


def check_rule(rule: Mapping[str, Any]) -> None:
    for key in ("operations", "apiGroups", "apiVersions"):
        assert len(rule[key]) == 1 or (rule[key] and "*" not in rule[key])
    resources = rule["resources"]
    assert resources
    assert len(resources) == 1 or "*/*" not in resources
    assert "*" not in resources or all(each == "*" or "/" in each for each in resources)
    for each in resources:
        resource, slash, subresource = each.partition("/")
        if slash:
            assert (
                resource == "*"
                or subresource == "*"
                or not {f"{resource}/*", f"*/{subresource}"} & {*resources}
            )


def some(*values: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=4)


_RULES = st.fixed_dictionaries(
    {
        "operations": some("CREATE", "UPDATE", "DELETE", "CONNECT", "*"),
        "apiGroups": some("", "apps", "example.org", "*"),
        "apiVersions": some("v1", "v1beta1", "*"),
        "resources": some("*", "*/*", "pods", "pods/*", "pods/exec", "*/scale", "nodes", "nodes/scale"),
        "scope": st.sampled_from(["Cluster", "Namespaced", "*"]),
    }
)
_MODULES = st.lists(
    st.fixed_dictionaries(
        {
            "mutating": st.booleans(),
            "failurePolicy": st.sampled_from(["Fail", "Ignore", "Error"]),
            "rules": st.lists(_RULES, max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
)
_TARGETS = st.builds(
    Target,
    operation=st.sampled_from(["CREATE", "UPDATE", "DELETE", "CONNECT"]),
    group=st.sampled_from(["", "apps", "example.org", "other"]),
    version=st.sampled_from(["v1", "v1beta1", "v2"]),
    resource=st.sampled_from(["pods", "nodes", "others"]),
    subresource=st.sampled_from(["", "exec", "scale"]),
    namespace=st.sampled_from(["", "default"]),
)
_AUTHORITY = Authority("for properties")


@pytest.fixture(scope="module")
def same_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.crt"
    path.write_bytes(_AUTHORITY.pem)
    return path


def rules_by_path(made: Manifests) -> Iterator[tuple[str, list[Any]]]:
    for document in made.cluster:
        for webhook in document["webhooks"]:
            rules = [RuleConfig.model_validate(rule).rule() for rule in webhook["rules"]]
            yield webhook["clientConfig"]["service"]["path"], rules


@given(modules=_MODULES, targets=st.lists(_TARGETS, min_size=1, max_size=20))
def test_every_rule_is_in_exactly_one_webhook_and_means_the_same(
    same_ca: Path, modules: list[dict[str, Any]], targets: list[Target]
) -> None:
    config = admitting(*modules)
    made = make(config, same_ca, service="policies/hook")
    for document in made.cluster:
        check_webhook_configuration(document)
    found = list(rules_by_path(made))
    expected = {
        f"/{'mutate' if module.mutating else 'validate'}/{module.name}": [
            each.rule() for each in module.rules
        ]
        for module in config.admission.modules
        if module.rules
    }
    assert sorted(path for path, _ in found) == sorted(expected)
    for path, rules in found:
        assert len(rules) == len(expected[path])
        for written, taken in zip(expected[path], rules, strict=True):
            assert all(written.matches(target) == taken.matches(target) for target in targets)


@given(modules=_MODULES, targets=st.lists(_TARGETS, min_size=1, max_size=20))
def test_combined_webhooks_match_what_any_module_matches(
    same_ca: Path, modules: list[dict[str, Any]], targets: list[Target]
) -> None:
    config = admitting(*modules)
    made = make(config, same_ca, service="policies/hook", combined=True)
    found = dict(rules_by_path(made))
    for path, mutating in (("/mutate", True), ("/validate", False)):
        every = [
            rule.rule()
            for module in config.admission.modules
            if module.mutating == mutating
            for rule in module.rules
        ]
        for target in targets:
            assert any_matches(every, target) == any_matches(found.get(path, []), target)
    for document in made.cluster:
        check_webhook_configuration(document)


# Files for kube-apiserver's host

EVERYTHING = {
    "authentication": {"modules": [{"module": "authn.wasm"}]},
    "authorization": {
        "modules": [{"module": "authz.wasm"}, {"module": "z.wasm", "limits": {"timeout": "5s"}}]
    },
    "admission": {"modules": [{"module": "m.wasm", "rules": [RULE]}]},
}


@pytest.fixture(scope="module")
def clients() -> Authority:
    return Authority("client authority")


@pytest.fixture
def client(clients: Authority, tmp_path: Path) -> dict[str, Path]:
    certificate, key = clients.client("kube-apiserver", "apiserver.example").write(tmp_path, "client")
    return {"client_certificate": certificate, "client_key": key}


@pytest.mark.parametrize("section", EVERYTHING)
def test_only_what_the_configuration_has_is_written(ca: Path, section: str) -> None:
    made = make(configuration({section: EVERYTHING[section]}), ca)
    assert {file.path for file in made.files} - {"README.txt"} == {
        "authentication": {"apiserver/authentication.kubeconfig"},
        "authorization": {"apiserver/authorization.kubeconfig", "apiserver/authorization.yaml"},
        "admission": {"cluster/validating.yaml"},
    }[section]


def test_kubeconfigs_name_server_and_authority(ca: Path, authority: Authority, tmp_path: Path) -> None:
    files = read(make(configuration(EVERYTHING), ca), tmp_path / "out")
    for section, path in (("authentication", "/authn"), ("authorization", "/authz")):
        kubeconfig = files[f"apiserver/{section}.kubeconfig"]
        (cluster,), (context,) = kubeconfig["clusters"], kubeconfig["contexts"]
        assert cluster["cluster"]["server"] == URL + path
        assert base64.b64decode(cluster["cluster"]["certificate-authority-data"]) == authority.pem
        assert kubeconfig["current-context"] == context["name"]
        assert context["context"]["cluster"] == cluster["name"]
        assert kubeconfig["users"] == [{"name": context["context"]["user"], "user": {}}]
    bundle = files["cluster/validating.yaml"]["webhooks"][0]["clientConfig"]["caBundle"]
    assert x509.load_pem_x509_certificate(base64.b64decode(bundle)) == authority.certificate


def test_the_client_certificate_is_named_by_its_path_on_the_host(
    ca: Path, client: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    files = read(make(configuration(EVERYTHING), ca, apiserver_dir="/srv/hooks/", **client), out)
    user = {"client-certificate": "/srv/hooks/client.crt", "client-key": "/srv/hooks/client.key"}
    assert files["apiserver/authentication.kubeconfig"]["users"][0]["user"] == user
    assert files["apiserver/authorization.kubeconfig"]["users"][0]["user"] == user
    assert files["apiserver/admission.kubeconfig"]["users"] == [{"name": "127.0.0.1:8443", "user": user}]
    for plugin in files["apiserver/admission.yaml"]["plugins"]:
        assert plugin["configuration"]["kubeConfigFile"] == "/srv/hooks/admission.kubeconfig"
    assert stat.S_IMODE((out / "apiserver/client.key").stat().st_mode) == 0o600
    assert client["client_key"].read_bytes() in (out / "apiserver/client.key").read_bytes()
    assert client["client_certificate"].read_bytes() in (out / "apiserver/client.crt").read_bytes()


def test_an_embedded_client_certificate_is_for_the_owner_only(
    ca: Path, client: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    files = read(make(configuration(EVERYTHING), ca, embed_client_certificate=True, **client), out)
    for name in ("authentication", "authorization", "admission"):
        user = files[f"apiserver/{name}.kubeconfig"]["users"][0]["user"]
        assert base64.b64decode(user["client-certificate-data"]) == client["client_certificate"].read_bytes()
        assert base64.b64decode(user["client-key-data"]) == client["client_key"].read_bytes()
        assert stat.S_IMODE((out / f"apiserver/{name}.kubeconfig").stat().st_mode) == 0o600
    assert not (out / "apiserver/client.key").exists()


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"url": "https://Example.org"}, "example.org:443"),
        ({"url": "https://[::1]"}, "[::1]:443"),
        ({"service": "policies/hook"}, "hook.policies.svc:443"),
        ({"service": "policies/hook:8443", "url": URL}, "hook.policies.svc:8443"),
    ],
)
def test_the_admission_certificate_is_found_by_host_and_port(
    ca: Path, client: dict[str, Path], tmp_path: Path, chosen: dict[str, Any], name: str
) -> None:
    files = read(make(admitting({}), ca, **chosen, **client), tmp_path / "out")
    assert files["apiserver/admission.kubeconfig"]["users"][0]["name"] == name


def test_the_authorization_configuration(ca: Path, tmp_path: Path) -> None:
    made = make(configuration(EVERYTHING), ca, apiserver_dir="/srv/hooks", name="policies")
    document = read(made, tmp_path / "out")["apiserver/authorization.yaml"]
    assert (document["apiVersion"], document["kind"]) == (
        "apiserver.config.k8s.io/v1",
        "AuthorizationConfiguration",
    )
    assert document["authorizers"] == [
        {"type": "Node", "name": "node"},
        {"type": "RBAC", "name": "rbac"},
        {
            "type": "Webhook",
            "name": "policies",
            "webhook": {
                "authorizedTTL": "5m0s",
                "unauthorizedTTL": "30s",
                "timeout": "8s",  # 2 s and 5 s, one after the other, and one to answer
                "subjectAccessReviewVersion": "v1",
                "matchConditionSubjectAccessReviewVersion": "v1",
                "failurePolicy": "Deny",
                "connectionInfo": {
                    "type": "KubeConfigFile",
                    "kubeConfigFile": "/srv/hooks/authorization.kubeconfig",
                },
            },
        },
    ]


@pytest.mark.parametrize(
    ("order", "types", "first"),
    [
        ("Node,RBAC,Bulkhead", ["Node", "RBAC", "Webhook"], False),
        ("Node, Bulkhead, RBAC", ["Node", "Webhook", "RBAC"], True),
        ("Bulkhead,Node", ["Webhook", "Node"], False),
        ("Node,RBAC,Bulkhead,ABAC", ["Node", "RBAC", "Webhook", "ABAC"], True),
        ("Bulkhead", ["Webhook"], False),
    ],
)
def test_before_others_bulkhead_is_not_asked_about_the_control_plane(
    ca: Path, order: str, types: list[str], first: bool
) -> None:
    config = configuration({"authorization": EVERYTHING["authorization"]})
    made = make(config, ca, authorizer_order=order, authorization_failure_policy="NoOpinion")
    text = next(file.text for file in made.files if file.path == "apiserver/authorization.yaml")
    assert re.findall(r"type: (Node|RBAC|ABAC|Webhook)", text) == types
    assert ("system:serviceaccounts:kube-system" in text) == first
    assert "failurePolicy: NoOpinion" in text


def test_flags_name_the_files_where_they_will_be(ca: Path, client: dict[str, Path]) -> None:
    text = make(configuration(EVERYTHING), ca, apiserver_dir="/srv/hooks", **client).instructions
    for flag in (
        "--authentication-token-webhook-config-file=/srv/hooks/authentication.kubeconfig",
        "--authentication-token-webhook-version=v1",
        "--authorization-config=/srv/hooks/authorization.yaml",
        "--admission-control-config-file=/srv/hooks/admission.yaml",
        "--authorization-mode=Node,RBAC,Webhook",
    ):
        assert f"  {flag}\n" in text


def test_the_same_input_makes_the_same_files(ca: Path, client: dict[str, Path]) -> None:
    first, second = (make(configuration(EVERYTHING), ca, **client).files for _ in range(2))
    assert first == second
    assert all(file.data.endswith(b"\n") and not file.data.endswith(b"\n\n") for file in first)


# Whom to trust


def served(authority: Authority, folder: Path, *names: str, chain: bytes = b"", **https: Any) -> Config:
    certificate, key = authority.server(*names).write(folder)
    certificate.write_bytes(certificate.read_bytes() + chain)
    https = {"certificate": str(certificate), "key": str(key), **https}
    return configuration({"server": {"https": https}, "admission": EVERYTHING["admission"]}, folder)


def test_a_chain_that_ends_in_its_root_says_whom_to_trust(authority: Authority, tmp_path: Path) -> None:
    config = served(authority, tmp_path, chain=authority.pem)
    made = make_manifests(config, ManifestOptions(url=URL), tmp_path)
    bundle = base64.b64decode(webhooks(made)[0]["clientConfig"]["caBundle"])
    assert bundle == authority.pem


def test_without_the_root_of_a_certificate_the_ca_has_to_be_given(
    authority: Authority, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match="give the CA that issued"):
        make_manifests(served(authority, tmp_path), ManifestOptions(url=URL), tmp_path)


def test_plaintext_needs_the_ca_of_whatever_ends_tls(ca: Path, tmp_path: Path) -> None:
    config = configuration({"server": {"https": {"plaintext": True}}, **EVERYTHING})
    with pytest.raises(ManifestError, match="plaintext"):
        make_manifests(config, ManifestOptions(url=URL), tmp_path)
    assert webhooks(make(config, ca))


def test_the_generated_certificate_is_made_once_and_then_kept(tmp_path: Path) -> None:
    bundles = {
        webhooks(make_manifests(configuration(EVERYTHING), ManifestOptions(url=URL), tmp_path))[0][
            "clientConfig"
        ]["caBundle"]
        for _ in range(2)
    }
    assert bundles == {base64.b64encode((tmp_path / "tls" / "ca.crt").read_bytes()).decode()}


def test_nothing_but_certificates_is_taken_from_the_ca_file(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "both.pem"
    path.write_bytes(authority.server().key + b"a comment\n" + authority.pem)
    bundle = base64.b64decode(webhooks(make(admitting({}), path))[0]["clientConfig"]["caBundle"])
    assert bundle == authority.pem


@pytest.mark.parametrize(
    ("url", "names", "warned"),
    [
        ("https://127.0.0.1:8443", [], False),
        ("https://[::1]:8443", [], False),
        ("https://localhost", [], False),
        ("https://10.1.2.3:8443", [], True),
        ("https://hooks.example.org", ["hooks.example.org"], False),
        ("https://hooks.example.org", ["*.example.org"], False),
        ("https://a.hooks.example.org", ["*.example.org"], True),
    ],
)
def test_warns_of_a_host_that_the_certificate_is_not_for(
    authority: Authority, ca: Path, tmp_path: Path, url: str, names: list[str], warned: bool
) -> None:
    made = make(served(authority, tmp_path, *names), ca, url=url)
    assert any("is not for" in note for note in made.notes) == warned


def test_warns_of_a_certificate_of_another_authority(authority: Authority, ca: Path, tmp_path: Path) -> None:
    wrong = make(served(Authority("another"), tmp_path), ca).notes
    assert [note for note in wrong if "was not issued by the CA" in note]
    intermediate = Authority("intermediate", issuer=authority)
    right = make(served(intermediate, tmp_path), ca).notes
    assert not [note for note in right if "was not issued by the CA" in note]


@pytest.mark.parametrize(
    ("allowed", "warned"), [(["kube-apiserver"], False), (["apiserver.example"], False), (["other"], True)]
)
def test_warns_of_a_client_that_bulkhead_would_refuse(
    authority: Authority,
    clients: Authority,
    client: dict[str, Path],
    ca: Path,
    tmp_path: Path,
    allowed: list[str],
    warned: bool,
) -> None:
    (tmp_path / "clients.crt").write_bytes(clients.pem)
    https: dict[str, Any] = {"clientCA": str(tmp_path / "clients.crt"), "allowedNames": allowed}
    made = make(served(authority, tmp_path, **https), ca, **client)
    assert any("allowedNames" in note for note in made.notes) == warned
    assert any(
        "give --client-certificate" in note for note in make(served(authority, tmp_path, **https), ca).notes
    )
    (tmp_path / "clients.crt").write_bytes(authority.pem)
    assert any("clientCA" in note for note in make(served(authority, tmp_path, **https), ca, **client).notes)


# What is refused


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"url": None}, "--url or --service"),
        ({"url": "http://127.0.0.1:8443"}, "https only"),
        ({"url": "https://127.0.0.1:8443/hooks"}, "nothing may follow"),
        ({"url": "https://127.0.0.1:8443?a=b"}, "nothing may follow"),
        ({"url": "https://127.0.0.1:8443#a"}, "nothing may follow"),
        ({"url": "https://me:secret@127.0.0.1"}, "no user"),
        ({"url": "https://127.0.0.1:0"}, "port 0"),
        ({"url": "https://127.0.0.1:99999"}, "--url"),
        ({"url": "https://"}, "--url"),
        ({"url": "https://a b:1"}, "--url"),
        ({"url": "127.0.0.1:8443"}, "--url"),
        ({"service": "hook"}, "NAMESPACE/NAME"),
        ({"service": "a/b:0"}, "1 to 65535"),
        ({"service": "a/b:65536"}, "1 to 65535"),
        ({"service": "a/B"}, "NAMESPACE/NAME"),
        ({"service": "a/b/c"}, "NAMESPACE/NAME"),
        ({"url": None, "service": "a/b"}, "give --url as well"),
        ({"apiserver_dir": "etc/bulkhead"}, "absolute path"),
        ({"apiserver_dir": "/etc/a b"}, "absolute path"),
        ({"apiserver_dir": "/etc/../b"}, "absolute path"),
        ({"name": "Not_A_Name"}, "--name"),
        ({"namespace": "a.b"}, "--namespace"),
        ({"excluded_namespaces": ("A",)}, "--exclude-namespace"),
        ({"authorizer_order": "Node,RBAC"}, "--authorizer-order"),
        ({"authorizer_order": "Node,Node,Bulkhead"}, "--authorizer-order"),
        ({"authorizer_order": "Magic,Bulkhead"}, "--authorizer-order"),
        ({"client_certificate": Path("x")}, "belong together"),
        ({"embed_client_certificate": True}, "needs --client-certificate"),
    ],
)
def test_wrong_options(ca: Path, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        make(configuration(EVERYTHING), ca, **chosen)


def test_a_ca_file_that_is_not_there() -> None:
    with pytest.raises(ManifestError, match="cannot read /does/not/exist: No such file"):
        make(configuration(EVERYTHING), Path("/does/not/exist"))


def test_passwords_in_a_url_are_not_repeated() -> None:
    with pytest.raises(ValueError, match="no user") as caught:
        UrlEndpoint.parse("https://me:secret@127.0.0.1")
    assert "secret" not in str(caught.value)


def test_a_configuration_without_modules_has_no_manifests(ca: Path) -> None:
    with pytest.raises(ManifestError, match="no modules"):
        make(configuration({}), ca)


def test_a_service_is_enough_for_admission(ca: Path) -> None:
    assert webhooks(make(admitting({}), ca, url=None, service="policies/hook"))
    assert ServiceEndpoint.parse("a/b") == ServiceEndpoint("a", "b", 443)


def test_a_client_certificate_has_to_be_one(authority: Authority, ca: Path, tmp_path: Path) -> None:
    server, key = authority.issue("s", purposes=(SERVER,)).write(tmp_path, "server")
    _, other = authority.issue("c", purposes=(CLIENT,)).write(tmp_path, "other")
    with pytest.raises(ManifestError, match="clientAuth"):
        make(configuration(EVERYTHING), ca, client_certificate=server, client_key=key)
    with pytest.raises(SandboxError, match="does not fit"):
        make(configuration(EVERYTHING), ca, client_certificate=server, client_key=other)
    with pytest.raises(ManifestError, match="expected PEM"):
        make(configuration(EVERYTHING), ca, client_certificate=key, client_key=key)


def test_an_expired_ca_is_refused(tmp_path: Path) -> None:
    from tests.support.certificates import DAY

    (tmp_path / "ca.crt").write_bytes(Authority("old", lasting=-DAY).pem)
    with pytest.raises(ManifestError, match="expired"):
        make(configuration(EVERYTHING), tmp_path / "ca.crt")


# YAML and files


_MEANS_SOMETHING_ELSE = [
    "no",
    "Yes",
    "on",
    "y",
    "true",
    "null",
    "~",
    "22:22",
    "0644",
    "1e3",
    "1_000",
    "0x1f",
    "<<",
]
_HAS_MARKS = ["*", "", "&a", "- a", "a: b", "a #b", "a:", "#", "'", '"', "a\nb"]


@pytest.mark.parametrize(
    "value",
    [*_MEANS_SOMETHING_ELSE, *_HAS_MARKS, "127.0.0.1:8443", "https://a:1/b", "é"],
)
def test_text_stays_text_for_kubectl(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(to_yaml({"key": value, "list": [value], value or "k": 1}))
    assert read_object_file(path).value == {"key": value, "list": [value], value or "k": 1}


FILES = [ManifestFile("README.txt", "text\n"), ManifestFile("apiserver/key", "secret\n", secret=True)]


def test_files_of_earlier_runs_are_replaced_and_others_are_not(tmp_path: Path) -> None:
    write_files(tmp_path, FILES, force=False)
    write_files(tmp_path, [ManifestFile("README.txt", "new\n"), *FILES[1:]], force=False)
    assert (tmp_path / "README.txt").read_text() == f"{MARK}new\n"
    (tmp_path / "apiserver/key").write_text("mine")
    with pytest.raises(ManifestError, match="--force"):
        write_files(tmp_path, FILES, force=False)
    assert (tmp_path / "README.txt").read_text() == f"{MARK}new\n", (
        "nothing is written if anything is refused"
    )
    write_files(tmp_path, FILES, force=True)
    assert (tmp_path / "apiserver/key").read_text() == f"{MARK}secret\n"


def test_files_of_earlier_runs_that_are_not_used_any_more_are_told(tmp_path: Path) -> None:
    write_files(tmp_path, FILES, force=False)
    (tmp_path / "apiserver/mine").write_text("mine")
    assert write_files(tmp_path, FILES[:1], force=False) == [tmp_path / "apiserver/key"]


def test_a_secret_is_never_readable_by_others_even_if_it_was(tmp_path: Path) -> None:
    write_files(tmp_path, [ManifestFile("apiserver/key", "public\n")], force=False)
    write_files(tmp_path, FILES, force=False)
    assert stat.S_IMODE((tmp_path / "apiserver/key").stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ManifestError, match="cannot write"):
        write_files(tmp_path / "file" / "out", FILES, force=False)
