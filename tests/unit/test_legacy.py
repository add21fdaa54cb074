"""The configuration files of k8s-wasm: what they may hold, what becomes of it, how mistakes are told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from bulkhead.service.config import Config, ConfigError
from bulkhead.service.configfiles import ConfigFiles
from bulkhead.service.modulesource import FileSource
from bulkhead.service.objectyaml import read_object_file

RULES = "[{operations: [CREATE], apiGroups: [''], apiVersions: [v1], resources: [configmaps]}]"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files lie; the working directory is another."""
    working, folder = tmp_path / "working", tmp_path / "files"
    working.mkdir()
    folder.mkdir()
    for name in ("m.wasm", "n.wasm"):
        (folder / name).write_bytes(b"")
    monkeypatch.chdir(working)
    return folder


def authentication(folder: Path, text: str) -> Config:
    (folder / "authn.conf").write_text(text)
    return ConfigFiles(authentication=folder / "authn.conf").load()


def admission(folder: Path, text: str) -> Config:
    """A configuration with this AdmissionConfiguration."""
    (folder / "admission.conf").write_text(text)
    return ConfigFiles(admission=folder / "admission.conf").load()


def inline(modules: str) -> str:
    return f"""
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: WASM
  configuration:
    modules: {modules}
"""


def without_folder(folder: Path, problems: object) -> list[str]:
    assert isinstance(problems, tuple)
    return [str(problem).replace(f"{folder}/", "") for problem in problems]


def problems(folder: Path, files: ConfigFiles) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        files.load()
    return without_folder(folder, caught.value.problems)


# The files of k8s-wasm's own documentation


def test_all_three_files_make_one_configuration(folder: Path) -> None:
    (folder / "authn.conf").write_text(f"modules:\n- name: magic-authentication\n  module: {folder}/m.wasm\n")
    (folder / "authz.conf").write_text(f"modules:\n- name: magic-authorization\n  module: {folder}/n.wasm\n")
    (folder / "admission.conf").write_text(f"""
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: WASM
  configuration:
    modules:
    - name: magic-validation
      module: {folder}/m.wasm
      rules:
      - operations: ["CREATE", "UPDATE"]
        apiGroups: [""]
        apiVersions: ["v1"]
        resources: ["configmaps"]
    - name: magic-mutator
      module: {folder}/n.wasm
      mutating: true
      settings: {{mandatory_annotations: [puzzle.ch/owner]}}
      debug: true
      rules:
      - operations: ["CREATE", "UPDATE"]
        apiGroups: [""]
        apiVersions: ["v1"]
        resources:
        - configmaps
        - namespaces
""")
    files = ConfigFiles(
        authentication=folder / "authn.conf",
        authorization=folder / "authz.conf",
        admission=folder / "admission.conf",
    )
    config = files.load()
    assert [
        (section, [(each.name, each.source) for each in modules]) for section, modules in config.sections()
    ] == [
        ("authentication", [("magic-authentication", FileSource(folder / "m.wasm"))]),
        ("authorization", [("magic-authorization", FileSource(folder / "n.wasm"))]),
        (
            "admission",
            [
                ("magic-validation", FileSource(folder / "m.wasm")),
                ("magic-mutator", FileSource(folder / "n.wasm")),
            ],
        ),
    ]
    validation, mutator = config.admission.modules
    assert (validation.mutating, validation.debug, validation.has_settings) == (False, False, False)
    assert (mutator.mutating, mutator.debug) == (True, True)
    assert mutator.settings == {"mandatory_annotations": ["puzzle.ch/owner"]}
    assert mutator.rules[0].resources == ("configmaps", "namespaces")
    assert mutator.rules[0].scope == "*"
    assert (mutator.failure_policy, mutator.type) == ("Fail", "wasi")
    assert config.notes == ()
    assert config.files == tuple(folder / name for name in ("authn.conf", "authz.conf", "admission.conf"))


def test_json_is_read_as_well(folder: Path) -> None:
    modules = [{"name": "a", "module": "m.wasm", "settings": {"smile": "\U0001f600", "slash": "a/b"}}]
    text = json.dumps({"modules": modules}, indent="\t").replace("a/b", "a\\/b")
    (module,) = authentication(folder, text).authentication.modules
    assert (module.name, module.settings) == ("a", {"smile": "\U0001f600", "slash": "a/b"})
    document: dict[str, Any] = {
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "AdmissionConfiguration",
        "plugins": [{"name": "WASM", "path": "other.json"}],
    }
    (folder / "other.json").write_text(text)
    assert [each.name for each in admission(folder, json.dumps(document)).admission.modules] == ["a"]


