"""The configuration files of k8s-wasm, as parts of a bulkhead.yaml.

k8s-wasm reads them as Kubernetes does: unknown keys are ignored, keys may be written in any case, null is
as good as nothing, and text may be a number. What is ignored is noted, as it may be a mistake.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bulkhead.service.configmodel import RuleConfig
from bulkhead.service.document import Document
from bulkhead.service.modulesource import name_from
from bulkhead.service.objectyaml import read_object_file
from bulkhead.service.problems import ConfigError, Place, Places, Problem, problem_at
from bulkhead.service.scalars import MAX_NAME_LENGTH, require_name
from bulkhead.service.words import cut
from bulkhead.service.yamlfile import BadYaml, Location, YamlFile

PLUGIN = "WASM"
"""The admission plugin of k8s-wasm."""
_KIND = "AdmissionConfiguration"
_API_VERSIONS = ("apiserver.config.k8s.io/v1", "apiserver.k8s.io/v1alpha1")

_MODULE_KEYS = ("name", "module", "settings", "debug")
_ADMISSION_KEYS = (*_MODULE_KEYS, "mutating", "type", "rules")
_RULE_LISTS = ("operations", "apiGroups", "apiVersions", "resources")
_RULE_KEYS = (*_RULE_LISTS, "scope")
_OURS = ("limits", "failurePolicy", "digest")
_ANYTHING = {key: ["*"] for key in _RULE_LISTS}


def read_modules(section: str, path: Path) -> Document:
    """Reads the modules of authentication or authorization. Raises ConfigError."""
    file = _read(path)
    return _Translation(section, file, ()).document(files=(path,))


def read_admission(path: Path) -> Document:
    """Reads the WASM plugin of an AdmissionConfiguration, and the file that it names. Raises ConfigError."""
    file = _read(path)
    index, plugin, notes = _find_plugin(file)
    at: Location = ("plugins", index)
    files = [path]
    if plugin.get("configuration") is not None:
        if plugin.get("path"):
            place = Place(file, (*at, "path"))
            notes.append(problem_at(place, "ignored: there is a configuration beside it"))
        at = (*at, "configuration")
    elif isinstance(plugin.get("path"), str) and plugin["path"]:
        # As kube-apiserver does: relative to the folder of the AdmissionConfiguration.
        other = path.absolute().parent / plugin["path"]
        if not other.is_file():
            message = f"expected the path of a file, but there is no file {other}"
            raise ConfigError([problem_at(Place(file, (*at, "path")), message)])
        file, at = _read(other), ()
        files.append(other)
    else:
        raise ConfigError([problem_at(Place(file, at), "expected configuration or path, got neither")])
    return _Translation("admission", file, at, notes).document(files=tuple(files))


def _read(path: Path) -> YamlFile:
    try:
        file = read_object_file(path)
    except BadYaml as error:
        raise ConfigError([Problem("", error.line, str(error), str(path))]) from None
    if not isinstance(file.value, dict):
        got = "an empty file" if file.value is None else "something else"
        expected = f"expected a mapping with the key modules, got {got}"
        raise ConfigError([Problem("", None, expected, str(path))])
    return file


def _find_plugin(file: YamlFile) -> tuple[int, dict[str, Any], list[Problem]]:
    """The WASM plugin, its index, and notes of the others. Raises ConfigError."""
    value = file.value
    if value.get("kind") != _KIND or value.get("apiVersion") not in _API_VERSIONS:
        message = f"expected an {_KIND} of {_API_VERSIONS[0]}"
        if "modules" in value:
            message += f" with the plugin {PLUGIN}, and the modules in its configuration, got modules alone"
        else:
            got = f"{value.get('apiVersion') or 'no apiVersion'} {value.get('kind') or 'and no kind'}"
            message += f", got {cut(got, 120)}"
        raise ConfigError([problem_at(Place(file, ("kind",)), message)])
    plugins = value.get("plugins")
    plugins = plugins if isinstance(plugins, list) else []
    names = [each.get("name") if isinstance(each, dict) else None for each in plugins]
    if PLUGIN not in names:
        got = ", ".join(str(name) for name in names) or "none"
        message = f"expected a plugin with the name {PLUGIN}, got {cut(got, 120)}"
        raise ConfigError([problem_at(Place(file, ("plugins",)), message)])
    chosen = names.index(PLUGIN)
    notes = [
        problem_at(
            Place(file, ("plugins", index)),
            f"ignored: kube-apiserver takes the first plugin with the name {PLUGIN}"
            if name == PLUGIN
            else f"ignored: the plugin {name} is kube-apiserver's own",
        )
        for index, name in enumerate(names)
        if index != chosen
    ]
    return chosen, plugins[chosen], notes


class _Translation:
    """Turns a list of k8s-wasm's modules into a section of bulkhead.yaml. What is wrong stays as it is."""

    def __init__(self, section: str, file: YamlFile, at: Location, notes: Collection[Problem] = ()) -> None:
        """`at` is where in the file the mapping with the list is."""
        self._section = section
        self._file = file
        self._at = at
        self._notes = list(notes)
        self._places: dict[Location, Place] = {(section, "modules"): Place(file, (*at, "modules"))}
        self._folder = file.path.absolute().parent

    def document(self, files: tuple[Path, ...]) -> Document:
        """Raises ConfigError if there is no mapping."""
        value = self._file.value
        for step in self._at:
            value = value[step]
        if not isinstance(value, dict):
            message = "expected a mapping with the key modules, got something else"
            raise ConfigError([problem_at(Place(self._file, self._at), message)])
        modules = self._known(value, (), ("modules", "apiVersion", "kind")).get("modules", [])
        if not modules:
            self._note((), "has no modules")
        if isinstance(modules, list):
            modules = [self._module(index, module) for index, module in enumerate(modules)]
            self._name_all(modules)
        return Document(
            value={self._section: {"modules": modules}},
            folder=self._folder,
            places=Places(self._places),
            files=tuple(path.absolute() for path in files),
            notes=tuple(self._notes),
        )

    def _note(self, location: Location, message: str) -> None:
        self._notes.append(problem_at(Place(self._file, self._at + location), message))

    def _known(self, mapping: Mapping[Any, Any], at: Location, keys: Collection[str]) -> dict[str, Any]:
        """What stands behind known keys, without nulls."""
        by_lower = {key.lower(): key for key in keys}
        known: dict[str, Any] = {}
        for written, value in mapping.items():
            key = by_lower.get(str(written).lower())
            if key is None:
                hint = "it is for modules in bulkhead.yaml" if written in _OURS else f"use {', '.join(keys)}"
                self._note((*at, written), f"ignored: k8s-wasm knows no such key; {hint}")
            elif value is not None and (key not in known or written == key):
                known[key] = value
        return known

    # Modules

    def _module(self, index: int, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        at: Location = ("modules", index)
        admission = self._section == "admission"
        module = self._known(value, at, _ADMISSION_KEYS if admission else _MODULE_KEYS)
        for key in ("name", "module", "type"):
            if key in module:
                module[key] = _scalar_text(module[key])
        for key in ("name", "type"):
            if module.get(key) == "":
                del module[key]  # the default
        if isinstance(path := module.get("module"), str):
            module["module"] = self._path(path, (*at, "module"))
        if isinstance(rules := module.get("rules"), list):
            module["rules"] = list(self._rules(rules, (*at, "rules")))
        return module

    def _path(self, path: str, at: Location) -> str:
        """The file that k8s-wasm reads, relative to the working directory, or else the one beside ours."""
        if not path or "\0" in path:
            return path
        beside, here = self._folder / path, Path.cwd() / path
        if not here.exists():
            return str(beside)
        if beside.exists() and not beside.samefile(here):
            self._note(at, f"taken from the working directory, as k8s-wasm does: {here}, and not {beside}")
        return str(here)

    def _name_all(self, modules: list[Any]) -> None:
        """Names as they must be here, close to those that k8s-wasm uses; each of its own."""
        every = [(index, each) for index, each in enumerate(modules) if isinstance(each, dict)]
        wanted = {id(module): _name(module) for _, module in every}
        taken: set[str] = set()
        for index, module in every:
            name = wanted[id(module)]
            if name is None:
                continue  # told later
            theirs = module.get("name") or Path(module["module"]).name
            if name in taken:
                name = _another(name, taken | {each for each in wanted.values() if each is not None})
            taken.add(name)
            module["name"] = name
            if name != theirs:
                self._note(("modules", index, "name"), f"{cut(repr(theirs), 80)} has the name {name} here")

    # Rules

    def _rules(self, rules: list[Any], at: Location) -> Iterator[Any]:
        """The rules without what can match nothing: k8s-wasm has it, and never finds it."""
        kept = 0
        for index, value in enumerate(rules):
            rule = self._rule(value, (*at, index)) if isinstance(value, dict) else value
            if rule is None:
                continue
            # What follows one that is left out stands elsewhere in the file.
            self._places[(self._section, *at, kept)] = Place(self._file, (*self._at, *at, index))
            kept += 1
            yield rule

    def _rule(self, value: dict[Any, Any], at: Location) -> dict[str, Any] | None:
        """None if it matches nothing."""
        rule = self._known(value, at, _RULE_KEYS)
        scope = _scalar_text(rule.get("scope"))
        if isinstance(scope, str) and _refused("scope", scope):
            self._note((*at, "scope"), f"{cut(repr(scope), 80)} matches nothing: the rule is left out")
            return None
        for key in _RULE_LISTS:
            entries = rule.setdefault(key, [])
            if not isinstance(entries, list):
                continue  # told later
            rule[key] = list(self._entries(key, entries, (*at, key)))
            if not rule[key]:
                self._note((*at, key), f"has no {key} that could match: the rule is left out")
                return None
        return rule

    def _entries(self, key: str, entries: list[Any], at: Location) -> Iterator[Any]:
        for index, entry in enumerate(entries):
            text = "" if entry is None else _scalar_text(entry)
            if isinstance(text, str) and (why := _refused(key, [text])):
                self._note((*at, index), f"matches nothing: {why}")
            else:
                yield text


def _refused(key: str, value: Any) -> str:
    """Why this part of a rule cannot match; empty if it can."""
    try:
        RuleConfig.model_validate({**_ANYTHING, key: value})
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return ""


def _name(module: Mapping[str, Any]) -> str | None:
    name, path = module.get("name"), module.get("module")
    if name is None:
        return name_from(Path(path).name) if isinstance(path, str) else None
    if not isinstance(name, str):
        return None
    try:
        return require_name(name)
    except ValueError:
        return name_from(name)


def _another(name: str, taken: Collection[str]) -> str:
    number = 2
    while True:
        suffix = f"-{number}"
        candidate = name[: MAX_NAME_LENGTH - len(suffix)].rstrip("-.") + suffix
        if candidate not in taken:
            return candidate
        number += 1


def _scalar_text(value: object) -> object:
    """What Kubernetes takes a scalar for where it expects text; anything else as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value
