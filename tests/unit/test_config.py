"""bulkhead.yaml: what it may hold, and how its mistakes are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from bulkhead.sandbox import Limits
from bulkhead.service import demo
from bulkhead.service.config import (
    Address,
    Config,
    ConfigError,
    FailurePolicy,
    load_config,
)
from bulkhead.service.modulesource import (
    FileSource,
    HttpsSource,
    OciSource,
    StoredSource,
    default_name,
    parse_source,
)

Load = Callable[[str], Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a configuration that lies beside the modules `m.wasm` and `n.wasm`."""
    (tmp_path / "m.wasm").write_bytes(b"")
    (tmp_path / "n.wasm").write_bytes(b"")

    def load_text(text: str) -> Config:
        path = tmp_path / "bulkhead.yaml"
        path.write_text(text)
        return load_config(path)

    return load_text


def problems(load: Load, text: str) -> list[str]:
    """The problems of a configuration, without the folder of the file."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    folder = str(Path(caught.value.problems[0].file).parent)
    return [str(problem).replace(folder + "/", "") for problem in caught.value.problems]


def test_the_demo_configuration_can_be_loaded() -> None:
    config = load_config(demo.CONFIGURATION)
    names = [(section, [module.name for module in modules]) for section, modules in config.sections()]
    assert names == [
        ("authentication", ["magic-authn"]),
        ("authorization", ["magic-authz"]),
        ("admission", ["magic-mutate", "magic-validate"]),
    ]


def test_everything_has_a_default(load: Load) -> None:
    config = load("{}")
    assert config.server.https.address == Address("127.0.0.1", 8443)
    assert config.server.grpc.address == Address("127.0.0.1", 50051)
    assert (config.server.max_body_bytes, config.server.grace_seconds) == (8 << 20, 25.0)
    assert (config.server.state_dir, config.server.wasmtime) == (None, None)
    assert config.sandbox_options(Path("/s")).limits == Limits()
    assert [modules for _, modules in config.sections()] == [(), (), ()]


def test_every_key_is_read(load: Load, tmp_path: Path) -> None:
    config = load("""
server:
  https: {address: "[::1]:0"}
  grpc: {address: localhost:1}
  maxBodyBytes: 1Mi
  gracePeriod: 500ms
  stateDir: state
  wasmtime: /opt/wasmtime
limits: {memory: 128Mi, timeout: 1m, cpu: 2s, stdout: 1Mi, stderr: 1Ki, stack: 1Mi, tableElements: 5, fuel: 7,
         maxConcurrentRuns: 3, maxQueuedRuns: 0}
authentication:
  audiences: [api]
  modules: [{module: m.wasm}]
authorization:
  modules: [{name: z, module: m.wasm, settings: {a: [1, 2.5, null]}, debug: true, limits: {memory: 1Mi}}]
admission:
  modules:
    - module: n.wasm
      mutating: true
      type: wasi
      failurePolicy: Ignore
      settings: null
      rules:
      - {operations: ["*"], apiGroups: ["", apps], apiVersions: [v1], resources: [pods/exec], scope: "*"}