def test_the_path_of_the_plugin_is_relative_to_the_admission_configuration(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "wasm.conf").write_text("modules: [{module: m.wasm}]")
    (folder / "sub" / "m.wasm").write_bytes(b"")
    config = admission(
        folder,
        """
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- {name: WASM, path: sub/wasm.conf}
""",
    )
    assert config.admission.modules[0].source == FileSource(folder / "sub" / "m.wasm")
    assert config.files == (folder / "admission.conf", folder / "sub" / "wasm.conf")
    assert config.file_of(("admission", "modules")) == folder / "sub" / "wasm.conf"


@pytest.mark.parametrize("version", ["apiserver.config.k8s.io/v1", "apiserver.k8s.io/v1alpha1"])
def test_other_plugins_are_ignored_with_a_note(folder: Path, version: str) -> None:
    config = admission(
        folder,
        f"""
apiVersion: {version}
kind: AdmissionConfiguration
plugins:
- name: PodSecurity
  configuration: {{kind: PodSecurityConfiguration}}
- name: WASM
  configuration: {{modules: [{{name: a, module: m.wasm, rules: {RULES}}}]}}
  path: nowhere
- name: WASM
  configuration: {{modules: [{{name: b, module: m.wasm}}]}}
""",
    )
    assert [each.name for each in config.admission.modules] == ["a"]
    assert without_folder(folder, config.notes) == [
        "admission.conf:5: plugins[0]: ignored: the plugin PodSecurity is kube-apiserver's own",
        "admission.conf:9: plugins[1].path: ignored: there is a configuration beside it",
        "admission.conf:10: plugins[2]: ignored: kube-apiserver takes the first plugin with the name WASM",
    ]


# What k8s-wasm takes


@pytest.mark.parametrize(
    ("written", "name", "noted"),
    [
        ("magic-authn", "magic-authn", False),
        ("my.module-1", "my.module-1", False),
        ("5", "5", False),  # a number, as text
        ("Magic Authn", "magic-authn", True),
        ("magic_authn", "magic-authn", True),
        ("Übung", "bung", True),
        ("team/policy", "team-policy", True),
        ("'...'", "module", True),
        ("a" * 80, "a" * 63, True),
        ("", "m", True),
        ("''", "m", True),
        ("null", "m", True),
    ],
)
def test_any_name_is_taken(folder: Path, written: str, name: str, noted: bool) -> None:
    config = authentication(folder, f"modules:\n- name: {written}\n  module: m.wasm\n")
    assert config.authentication.modules[0].name == name
    notes = without_folder(folder, config.notes)
    if noted:
        (note,) = notes
        assert note.startswith("authn.conf:2: modules[0].name: ")
        assert note.endswith(f" has the name {name} here")
    else:
        assert notes == []


def test_a_module_without_a_name_is_called_after_its_file(folder: Path) -> None:
    config = authentication(folder, "modules:\n- module: /a/Magic_Authn.wasm\n")
    assert config.authentication.modules[0].name == "magic-authn"
    assert without_folder(folder, config.notes) == [
        "authn.conf:2: modules[0].name: 'Magic_Authn.wasm' has the name magic-authn here"
    ]


def test_names_that_are_there_twice_are_told_apart(folder: Path) -> None:
    names = ["a", "a", "a-2", "A", "b" * 63, "b" * 63, "m", None]
    modules = [{"module": "m.wasm"} | ({"name": name} if name else {}) for name in names]
    config = authentication(folder, json.dumps({"modules": modules}))
    found = [each.name for each in config.authentication.modules]
    assert found == ["a", "a-3", "a-2", "a-4", "b" * 63, "b" * 61 + "-2", "m", "m-2"]


