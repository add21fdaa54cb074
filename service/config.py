"""The configuration file `bulkhead.yaml`: read, checked, and every mistake in it told at once."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
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
from bulkhead.service.document import Document
from bulkhead.service.modulesource import FileSource, default_name, parse_source
from bulkhead.service.problems import ConfigError, Place, Places, Problem, key_path
from bulkhead.service.scalars import Address
from bulkhead.service.words import cut
from bulkhead.service.yamlfile import BadYaml, Location, read_yaml

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
    "check_documents",
    "exposed",
    "load_config",
    "read_document",
]

_SECTIONS = ("authentication", "authorization", "admission")

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
    """Reads and checks a bulkhead.yaml alone. Raises ConfigError with all its problems.

    `insecure` allows addresses that other machines can reach without TLS.
    """
    return check_documents([read_document(path)], insecure=insecure)


def read_document(path: Path) -> Document:
    """Reads a bulkhead.yaml, and does not check it. Raises ConfigError."""
    try:
        source = read_yaml(path)
    except BadYaml as error:
        raise ConfigError([Problem("", error.line, str(error), str(path))]) from None
    if not isinstance(source.value, dict):
        got = "an empty file" if source.value is None else _shown_input(source.value)
        expected = f"expected a mapping with the sections {', '.join(_keys_of(Config))}, got {got}"
        raise ConfigError([Problem("", None, expected, str(path))])
    return Document(
        value=source.value,
        folder=path.absolute().parent,
        places=Places({(): Place(source)}),
        files=(path.absolute(),),
    )


def check_documents(
    documents: Sequence[Document], *, insecure: bool = False, known: Sequence[Problem] = ()
) -> Config:
    """One configuration of several documents: what the first says, with the modules of the others.

    Raises ConfigError with the problems of all, after those that are `known`.
    """
    problems, configs = list(known), []
    for document in documents:
        config, found = _check(document, insecure=insecure)
        problems += found
        configs.append(config)
    problems += _given_twice(documents)
    if problems:  # otherwise the modules are loaded next, and what is wrong with each is told then
        for document in documents:
            problems += _missing_modules(document)
        raise ConfigError(_in_order(problems))
    return _merge(documents, configs)


def _check(document: Document, *, insecure: bool) -> tuple[Config, list[Problem]]:
    """The configuration has nothing in it if there are problems."""
    problems: list[Problem] = []
    config = Config()
    try:
        config = Config.model_validate(document.value, context={"folder": document.folder})
        if not insecure:
            problems = [document.problem(location, message) for location, message in _exposed(config)]
    except ValidationError as error:
        problems = [
            document.problem(detail["loc"], _explain(detail)) for detail in _first_causes(error.errors())
        ]
    problems += _repeated_names(document)
    problems += _impossible_limits(document)
    return config, problems


def _given_twice(documents: Sequence[Document]) -> Iterator[Problem]:
    for section in _SECTIONS:
        holders = [each for each in documents if any(_modules_of(each, section))]
        for other in holders[1:]:
            where = ", ".join(map(str, other.files))
            message = f"expected modules here or in {where}, got both: remove those of one"
            yield holders[0].problem((section, "modules"), message)


def _in_order(problems: list[Problem]) -> list[Problem]:
    """File by file, each from top to bottom."""
    files = list(dict.fromkeys(problem.file for problem in problems))
    return sorted(problems, key=lambda problem: (files.index(problem.file), problem.line or 0))


def _merge(documents: Sequence[Document], configs: Sequence[Config]) -> Config:
    merged, places = configs[0], documents[0].places
    for document, config in zip(documents[1:], configs[1:], strict=True):
        for section in _SECTIONS:
            if modules := getattr(config, section).modules:
                part = getattr(merged, section).model_copy(update={"modules": modules})
                merged = merged.model_copy(update={section: part})
                places |= document.places
    merged._places = places
    merged._files = tuple(file for document in documents for file in document.files)
    merged._notes = tuple(_in_order([note for document in documents for note in document.notes]))
    return merged


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


def _modules_in(document: Document) -> Iterator[tuple[Location, dict[str, Any]]]:
    """The modules that are in the document, whatever else is wrong with it."""
    for section in _SECTIONS:
        yield from _modules_of(document, section)


def _modules_of(document: Document, section: str) -> Iterator[tuple[Location, dict[str, Any]]]:
    modules = _at(document.value, (section, "modules"))
    for index, module in enumerate(modules if isinstance(modules, list) else ()):
        if isinstance(module, dict):
            yield (section, "modules", index), module


def _repeated_names(document: Document) -> list[Problem]:
    problems = []
    seen: dict[tuple[str | int, str], Location] = {}
    for location, module in _modules_in(document):
        name, path = module.get("name"), module.get("module")
        if name is None and isinstance(path, str):
            name = _default_name(path)
        if not isinstance(name, str):
            continue
        first = seen.setdefault((location[0], name), location)
        if first is not location:
            message = f"expected a name of its own, got {name!r}, which {key_path(first)} has; set name"
            problems.append(document.problem((*location, "name"), message))
    return problems


def _missing_modules(document: Document) -> list[Problem]:
    problems = []
    for location, module in _modules_in(document):
        try:
            parsed = parse_source(str(module.get("module", "")), document.folder)
        except ValueError:
            continue  # told already
        if isinstance(parsed, FileSource) and not parsed.path.exists():
            message = f"expected the path of a module, but there is no file {parsed.path}"
            problems.append(document.problem((*location, "module"), message))
    return problems


def _default_name(source: str) -> str | None:
    try:
        return default_name(parse_source(source, Path()))
    except ValueError:
        return None  # told already


def _impossible_limits(document: Document) -> list[Problem]:
    """Limits that can be read but that no run can have, each by itself."""
    problems = []
    places: list[Location] = [("limits",), *((*location, "limits") for location, _ in _modules_in(document))]
    for place in places:
        section = _at(document.value, place)
        for key, value in section.items() if isinstance(section, dict) else ():
            try:
                RunLimits.model_validate({key: value}).over(Limits())
            except InvalidRequest as error:
                bounds = str(error).partition("; it must be ")[2]
                message = f"expected a value {bounds}, got {_shown_input(value)}"
                problems.append(document.problem((*place, key), message))
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