""")
    assert config.server.https.address == Address("::1", 0)
    assert str(config.server.https.address) == "[::1]:0"
    assert config.server.grpc.address == Address("localhost", 1)
    assert (config.server.max_body_bytes, config.server.grace_seconds) == (1 << 20, 0.5)
    assert (config.server.state_dir, config.server.wasmtime) == (tmp_path / "state", Path("/opt/wasmtime"))
    limits = Limits(
        memory_bytes=128 << 20,
        wall_seconds=60,
        cpu_seconds=2,
        stdout_bytes=1 << 20,
        stderr_bytes=1024,
        stack_bytes=1 << 20,
        table_elements=5,
        fuel=7,
    )
    options = config.sandbox_options(Path("/s"))
    assert (options.limits, options.max_concurrent_runs, options.max_queued_runs) == (limits, 3, 0)
    assert config.authentication.audiences == ("api",)
    (authz,) = config.authorization.modules
    assert (authz.name, authz.source, authz.debug) == ("z", FileSource(tmp_path / "m.wasm"), True)
    assert authz.settings == {"a": [1, 2.5, None]}
    assert config.limits_of(authz).memory_bytes == 1 << 20
    assert config.limits_of(authz).fuel == 7
    (admission,) = config.admission.modules
    assert (admission.name, admission.mutating, admission.failure_policy) == ("n", True, FailurePolicy.IGNORE)
    assert admission.has_settings
    assert admission.rules[0].rule().resources == (("pods", "exec"),)
    assert not config.authentication.modules[0].has_settings


def test_callers_may_ask_for_what_the_file_grants_to_a_module(load: Load) -> None:
    config = load("admission: {modules: [{module: m.wasm, limits: {memory: 2Gi, timeout: 2m}}]}")
    maximum = config.sandbox_options(Path("/s")).maximum_limits
    assert (maximum.memory_bytes, maximum.wall_seconds, maximum.fuel) == (2 << 30, 120, None)
    config.limits_of(config.admission.modules[0]).within(maximum)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("magic-authn.wasm", "magic-authn"),
        ("My_Policy.wasm", "my-policy"),
        ("/a/b/policy.v1.wasm", "policy-v1"),
        ("noextension", "noextension"),
        ("_.wasm", "module"),
        ("é.wasm", "module"),
        ("a" * 100 + ".wasm", "a" * 63),
    ],
)
def test_a_module_without_a_name_is_called_by_its_file(file: str, name: str) -> None:
    assert default_name(parse_source(file, Path())) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "",
            "bulkhead.yaml: expected a mapping with the sections server, limits, isolation, authentication, "
            "authorization, admission, got an empty file",
        ),
        ("[]", "bulkhead.yaml: expected a mapping with the sections server, .*, got a list"),
        ("a: 1\nb: 2\na: 3", r'bulkhead.yaml:3: duplicate key "a"'),
        ("a: [1", "bulkhead.yaml:1: not YAML: expected ',' or ']'"),
        ("a: 1\n--- \nb: 1", "bulkhead.yaml:2: expected one document, found another"),
        ("a: !!python/object:os.system x", "bulkhead.yaml:1: not YAML: could not determine a constructor"),
        ("\n\n\tx: 1", "bulkhead.yaml:3: not YAML: found character"),
        ("a: \0", "bulkhead.yaml: not YAML: unacceptable character"),
        ("[" * 5000, "bulkhead.yaml: nested too deep"),
    ],
)
def test_refuses_what_is_no_yaml_mapping(load: Load, text: str, expected: str) -> None:
    (problem,) = problems(load, text)
    assert re.match(expected, problem)


def test_refuses_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bulkhead.yaml"
    path.write_bytes(b"server: {}\nx: \xff\n")
    with pytest.raises(ConfigError, match=r"bulkhead.yaml:2: expected UTF-8 text"):
        load_config(path)


def test_refuses_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the file: No such file or directory"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read the file: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "admision: {}",
            "1: admision: expected one of the keys server, limits, isolation, authentication, authorization, "
            "admission, got an unknown one; did you mean admission?",
        ),
        (
            "server: {grpc: {tls: {}}}",
            "1: server.grpc.tls: expected one of the keys certificate, key, clientCA, allowedNames, address, "
            "adminNames, got an unknown one",
        ),
        (
            "server: {graceperiod: 1s}",
            "1: server.graceperiod: expected one of the keys https, grpc, maxBodyBytes, "
            "gracePeriod, workers, stateDir, wasmtime, got an unknown one; did you mean gracePeriod?",
        ),
        ("server: {grace_period: 1s}", "did you mean gracePeriod?"),
        ("server:", "1: server: expected a mapping, got nothing"),
        (
            "server: {https: {address: 8443}}",
            "server.https.address: expected HOST:PORT such as 127.0.0.1:8443, got 8443",
        ),
        (
            "server: {https: {address: ':8443'}}",
            "expected a host before the port; for all addresses write 0.0.0.0:8443",
        ),
        ("server: {https: {address: '::1:8443'}}", "expected an IPv6 address to stand in brackets"),
        ("server: {https: {address: '[1.2.3.4]:1'}}", "expected an IPv6 address to stand in brackets"),
        ("server: {https: {address: '[zz:1]:1'}}", "expected an IPv6 address in the brackets, got 'zz:1'"),
        ("server: {https: {address: 'h:65536'}}", "with a port from 0 to 65535, got 'h:65536'"),
        ("server: {https: {address: 'a b:1'}}", "expected a host name or an IP address, got 'a b'"),
        (
            "server: {grpc: {address: '0.0.0.0:1'}}",
            "1: server.grpc.address: expected a certificate and a key, or a loopback address such as "
            "127.0.0.1:50051: without TLS others could read and change what is said "
            "(serve --insecure allows it), got 0.0.0.0:1",
        ),
        ("server: {grpc: {address: 'example.com:1'}}", "or a loopback address"),
        (
            "server: {https: {address: '0.0.0.0:1', plaintext: true}}",
            "1: server.https.plaintext: expected a certificate and a key, or a loopback address",
        ),
        (
            "server: {https: {certificate: m.wasm}}",
            "1: server.https: expected certificate and key together",
        ),
        (
            "server: {https: {allowedNames: [a]}}",
            "1: server.https: expected clientCA beside allowedNames: else clients have no names, got none",
        ),
        (
            "server: {grpc: {clientCA: m.wasm}}",
            "1: server.grpc: expected certificate and key beside clientCA, got none",
        ),
        (
            "server: {grpc: {adminNames: [a]}}",
            "1: server.grpc: expected clientCA beside adminNames: else clients have no names, got none",
        ),
        (
            "server: {https: {plaintext: true, certificate: m.wasm, key: m.wasm}}",
            "1: server.https: expected plaintext or a certificate, got both",
        ),
        (
            "server: {https: {certificate: no.crt, key: m.wasm}}",
            "1: server.https.certificate: expected the path of a file, but there is no file no.crt",
        ),
        (
            "server: {maxBodyBytes: 8MB}",
            "server.maxBodyBytes: expected a quantity of bytes: '8MB' is not a quantity",
        ),
        ("server: {maxBodyBytes: 100}", "server.maxBodyBytes: expected at least 1024, got 100"),
        (
            "server: {maxBodyBytes: true}",
            "expected a quantity of bytes such as 65536, 64Mi or 1.5Gi, got true",
        ),
        (
            "server: {gracePeriod: 25}",
            "expected a duration with its unit, such as 500ms, 2s or 1m30s, got 25",
        ),
        ("server: {gracePeriod: 2 s}", "expected a duration: '2 s' is not a duration"),
        ("server: {stateDir: 5}", "server.stateDir: expected the path of a file or folder, got 5"),
        ("limits: {memory: 1Ki}", "1: limits.memory: expected a value from 65536 to 4294967296, got '1Ki'"),
        (
            "limits: {memory: null}",
            "limits.memory: expected a quantity of bytes such as 65536, 64Mi or 1.5Gi, got nothing",
        ),
        ("limits: {timeout: 0s}", "1: limits.timeout: expected a value from 0.001 to 3600, got '0s'"),
        ("limits: {fuel: 1.5}", "limits.fuel: expected an integer, got 1.5"),
        ("limits: {tableElements: -1}", "limits.tableElements: expected a value from 0 to 10000000, got -1"),
        ("server: {workers: 0}", "server.workers: expected auto, or an integer from 1 to 64, got 0"),
        ("server: {workers: two}", "server.workers: expected auto, or an integer from 1 to 64, got 'two'"),
        ("limits: {maxConcurrentRuns: 0}", "limits.maxConcurrentRuns: expected at least 1, got 0"),
        (
            "authentication: {audiences: ['']}",
            "authentication.audiences[0]: expected a string that is not empty, got ''",
        ),
        ("authentication: {modules: {}}", "authentication.modules: expected a list, got a mapping"),
        (
            "authentication: {modules: [m.wasm]}",
            "authentication.modules[0]: expected a mapping, got 'm.wasm'",
        ),
        (
            "authentication: {modules: [{name: x}]}",
            "modules[0].module: expected a value, got nothing: this key is required",
        ),
        (
            "authentication: {modules: [{module: m.wasm, mutating: true}]}",
            "modules[0].mutating: expected one of the keys "
            "name, module, digest, settings, debug, limits, got an unknown one",
        ),
        (
            "authentication: {modules: [{module: m.wasm, name: A_b}]}",
            "modules[0].name: expected a name of at most 63 "
            "lower-case letters, digits, '-' and '.', got 'A_b'",
        ),
        (
            "authentication: {modules: [{module: m.wasm, debug: 'yes'}]}",
            "modules[0].debug: expected true or false, got 'yes'",
        ),
        (
            "authentication: {modules: [{module: m.wasm, settings: {d: 2020-01-01}}]}",
            "d is a date: put it in quotes",
        ),
        (
            "authentication: {modules: [{module: m.wasm, settings: {a: [.nan]}}]}",
            "a[0] is not a finite number",
        ),
        (
            "authentication: {modules: [{module: m.wasm, settings: {1: 2}}]}",
            "the key 1, which is not a string",
        ),
        (
            "authentication: {modules: [{module: m.wasm, limits: {memory: 5Gi}}]}",
            "modules[0].limits.memory: expected a value from 65536 to 4294967296, got '5Gi'",
        ),
        (
            "authentication: {modules: [{module: m.wasm, limits: {maxQueuedRuns: 1}}]}",
            "modules[0].limits.maxQueuedRuns: "
            "expected one of the keys memory, timeout, cpu, stdout, stderr, stack, tableElements, fuel, got",
        ),
        (
            "authentication: {modules: [{module: m.wasm}, {module: m.wasm}]}",
            "1: authentication.modules[1].name: expected a name of its own, got 'm', which "
            "authentication.modules[0] has; set name",
        ),
        (
            "admission: {modules: [{module: m.wasm, type: kubewarden}]}",
            "modules[0].type: expected 'wasi': Kubewarden policies "
            "('kubewarden') are not supported by this version",
        ),
        ("admission: {modules: [{module: m.wasm, type: x}]}", "modules[0].type: expected 'wasi', got 'x'"),
        (
            "admission: {modules: [{module: m.wasm, failurePolicy: fail}]}",
            "expected 'Fail', 'Ignore' or 'Error', got 'fail'",
        ),
        (
            "admission: {modules: [{module: m.wasm, namespaceSelector: {}}]}",
            "modules[0].namespaceSelector: not supported here",
        ),
    ],
)
def test_every_mistake_is_told_with_its_line_and_what_was_expected(
    load: Load, text: str, expected: str
) -> None:
    (problem,) = problems(load, text)
    assert problem.startswith("bulkhead.yaml:1: ")
    assert expected in problem


def rule_problems(load: Load, rule: str) -> list[str]:
    text = f"admission:\n  modules:\n  - module: m.wasm\n    rules:\n    - {rule}\n"
    return [
        problem.removeprefix("bulkhead.yaml:5: admission.modules[0].rules[0].")
        for problem in problems(load, text)
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "operations: [create]",
            "operations[0]: expected one of CREATE, UPDATE, DELETE, CONNECT, *, got 'create'",
        ),
        ("operations: []", "operations: expected at least one entry, got an empty list"),
        ("operations: CREATE", "operations: expected a list, got 'CREATE'"),
        (
            "apiGroups: [apps/v1]",
            'apiGroups[0]: expected an API group such as apps, "" for the core group, or "*", '
            "got 'apps/v1'",
        ),
        ("apiGroups: [5]", "apiGroups[0]: expected a string, got 5"),
        (
            "apiVersions: [apps/v1]",
            "apiVersions[0]: expected an API version such as v1 (without its group), or \"*\", got 'apps/v1'",
        ),
        (
            "resources: [Pod]",
            "resources[0]: expected a resource in lower-case plural such as pods, pods/status, "
            '"pods/*" or "*", got \'Pod\'',
        ),
        (
            "resources: [pods/]",
            "resources[0]: expected a resource in lower-case plural such as pods, pods/status, "
            '"pods/*" or "*", got \'pods/\'',
        ),
        ("scope: cluster", "scope: expected 'Cluster', 'Namespaced' or '*', got 'cluster'"),
        (
            "apiGroup: ['']",
            "apiGroup: expected one of the keys operations, apiGroups, apiVersions, resources, scope, "
            "got an unknown one; did you mean apiGroups?",
        ),
    ],
)
def test_every_mistake_in_a_rule_is_told(load: Load, change: str, expected: str) -> None:
    parts = {"operations": "['*']", "apiGroups": "['*']", "apiVersions": "['*']", "resources": "['*']"}
    key, _, value = change.partition(": ")
    parts[key] = value
    rule = "{" + ", ".join(f"{name}: {text}" for name, text in parts.items()) + "}"
    assert rule_problems(load, rule) == [expected]


def test_a_rule_needs_all_of_its_lists(load: Load) -> None:
    missing = [problem.split(":")[0] for problem in rule_problems(load, "{}")]
    assert missing == ["operations", "apiGroups", "apiVersions", "resources"]


def test_all_problems_are_told_at_once_in_the_order_of_the_file(load: Load) -> None:
    told = problems(
        load,
        """server:
  https:
    adress: 1
