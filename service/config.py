"""The configuration file `bulkhead.yaml`: read, checked, and every mistake in it told at once."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bulkhead.sandbox import InvalidRequest, Limits
from bulkhead.service.configmodel import (
    AdmissionModuleConfig,
    Config,
    FailurePolicy,
    GrpcConfig,
    HttpsConfig,
    ModuleConfig,
    RuleConfig,
    RunLimits,
    TlsConfig,
)
from bulkhead.service.modulesource import FileSource, default_name, parse_source
from bulkhead.service.problems import ConfigError, Problem, key_path, problem_at
from bulkhead.service.scalars import Address
from bulkhead.service.words import cut
from bulkhead.service.yamlfile import BadYaml, Location, YamlFile, read_yaml

__all__ = [
    "Address",
    "AdmissionModuleConfig",
    "Config",
    "ConfigError",
    "FailurePolicy",
    "GrpcConfig",
    "HttpsConfig",
    "ModuleConfig",
    "Problem",
    "RuleConfig",
    "TlsConfig",
    "exposed",
    "load_config",
]

# Of webhook configurations; people will try them here.
_NOT_SUPPORTED = {
    "namespaceSelector": "put it into the webhook configuration of the cluster",
    "objectSelector": "put it into the webhook configuration of the cluster",
    "matchConditions": "put them into the webhook configuration of the cluster",
    "matchPolicy": "put it into the webhook configuration of the cluster",
    "sideEffects": "it belongs into the webhook configuration of the cluster",
    "timeoutSeconds": "write limits: {timeout: 2s}",
}


def load_config(path: Path, *, insecure: bool = False) -> Config:
    """Reads and checks a configuration file. Raises ConfigError with all its problems.

    `insecure` allows addresses that other machines can reach without TLS.
    """
    try:
        source = read_yaml(path)
    except BadYaml as error:
        raise ConfigError([Problem("", error.line, str(error), str(path))]) from None
    if not isinstance(source.value, dict):
        got = "an empty file" if source.value is None else _shown_input(source.value)
        expected = f"expected a mapping with the sections {', '.join(_keys_of(Config))}, got {got}"
        raise ConfigError([Problem("", None, expected, str(path))])
    return _check(source, insecure=insecure)


def _check(source: YamlFile, *, insecure: bool) -> Config:
    problems: list[Problem] = []
    config: Config | None = None
    try:
        config = Config.model_validate(source.value, context={"folder": source.path.absolute().parent})
        config._source = source
        config._files = (source.path.absolute(),)
        if not insecure:
            problems = [config.problem(location, message) for location, message in _exposed(config)]
    except ValidationError as error:
        problems = [
            problem_at(source, detail["loc"], _explain(detail)) for detail in _first_causes(error.errors())
        ]
    problems += _repeated_names(source)
    problems += _impossible_limits(source)
    if problems:  # otherwise the modules are loaded next, and what is wrong with each is told then
        problems += _missing_modules(source)
    if problems or config is None:
        raise ConfigError(sorted(problems, key=lambda problem: problem.line or 0))
    return config


def _exposed(config: Config) -> Iterator[tuple[Location, str]]:
    """Front ends that would speak plain text to other machines."""
    server = config.server
    if server.https.plaintext and not server.https.address.is_loopback:
        yield ("server", "https", "plaintext"), exposed(server.https.address)
    if server.grpc.plaintext and not server.grpc.address.is_loopback:
        yield ("server", "grpc", "address"), exposed(server.grpc.address)


def exposed(address: Address) -> str:
    """What is said of an address that would be served without TLS."""
    return (
        "expected a certificate and a key, or a loopback address such as 127.0.0.1:50051: "
        f"without TLS others could read and change what is said (serve --insecure allows it), got {address}"
    )


def _first_causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without lists that are found too short only because an entry of theirs was refused."""
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(_is_inside(other["loc"], detail["loc"]) for other in details)
    ]


def _is_inside(location: Location, outer: Location) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _at(value: Any, location: Location) -> Any:
    for step in location:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _modules_in(source: YamlFile) -> Iterator[tuple[Location, dict[str, Any]]]:
    """The modules that are in the file, whatever else is wrong with it."""
    for section in ("authentication", "authorization", "admission"):
        modules = _at(source.value, (section, "modules"))
        for index, module in enumerate(modules if isinstance(modules, list) else ()):
            if isinstance(module, dict):
                yield (section, "modules", index), module