def test_unknown_keys_are_ignored_with_a_note(folder: Path) -> None:
    config = authentication(
        folder,
        """
apiVersion: v1
note: nothing
modules:
- name: a
  module: m.wasm
  mutating: true
  limits: {memory: 1Gi}
""",
    )
    (module,) = config.authentication.modules
    assert module.limits.memory is None
    assert without_folder(folder, config.notes) == [
        "authn.conf:3: note: ignored: k8s-wasm knows no such key; use modules, apiVersion, kind",
        "authn.conf:7: modules[0].mutating: ignored: k8s-wasm knows no such key; "
        "use name, module, settings, debug",
        "authn.conf:8: modules[0].limits: ignored: k8s-wasm knows no such key; "
        "it is for modules in bulkhead.yaml",
    ]


def test_keys_are_known_in_any_case_and_null_is_nothing(folder: Path) -> None:
    config = authentication(folder, "Modules: [{NAME: a, module: m.wasm, settings: null, debug: null}]")
    (module,) = config.authentication.modules
    assert (module.name, module.has_settings, module.debug) == ("a", False, False)
    (module,) = admission(
        folder, inline("[{name: a, module: m.wasm, rules: null, type: ''}]")
    ).admission.modules
    assert (module.rules, module.type) == ((), "wasi")


@pytest.mark.parametrize("text", ["modules: []", "modules:", "{}"])
def test_a_file_without_modules_is_taken_with_a_note(folder: Path, text: str) -> None:
    config = authentication(folder, text)
    assert config.authentication.modules == ()
    assert "has no modules" in str(config.notes[0])


def test_rules_without_what_can_match_nothing(folder: Path) -> None:
    config = admission(
        folder,
        """
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: WASM
  configuration:
    modules:
    - name: a
      module: m.wasm
      rules:
      - {operations: [CREATE], apiGroups: [apps], apiVersions: [v1]}
      - {operations: [CREATE, delete], apiGroups: [null], apiVersions: [v1, apps/v1], resources: [pods, Pods]}
      - {operations: [CREATE], apiGroups: [apps], apiVersions: [v1], resources: ["*"], scope: cluster}
      - {operations: ["*"], apiGroups: ["*"], apiVersions: ["*"], resources: ["*/*"], scope: Cluster, more: 1}
""",
    )
    first, second = config.admission.modules[0].rules
    assert (first.operations, first.api_groups, first.api_versions) == (("CREATE",), ("",), ("v1",))
    assert (first.resources, first.scope) == (("pods",), "*")
    assert (second.resources, second.scope) == (("*/*",), "Cluster")
    notes = without_folder(folder, config.notes)
    prefix = "plugins[0].configuration.modules[0].rules"
    assert [
        note.partition(": ignored")[0].partition(": matches")[0].partition(": has")[0] for note in notes
    ] == [
        f"admission.conf:11: {prefix}[0].resources",
        f"admission.conf:12: {prefix}[1].operations[1]",
        f"admission.conf:12: {prefix}[1].apiVersions[1]",
        f"admission.conf:12: {prefix}[1].resources[1]",
        f"admission.conf:13: {prefix}[2].scope: 'cluster' matches nothing: the rule is left out",
        f"admission.conf:14: {prefix}[3].more",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "{a: yes, b: Off, c: 'no', d: y, e: true}",
            {"a": True, "b": False, "c": "no", "d": True, "e": True},
        ),
        ("{a: 2020-01-01, b: 22:22}", {"a": "2020-01-01", "b": "22:22"}),
        ("{a: 0644, b: 0o17, c: 08, d: 0x1F, e: 0}", {"a": 420, "b": 15, "c": 8, "d": 31, "e": 0}),
        ("{1: {true: x}, 2.5: y}", {"1": {"true": "x"}, "2.5": True}),
        ('{"a": "yes", "b": [1.5, null]}', {"a": "yes", "b": [1.5, None]}),
    ],
)
def test_values_are_read_as_kubernetes_reads_them(folder: Path, text: str, value: object) -> None:
    (folder / "text").write_text(text)
    assert read_object_file(folder / "text").value == value


# Paths of modules


def test_relative_modules_are_found_in_the_working_directory_or_beside_the_file(folder: Path) -> None:
    working = Path.cwd()
    (working / "n.wasm").write_bytes(b"")
    (working / "w.wasm").write_bytes(b"")
    config = authentication(
        folder, "modules: [{module: m.wasm}, {module: ./w.wasm}, {module: n.wasm}, {module: none.wasm}]"
    )
    assert [each.source for each in config.authentication.modules] == [
        FileSource(folder / "m.wasm"),
        FileSource(working / "w.wasm"),
        FileSource(working / "n.wasm"),
        FileSource(folder / "none.wasm"),
    ]
    taken = [str(note) for note in config.notes if note.where.endswith("module")]
    assert taken == [
        f"{folder}/authn.conf:1: modules[2].module: taken from the working directory, as k8s-wasm does: "
        f"{working}/n.wasm, and not {folder}/n.wasm"
    ]