limits:
  memory: lots
admission:
  modules:
    - module: gone.wasm
      rules:
        - operations: [CREATE]
          apiGroups: [""]
          apiVersions: v1
          resources: [pods]
    - module: m.wasm
      name: x
    - module: n.wasm
      name: x
""",
    )
    assert [problem.split(": ")[:2] for problem in told] == [
        ["bulkhead.yaml:3", "server.https.adress"],
        ["bulkhead.yaml:5", "limits.memory"],
        ["bulkhead.yaml:8", "admission.modules[0].module"],
        ["bulkhead.yaml:12", "admission.modules[0].rules[0].apiVersions"],
        ["bulkhead.yaml:17", "admission.modules[2].name"],
    ]


def test_the_same_name_may_be_used_in_two_sections(load: Load) -> None:
    config = load(
        "authentication: {modules: [{module: m.wasm}]}\nauthorization: {modules: [{module: m.wasm}]}"
    )
    assert [modules[0].name for _, modules in config.sections() if modules] == ["m", "m"]


def test_words_that_older_yaml_reads_as_booleans_stay_words(load: Load) -> None:
    config = load(
        "authentication: {modules: [{module: m.wasm, settings: {country: no, time: 22:22, id: 0x1F}}]}"
    )
    assert config.authentication.modules[0].settings == {"country": "no", "time": "22:22", "id": 31}


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_knows_which_addresses_only_this_machine_can_reach(address: str, loopback: bool) -> None:
    parsed = Address.parse(address)
    assert parsed.is_loopback is loopback
    assert str(parsed) == address


def test_a_configuration_cannot_be_changed(load: Load) -> None:
    config = load("{}")
    with pytest.raises(ValidationError):
        config.server.max_body_bytes = 5


def test_the_documented_configuration_can_be_loaded(load: Load, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    every_key, sources = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    for name in re.findall(r": ([^\s:]+\.(?:wasm|crt|key))", every_key + sources):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    config = load(every_key)
    assert [len(modules) for _, modules in config.sections()] == [1, 1, 1]
    modules = load(sources).authorization.modules
    assert [type(module.source) for module in modules] == [FileSource, StoredSource, HttpsSource, OciSource]
    assert [module.name for module in modules] == ["who", "stored", "who-else", "quota"]
