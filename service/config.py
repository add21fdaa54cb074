"""The configuration file `bulkhead.yaml`: what may be in it, and every mistake in it at once.

docs/configuration.md describes each key. The models are frozen, and refuse what they do not know.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    ValidationError,
    ValidationInfo,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from bulkhead.sandbox import InvalidRequest, Limits, SandboxOptions, parse_duration, parse_quantity
from bulkhead.service import rules
from bulkhead.service.words import cut
from bulkhead.service.yamlfile import BadYaml, Location, YamlFile, read_yaml

MAX_NAME_LENGTH = 63
MOST_MODULES = 1000  # of one section; each is compiled, and held in memory

# As Kubernetes names things (RFC 1123). Without `_`, which separates the name in audit annotations.
_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_HOST = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9.]*[A-Za-z0-9])?")
_RESOURCE = re.compile(r"(?:\*|[a-z0-9][-a-z0-9.]*)(?:/(?:\*|[a-z0-9][-a-z0-9.]*(?:/[-a-z0-9.]+)*))?")
_GROUP = re.compile(r"\*||[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?")
_VERSION = re.compile(r"\*|[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")
_OPERATIONS = ("CREATE", "UPDATE", "DELETE", "CONNECT", rules.ANY)

# Of webhook configurations; people will try them here.
_NOT_SUPPORTED = {
    "namespaceSelector": "put it into the webhook configuration of the cluster",
    "objectSelector": "put it into the webhook configuration of the cluster",
    "matchConditions": "put them into the webhook configuration of the cluster",
    "matchPolicy": "put it into the webhook configuration of the cluster",
    "sideEffects": "it belongs into the webhook configuration of the cluster",
    "timeoutSeconds": "write limits: {timeout: 2s}",
}


# Problems


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration."""

    where: str
    """Path of the key: `admission.modules[0].rules[0].operations`; empty for the file as a whole."""
    line: int | None
    message: str
    file: str = ""

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part)
        return ": ".join(part for part in (place, self.where, self.message) if part)


class ConfigError(Exception):
    """The configuration cannot be used. Says everything that is wrong with it, a line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


# Scalars


def _read_bytes(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("expected a quantity of bytes such as 65536, 64Mi or 1.5Gi")
    if isinstance(value, int) and value < 0:
        raise ValueError("expected a quantity of bytes such as 65536, 64Mi or 1.5Gi")
    try:
        return parse_quantity(str(value))
    except ValueError as error:
        raise ValueError(f"expected a quantity of bytes: {error}") from None


def _read_seconds(value: object) -> float:
    if not isinstance(value, str):
        raise ValueError("expected a duration with its unit, such as 500ms, 2s or 1m30s")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f"expected a duration: {error}") from None


Bytes = Annotated[int, BeforeValidator(_read_bytes)]
"""Bytes, written as a Kubernetes quantity."""
Seconds = Annotated[float, BeforeValidator(_read_seconds)]
"""Seconds, written as a Go duration."""
OptionalBytes = Annotated[int | None, BeforeValidator(_read_bytes)]
OptionalSeconds = Annotated[float | None, BeforeValidator(_read_seconds)]

_T = TypeVar("_T")
# YAML lists become tuples, so that nothing in a configuration can change.
Many = Annotated[tuple[_T, ...], Strict(False)]


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Port 0: any that is free."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads `127.0.0.1:8443`, `[::1]:8443` or `localhost:0`. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        if not colon or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
            raise ValueError(
                "expected HOST:PORT such as 127.0.0.1:8443 or [::1]:8443, with a port from 0 to 65535"
            )
        if bracketed != (":" in host):
            raise ValueError("expected an IPv6 address to stand in brackets, as in [::1]:8443, and no other")
        if not host:
            raise ValueError(f"expected a host before the port; for all addresses write 0.0.0.0:{port}")
        if bracketed:
            _require_ipv6(host)
        elif _HOST.fullmatch(host) is None:
            raise ValueError(f"expected a host name or an IP address, got {host!r}")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. A name other than `localhost` may be anything."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _require_ipv6(host: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError(f"expected an IPv6 address in the brackets, got {host!r}") from None


def _read_address(value: object) -> Address:
    if isinstance(value, Address):
        return value
    if not isinstance(value, str):
        raise ValueError("expected HOST:PORT such as 127.0.0.1:8443")
    return Address.parse(value)


def _require_loopback(address: Address) -> Address:
    if not address.is_loopback:
        raise ValueError(
            f"expected a loopback address such as 127.0.0.1:50051, got {str(address)!r}: "
            "this version has no TLS for gRPC, and does not listen in plain text elsewhere"
        )
    return address


def _read_path(value: object, info: ValidationInfo) -> Path:
    """A path is relative to the folder of the configuration file."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("expected the path of a file or folder")
    context: Mapping[str, Path] = info.context or {}
    return context.get("folder", Path.cwd()) / value


