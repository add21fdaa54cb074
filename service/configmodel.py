"""What may be in a configuration. docs/configuration.md describes each key.

The models are frozen, and refuse what they do not know.
"""

from __future__ import annotations

import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    ValidationInfo,
    model_validator,
)
from pydantic.alias_generators import to_camel

from bulkhead.sandbox import LAYER_NAMES, Limits, SandboxOptions, largest, parse_layers
from bulkhead.service import rules
from bulkhead.service.modulesource import (
    DIGEST,
    HttpsSource,
    ModuleSource,
    default_name,
    parse_source,
)
from bulkhead.service.problems import Places, Problem
from bulkhead.service.scalars import (
    Address,
    Bytes,
    ExistingFile,
    Json,
    Many,
    Name,
    OneAddress,
    OptionalBytes,
    OptionalPath,
    OptionalSeconds,
    Seconds,
    folder_of,
)
from bulkhead.service.words import cut
from bulkhead.service.yamlfile import Location

MOST_WORKERS = 64
MOST_MODULES = 1000  # of one section; each is compiled, and held in memory

_RESOURCE = re.compile(r"(?:\*|[a-z0-9][-a-z0-9.]*)(?:/(?:\*|[a-z0-9][-a-z0-9.]*(?:/[-a-z0-9.]+)*))?")
_GROUP = re.compile(r"\*||[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?")
_VERSION = re.compile(r"\*|[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")
_OPERATIONS = ("CREATE", "UPDATE", "DELETE", "CONNECT", rules.ANY)


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


def _read_source(value: object, info: ValidationInfo) -> ModuleSource:
    if not isinstance(value, str):
        raise ValueError("expected the path of a module, sha256:…, https://… or oci://…")
    return parse_source(value, folder_of(info))


def _require_digest(value: str) -> str:
    if DIGEST.fullmatch(value) is None:
        raise ValueError("expected sha256: and 64 hexadecimal digits in lower case")
    return value


class ModuleConfig(_Model):
    """One module of a chain."""

    given_name: Name | None = Field(default=None, alias="name")
    source: Annotated[ModuleSource, BeforeValidator(_read_source)] = Field(alias="module")
    digest: Annotated[str, AfterValidator(_require_digest)] | None = None
    """What the module's bytes must have; required where they come by HTTPS."""
    settings: Json = None
    debug: bool = False
    limits: RunLimits = RunLimits()

    @model_validator(mode="after")
    def _require_pin(self) -> Self:
        if isinstance(self.source, HttpsSource) and self.digest is None:
            raise ValueError(
                "expected the key digest (sha256:…) beside a module that comes by https, got none"
            )
        return self

    @property
    def name(self) -> str:
        """The name that was given, or else the base name of the module's source."""
        return self.given_name or default_name(self.source)

    @property
    def has_settings(self) -> bool:
        """Whether there is a key `settings`, be it null."""
        return "settings" in self.model_fields_set


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


class TlsConfig(_Model):
    """Certificates of a front end, as PEM files."""

    certificate: ExistingFile | None = None
    """With its chain."""
    key: ExistingFile | None = None
    client_ca: ExistingFile | None = Field(default=None, alias="clientCA")
    """Clients must have a certificate of one of these authorities."""
    allowed_names: Many[Annotated[str, Field(min_length=1)]] = ()
    """Common names or subject alternative names of clients; none: any that has a certificate."""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("expected certificate and key together, got one without the other")
        if self.allowed_names and self.client_ca is None:
            raise ValueError("expected clientCA beside allowedNames: else clients have no names, got none")
        return self


class HttpsConfig(TlsConfig):
    """The webhook endpoint. Without a certificate it makes one."""

    address: OneAddress = Address("127.0.0.1", 8443)
    plaintext: bool = False
    """No TLS at all."""

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.plaintext and (self.certificate or self.client_ca):
            raise ValueError("expected plaintext or a certificate, got both")
        return self