def _repeated_names(source: YamlFile) -> list[Problem]:
    problems = []
    seen: dict[tuple[str | int, str], Location] = {}
    for location, module in _modules_in(source):
        name, path = module.get("name"), module.get("module")
        if name is None and isinstance(path, str):
            name = _default_name(path)
        if not isinstance(name, str):
            continue
        first = seen.setdefault((location[0], name), location)
        if first is not location:
            message = f"expected a name of its own, got {name!r}, which {key_path(first)} has; set name"
            problems.append(problem_at(source, (*location, "name"), message))
    return problems


def _missing_modules(source: YamlFile) -> list[Problem]:
    problems = []
    for location, module in _modules_in(source):
        try:
            parsed = parse_source(str(module.get("module", "")), source.path.absolute().parent)
        except ValueError:
            continue  # told already
        if isinstance(parsed, FileSource) and not parsed.path.exists():
            message = f"expected the path of a module, but there is no file {parsed.path}"
            problems.append(problem_at(source, (*location, "module"), message))
    return problems


def _default_name(source: str) -> str | None:
    try:
        return default_name(parse_source(source, Path()))
    except ValueError:
        return None  # told already


def _impossible_limits(source: YamlFile) -> list[Problem]:
    """Limits that can be read but that no run can have, each by itself."""
    problems = []
    places: list[Location] = [("limits",), *((*location, "limits") for location, _ in _modules_in(source))]
    for place in places:
        section = _at(source.value, place)
        for key, value in section.items() if isinstance(section, dict) else ():
            try:
                RunLimits.model_validate({key: value}).over(Limits())
            except InvalidRequest as error:
                bounds = str(error).partition("; it must be ")[2]
                message = f"expected a value {bounds}, got {_shown_input(value)}"
                problems.append(problem_at(source, (*place, key), message))
            except ValidationError:
                continue  # told already
    return problems


# Explaining


def _explain(detail: ErrorDetails) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _explain_unknown_key(detail["loc"])
    if kind == "missing":
        return "expected a value, got nothing: this key is required"
    if kind == "value_error":
        text = str(context["error"])
        return text if "got " in text or "there is no" in text else f"{text}, got {_shown_input(value)}"
    if kind == "invalid_key":
        return f"expected a key that is a string, got {detail['loc'][-1]}"
    if kind == "too_short":
        return "expected at least one entry, got an empty list"
    return f"expected {_expected(kind, context)}, got {_shown_input(value)}"


def _expected(kind: str, context: Mapping[str, Any]) -> str:
    simple = {
        "string_type": "a string",
        "bool_type": "true or false",
        "int_type": "an integer",
        "float_type": "a number",
        "tuple_type": "a list",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "string_too_short": "a string that is not empty",
    }
    if kind in simple:
        return simple[kind]
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "greater_than_equal":
        return f"at least {context['ge']}"
    if kind == "less_than_equal":
        return f"at most {context['le']}"
    if kind == "too_long":
        return f"at most {context['max_length']} entries"
    return f"another value ({kind})"


def _explain_unknown_key(location: tuple[int | str, ...]) -> str:
    *parents, key = location
    known = _keys_of(_model_at(tuple(parents)))
    text = f"expected one of the keys {', '.join(known)}, got an unknown one"
    if str(key) in _NOT_SUPPORTED:
        return f"not supported here: {_NOT_SUPPORTED[str(key)]}"
    close = difflib.get_close_matches(str(key).lower(), [name.lower() for name in known], n=1)
    if not close:
        return text
    return f"{text}; did you mean {next(name for name in known if name.lower() == close[0])}?"


def _keys_of(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(location: Location) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for step in location:
        for name, field in model.model_fields.items():
            if step in (name, field.alias):
                model = _model_in(field.annotation) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for each in typing.get_args(annotation) if (found := _model_in(each))), None)


def _shown_input(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return cut(repr(value) if isinstance(value, str) else str(value), 80)