def _require_file(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"expected the path of a module, but there is no file {path}")
    if not path.is_file():
        raise ValueError(f"expected the path of a module, but {path} is not a file")
    return path


def _require_name(name: str) -> str:
    if _NAME.fullmatch(name) is None or len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"expected a name of at most {MAX_NAME_LENGTH} lower-case letters, digits, '-' and '.', "
            f"got {cut(name, 80)!r}"
        )
    return name


def _require_json(value: object) -> object:
    for path, problem in _not_json(value, ""):
        raise ValueError(f"expected settings that can be written as JSON; {path or 'the value'} is {problem}")
    return value


def _not_json(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, child in value.items():
            if isinstance(key, str):
                yield from _not_json(child, f"{path}.{key}".removeprefix("."))
            else:
                yield path, f"a mapping with the key {key!r}, which is not a string: put it in quotes"
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _not_json(child, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, "not a finite number"
    elif not isinstance(value, str | int | float | bool | None):
        yield path, f"a {type(value).__name__}: put it in quotes"


# Models


class _Model(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_default=False,
        arbitrary_types_allowed=True,
    )


class RunLimits(_Model):
    """Limits of one run; what is not set comes from the section `limits`, then from the defaults."""

    memory: OptionalBytes = None
    timeout: OptionalSeconds = None
    cpu: OptionalSeconds = None
    stdout: OptionalBytes = None
    stderr: OptionalBytes = None
    stack: OptionalBytes = None
    table_elements: int | None = None
    fuel: int | None = None

    def over(self, base: Limits) -> Limits:
        """`base` with what is set here. Raises InvalidRequest for a value that no run can have."""
        chosen = {field: getattr(self, name) for name, field in _LIMIT_FIELDS.items()}
        return replace(base, **{field: value for field, value in chosen.items() if value is not None})


_LIMIT_FIELDS = {
    "memory": "memory_bytes",
    "timeout": "wall_seconds",
    "cpu": "cpu_seconds",
    "stdout": "stdout_bytes",
    "stderr": "stderr_bytes",
    "stack": "stack_bytes",
    "table_elements": "table_elements",
    "fuel": "fuel",
}


class ServiceLimits(RunLimits):
    """The section `limits`: those of each run, and how many runs there are at once."""

    max_concurrent_runs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    max_queued_runs: Annotated[int, Field(ge=0, le=100_000)] | None = None


class FailurePolicy(StrEnum):
    """What a failure of a module becomes."""

    FAIL = "Fail"
    IGNORE = "Ignore"
    ERROR = "Error"


class ModuleConfig(_Model):
    """One module of a chain."""

    given_name: Annotated[str, AfterValidator(_require_name)] | None = Field(default=None, alias="name")
    module: Annotated[Path, BeforeValidator(_read_path), AfterValidator(_require_file)]
    settings: Annotated[Any, AfterValidator(_require_json)] = None
    debug: bool = False
    limits: RunLimits = RunLimits()

    @property
    def name(self) -> str:
        """The name that was given, or else the base name of the module's file."""
        return self.given_name or default_name(self.module)

    @property
    def has_settings(self) -> bool:
        """Whether there is a key `settings`, be it null."""
        return "settings" in self.model_fields_set


def default_name(path: Path) -> str:
    """A module's name when none is given: `My_policy.wasm` is `my-policy`."""
    name = _NOT_IN_NAMES.sub("-", path.name.removesuffix(".wasm").lower()).strip("-")
    return name[:MAX_NAME_LENGTH].rstrip("-") or "module"


def _read_operation(value: object) -> object:
    if isinstance(value, str) and value not in _OPERATIONS:
        raise ValueError(f"expected one of {', '.join(_OPERATIONS)}, got {cut(value, 40)!r}")
    return value


def _matching(pattern: re.Pattern[str], expected: str) -> AfterValidator:
    def check(value: str) -> str:
        if pattern.fullmatch(value) is None:
            raise ValueError(f"expected {expected}, got {cut(value, 80)!r}")
        return value

    return AfterValidator(check)


Operation = Annotated[str, BeforeValidator(_read_operation)]
Group = Annotated[str, _matching(_GROUP, 'an API group such as apps, "" for the core group, or "*"')]
Version = Annotated[str, _matching(_VERSION, 'an API version such as v1 (without its group), or "*"')]
Resource = Annotated[
    str, _matching(_RESOURCE, 'a resource in lower-case plural such as pods, pods/status, "pods/*" or "*"')
]


class RuleConfig(_Model):
    """One rule, as in Kubernetes' webhook configurations."""

    operations: Annotated[Many[Operation], Field(min_length=1)]
    api_groups: Annotated[Many[Group], Field(min_length=1)]
    api_versions: Annotated[Many[Version], Field(min_length=1)]
    resources: Annotated[Many[Resource], Field(min_length=1)]
    scope: Literal["Cluster", "Namespaced", "*"] = "*"

    def rule(self) -> rules.Rule:
        """The rule in the form that matches requests."""
        return rules.Rule(
            operations=frozenset(self.operations),
            groups=frozenset(self.api_groups),
            versions=frozenset(self.api_versions),
            resources=tuple(rules.split_resource(pattern) for pattern in self.resources),
            scope=self.scope,
        )


def _read_type(value: object) -> object:
    if value == "kubewarden":
        raise ValueError(
            "expected 'wasi': Kubewarden policies ('kubewarden') are not supported by this version"
        )
    return value


class AdmissionModuleConfig(ModuleConfig):
    """One module of the section `admission`."""

    mutating: bool = False
    type: Annotated[Literal["wasi"], BeforeValidator(_read_type)] = "wasi"
    rules: Many[RuleConfig] = ()
    failure_policy: Annotated[FailurePolicy, Strict(False)] = FailurePolicy.FAIL


class AuthenticationConfig(_Model):
    """The section `authentication`."""

    modules: Annotated[Many[ModuleConfig], Field(max_length=MOST_MODULES)] = ()
    audiences: Many[Annotated[str, Field(min_length=1)]] = (
        "https://kubernetes.default.svc",
        "https://kubernetes.default.svc.cluster.local",
    )
    """What a token is good for if its module does not say: the API server's own audiences."""


class AuthorizationConfig(_Model):
    """The section `authorization`."""

    modules: Annotated[Many[ModuleConfig], Field(max_length=MOST_MODULES)] = ()


class AdmissionConfig(_Model):
    """The section `admission`."""

    modules: Annotated[Many[AdmissionModuleConfig], Field(max_length=MOST_MODULES)] = ()


class HttpsConfig(_Model):
    """The webhook endpoint."""

    address: Annotated[Address, BeforeValidator(_read_address)] = Address("127.0.0.1", 8443)

    @property
    def host(self) -> str:
        return self.address.host

    @property
    def port(self) -> int:
        return self.address.port


class GrpcConfig(_Model):
    """The gRPC endpoint."""

    address: Annotated[Address, BeforeValidator(_read_address), AfterValidator(_require_loopback)] = Address(
        "127.0.0.1", 50051
    )

    @property
    def host(self) -> str:
        return self.address.host

    @property
    def port(self) -> int:
        return self.address.port


class ServerConfig(_Model):
    """The section `server`."""

    https: HttpsConfig = HttpsConfig()
    grpc: GrpcConfig = GrpcConfig()
    max_body_bytes: Annotated[Bytes, Field(ge=1 << 10, le=64 << 20)] = 8 << 20
    grace_seconds: Annotated[Seconds, Field(alias="gracePeriod", ge=0, le=3600)] = 25.0
    state_dir: Annotated[Path, BeforeValidator(_read_path)] | None = None
    wasmtime: Annotated[Path, BeforeValidator(_read_path)] | None = None


class Config(_Model):
    """A whole configuration."""

    server: ServerConfig = ServerConfig()
    limits: ServiceLimits = ServiceLimits()
    authentication: AuthenticationConfig = AuthenticationConfig()
    authorization: AuthorizationConfig = AuthorizationConfig()
    admission: AdmissionConfig = AdmissionConfig()

    _source: YamlFile | None = PrivateAttr(default=None)

    def limits_of(self, module: ModuleConfig) -> Limits:
        """What a run of this module may use."""
        return module.limits.over(self.limits.over(Limits()))

    def sections(self) -> tuple[tuple[str, tuple[ModuleConfig, ...]], ...]:
        """The modules of each section, by its name in the file."""
        return (
            ("authentication", self.authentication.modules),
            ("authorization", self.authorization.modules),
            ("admission", self.admission.modules),
        )

    def sandbox_options(self, state_dir: Path) -> SandboxOptions:
        """The sandbox that this configuration asks for.

        What the file grants to a module is also granted to callers of the gRPC API: the maximum of
        each limit is the built-in one, or the largest in the file.
        """
        options = SandboxOptions(
            state_dir=state_dir, wasmtime=self.server.wasmtime, limits=self.limits.over(Limits())
        )
        asked = [options.limits, *(self.limits_of(m) for _, modules in self.sections() for m in modules)]
        changes: dict[str, Any] = {"maximum_limits": _largest([options.maximum_limits, *asked])}
        if self.limits.max_concurrent_runs is not None:
            changes["max_concurrent_runs"] = self.limits.max_concurrent_runs
        if self.limits.max_queued_runs is not None:
            changes["max_queued_runs"] = self.limits.max_queued_runs
        return replace(options, **changes)

    def problem(self, location: Location, message: str) -> Problem:
        """A mistake that shows only when the configuration is put to use."""
        return _problem(self._source, location, message)


def _largest(every: Sequence[Limits]) -> Limits:
    """The largest value of each limit. Fuel stays unlimited: CPU time bounds it anyway."""
    return Limits(
        **{
            field.name: max(getattr(limits, field.name) for limits in every)
            for field in fields(Limits)
            if field.name != "fuel"
        }
    )


# Loading


def load_config(path: Path) -> Config:
    """Reads and checks a configuration file. Raises ConfigError with all its problems."""
    try:
        source = read_yaml(path)
    except BadYaml as error:
        raise ConfigError([Problem("", error.line, str(error), str(path))]) from None
    if not isinstance(source.value, dict):
        got = "an empty file" if source.value is None else _shown_input(source.value)
        expected = f"expected a mapping with the sections {', '.join(_keys_of(Config))}, got {got}"
        raise ConfigError([Problem("", None, expected, str(path))])
    return _check(source)


def _check(source: YamlFile) -> Config:
    problems: list[Problem] = []
    config: Config | None = None
    try:
        config = Config.model_validate(source.value, context={"folder": source.path.absolute().parent})
        config._source = source
    except ValidationError as error:
        problems = [
            _problem(source, detail["loc"], _explain(detail)) for detail in _first_causes(error.errors())
        ]
    problems += _repeated_names(source)
    problems += _impossible_limits(source)
    if problems or config is None:
        raise ConfigError(sorted(problems, key=lambda problem: problem.line or 0))
    return config


def _problem(source: YamlFile | None, location: Location, message: str) -> Problem:
    if source is None:
        return Problem(_path(location), None, message)
    return Problem(_path(location), source.line_of(location), message, str(source.path))


def _path(location: Location) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(
        "."
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
            name = default_name(Path(path))
        if not isinstance(name, str):
            continue
        first = seen.setdefault((location[0], name), location)
        if first is not location:
            message = f"expected a name of its own, got {name!r}, which {_path(first)} has; set name"
            problems.append(_problem(source, (*location, "name"), message))
    return problems


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
                problems.append(_problem(source, (*place, key), message))
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