class GrpcConfig(TlsConfig):
    """The gRPC endpoint. Without a certificate it speaks plain text."""

    address: OneAddress = Address("127.0.0.1", 50051)
    admin_names: Many[Annotated[str, Field(min_length=1)]] = ()
    """Those of `allowed_names` that may put and delete modules, and any other name here as well."""

    @model_validator(mode="after")
    def _have_identities(self) -> Self:
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("expected certificate and key beside clientCA, got none")
        if self.admin_names and self.client_ca is None:
            raise ValueError("expected clientCA beside adminNames: else clients have no names, got none")
        return self

    @property
    def plaintext(self) -> bool:
        return self.certificate is None


def _read_workers(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= MOST_WORKERS):
        return value
    raise ValueError(f"expected auto, or an integer from 1 to {MOST_WORKERS}")


class ServerConfig(_Model):
    """The section `server`."""

    https: HttpsConfig = HttpsConfig()
    grpc: GrpcConfig = GrpcConfig()
    max_body_bytes: Annotated[Bytes, Field(ge=1 << 10, le=64 << 20)] = 8 << 20
    grace_seconds: Annotated[Seconds, Field(alias="gracePeriod", ge=0, le=3600)] = 25.0
    workers: Annotated[int | Literal["auto"], BeforeValidator(_read_workers)] = "auto"
    """Processes that answer over HTTPS."""
    state_dir: OptionalPath = None
    wasmtime: OptionalPath = None


def _read_layer(value: object) -> object:
    if isinstance(value, str) and value not in LAYER_NAMES:
        raise ValueError(f"expected one of {', '.join(LAYER_NAMES)}, got {cut(value, 40)!r}")
    return value


class IsolationConfig(_Model):
    """The section `isolation`: the walls around a run."""

    require: Many[Annotated[str, BeforeValidator(_read_layer)]] = ()
    """Layers without which Bulkhead refuses to start; all that work are used anyway."""
    zygotes: bool = True
    """Fork runs from a wasmtime that has loaded the module; else each run starts wasmtime anew."""


class Config(_Model):
    """A whole configuration."""

    server: ServerConfig = ServerConfig()
    limits: ServiceLimits = ServiceLimits()
    isolation: IsolationConfig = IsolationConfig()
    authentication: AuthenticationConfig = AuthenticationConfig()
    authorization: AuthorizationConfig = AuthorizationConfig()
    admission: AdmissionConfig = AdmissionConfig()

    _places: Places = PrivateAttr(default_factory=Places)
    _files: tuple[Path, ...] = PrivateAttr(default=())
    _notes: tuple[Problem, ...] = PrivateAttr(default=())

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
            state_dir=state_dir,
            wasmtime=self.server.wasmtime,
            limits=self.limits.over(Limits()),
            zygotes=self.isolation.zygotes,
            require=parse_layers(self.isolation.require),
        )
        asked = [options.limits, *(self.limits_of(m) for _, modules in self.sections() for m in modules)]
        changes: dict[str, Any] = {"maximum_limits": largest([options.maximum_limits, *asked])}
        if self.limits.max_concurrent_runs is not None:
            changes["max_concurrent_runs"] = self.limits.max_concurrent_runs
        if self.limits.max_queued_runs is not None:
            changes["max_queued_runs"] = self.limits.max_queued_runs
        return replace(options, **changes)

    def without_sources(self) -> Config:
        """A copy that does not know where its values stand, to be handed to another process."""
        copy = self.model_copy()
        copy._places = Places()
        return copy

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it was read from."""
        return self._files

    def problem(self, location: Location, message: str) -> Problem:
        """A mistake that shows only when the configuration is put to use."""
        return self._places.problem(location, message)

    def file_of(self, location: Location) -> Path | None:
        """The file in which a value stands."""
        place = self._places.find(location)
        return None if place is None else place.file.path

    @property
    def notes(self) -> tuple[Problem, ...]:
        """What is no mistake in its files, but should be known: what is ignored, or has another name here."""
        return self._notes