def test_a_module_is_always_a_path(folder: Path) -> None:
    config = authentication(folder, "modules: [{module: 'https://example.com/m.wasm'}]")
    assert isinstance(config.authentication.modules[0].source, FileSource)


# Together with bulkhead.yaml


def test_bulkhead_yaml_says_the_rest(folder: Path) -> None:
    (folder / "bulkhead.yaml").write_text("""
server: {gracePeriod: 3s}
limits: {memory: 128Mi}
authentication: {audiences: [api]}
authorization: {modules: [{module: n.wasm}]}
""")
    (folder / "authn.conf").write_text("modules: [{name: a, module: m.wasm}]")
    config = ConfigFiles(bulkhead=folder / "bulkhead.yaml", authentication=folder / "authn.conf").load()
    assert config.server.grace_seconds == 3.0
    (module,) = config.authentication.modules
    assert config.authentication.audiences == ("api",)
    assert (module.name, config.limits_of(module).memory_bytes) == ("a", 128 << 20)
    assert [each.name for each in config.authorization.modules] == ["n"]
    assert config.files == (folder / "bulkhead.yaml", folder / "authn.conf")
    place = config.problem(("authentication", "modules", 0, "module"), "x")
    assert (place.file, place.where, place.line) == (str(folder / "authn.conf"), "modules[0].module", 1)
    place = config.problem(("authorization", "modules", 0), "x")
    assert (place.file, place.line) == (str(folder / "bulkhead.yaml"), 5)
    copy = pickle.loads(pickle.dumps(config.without_sources()))
    assert copy.authentication == config.without_sources().authentication


def test_modules_given_both_ways_are_a_mistake(folder: Path) -> None:
    (folder / "bulkhead.yaml").write_text("authentication:\n  modules: [{module: n.wasm}]\n")
    (folder / "authn.conf").write_text("modules: [{module: m.wasm}]")
    files = ConfigFiles(bulkhead=folder / "bulkhead.yaml", authentication=folder / "authn.conf")
    assert problems(folder, files) == [
        "bulkhead.yaml:2: authentication.modules: expected modules here or in authn.conf, got both: "
        "remove those of one"
    ]
    (folder / "bulkhead.yaml").write_text("authentication:\n  modules: []\n")
    assert [each.name for each in files.load().authentication.modules] == ["m"]


def test_a_file_without_modules_takes_nothing_from_bulkhead_yaml(folder: Path) -> None:
    (folder / "bulkhead.yaml").write_text("authentication:\n  modules: [{module: n.wasm}]\n")
    (folder / "authn.conf").write_text("modules: []")
    files = ConfigFiles(bulkhead=folder / "bulkhead.yaml", authentication=folder / "authn.conf")
    config = files.load()
    assert [each.name for each in config.authentication.modules] == ["n"]
    assert config.file_of(("authentication", "modules", 0)) == folder / "bulkhead.yaml"


# Mistakes


def test_the_problems_of_all_files_are_told_at_once(folder: Path) -> None:
    (folder / "bulkhead.yaml").write_text("limits: {memory: lots}\n")
    (folder / "authn.conf").write_text("modules:\n- modul: m.wasm\n- module: none.wasm\n  debug: 3\n")
    (folder / "authz.conf").write_text("modules: [\n")
    (folder / "admission.conf").write_text(
        inline(f"""
    - {{name: ok, module: m.wasm, rules: {RULES}}}
    - name: policy
      type: kubewarden
      module: m.wasm
      rules:
      - {{operations: [create], apiGroups: [''], apiVersions: [v1], resources: [pods]}}
      - {{operations: CREATE, apiGroups: [''], apiVersions: [v1], resources: [pods]}}
""")
    )
    files = ConfigFiles(
        bulkhead=folder / "bulkhead.yaml",
        authentication=folder / "authn.conf",
        authorization=folder / "authz.conf",
        admission=folder / "admission.conf",
    )
    found = problems(folder, files)
    modules = "plugins[0].configuration.modules"
    expected = [
        "authz.conf:2: not YAML: ",
        "bulkhead.yaml:1: limits.memory: expected a quantity of bytes",
        "authn.conf:2: modules[0].module: expected a value, got nothing: this key is required",
        "authn.conf:3: modules[1].module: expected the path of a module, but there is no file none.wasm",
        "authn.conf:4: modules[1].debug: expected true or false, got 3",
        f"admission.conf:10: {modules}[1].type: expected 'wasi': Kubewarden policies",
        f"admission.conf:14: {modules}[1].rules[1].operations: expected a list, got 'CREATE'",
    ]
    assert len(found) == len(expected)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start), (text, start)


HEAD = "apiVersion: apiserver.config.k8s.io/v1\nkind: AdmissionConfiguration\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "admission.conf: expected a mapping with the key modules, got an empty file"),
        ("- a", "admission.conf: expected a mapping with the key modules, got something else"),
        ("a: 1\na: 2\n", "admission.conf:2: the key 'a' is there twice"),
        (
            "modules: []",
            "admission.conf:1: kind: expected an AdmissionConfiguration of apiserver.config.k8s.io/v1 "
            "with the plugin WASM, and the modules in its configuration, got modules alone",
        ),
        (
            "apiVersion: v1\nkind: Pod\n",
            "admission.conf:2: kind: expected an AdmissionConfiguration of apiserver.config.k8s.io/v1, "
            "got v1 Pod",
        ),
        (
            HEAD + "plugins: [{name: Wasm}, {name: PodSecurity}]",
            "admission.conf:3: plugins: expected a plugin with the name WASM, got Wasm, PodSecurity",
        ),
        (HEAD, "admission.conf:1: plugins: expected a plugin with the name WASM, got none"),
        (
            HEAD + "plugins:\n- name: WASM\n",
            "admission.conf:4: plugins[0]: expected configuration or path, got neither",
        ),
        (
            HEAD + "plugins:\n- name: WASM\n  path: none.conf\n",
            "admission.conf:5: plugins[0].path: expected the path of a file, but there is no file none.conf",
        ),
        (
            HEAD + "plugins:\n- name: WASM\n  configuration: [1]\n",
            "admission.conf:5: plugins[0].configuration: expected a mapping with the key modules, "
            "got something else",
        ),
        (inline("7"), "admission.conf:7: plugins[0].configuration.modules: expected a list, got 7"),
        (
            inline("[m.wasm]"),
            "admission.conf:7: plugins[0].configuration.modules[0]: expected a mapping, got 'm.wasm'",
        ),
        (
            inline("[{module: m.wasm, type: opa}]"),
            "admission.conf:7: plugins[0].configuration.modules[0].type: expected 'wasi', got 'opa'",
        ),
        (
            inline("[{module: m.wasm, settings: {a: .nan}}]"),
            "admission.conf:7: a number that is not finite, for which JSON has no word",
        ),
    ],
)
def test_mistakes_in_an_admission_configuration(folder: Path, text: str, problem: str) -> None:
    (folder / "admission.conf").write_text(text)
    (found,) = problems(folder, ConfigFiles(admission=folder / "admission.conf"))
    assert found.startswith(problem)


def test_a_mistake_in_the_file_of_the_plugin_is_told_there(folder: Path) -> None:
    (folder / "wasm.conf").write_text("modules:\n- module: 1\n  name: [x]\n")
    (folder / "admission.conf").write_text(HEAD + "plugins: [{name: WASM, path: wasm.conf}]")
    found = problems(folder, ConfigFiles(admission=folder / "admission.conf"))
    assert [each.partition(": expected")[0] for each in found] == [
        "wasm.conf:2: modules[0].module",
        "wasm.conf:3: modules[0].name",
    ]


def test_a_file_that_is_not_there(folder: Path) -> None:
    assert problems(folder, ConfigFiles(authentication=folder / "none")) == [
        "none: cannot read the file: No such file or directory"
    ]


def test_files_that_lie_within_themselves_are_refused(folder: Path) -> None:
    (found,) = problems_of_authentication(folder, "modules: &a [*a]")
    assert "nested deeper than" in found


def problems_of_authentication(folder: Path, text: str) -> list[str]:
    (folder / "authn.conf").write_text(text)
    return problems(folder, ConfigFiles(authentication=folder / "authn.conf"))
