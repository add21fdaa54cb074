"""`bulkhead manifests`: what a cluster needs to use a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import click

from bulkhead.sandbox import SandboxError
from bulkhead.service.cli import EXIT_FAILED, EXIT_USAGE
from bulkhead.service.config import Config, ConfigError
from bulkhead.service.configfiles import ConfigFiles
from bulkhead.service.manifest_admission import (
    AdmissionOptions,
    ClusterPolicy,
    admission_notes,
    webhook_configurations,
)
from bulkhead.service.manifest_apiserver import (
    AUTHORIZERS,
    BULKHEAD,
    CLIENT_CERTIFICATE,
    CLIENT_KEY,
    ApiServerOptions,
    apiserver_documents,
)
from bulkhead.service.manifest_endpoint import ServiceEndpoint, UrlEndpoint
from bulkhead.service.manifest_folder import ManifestFile, write_files
from bulkhead.service.manifest_instructions import instructions
from bulkhead.service.manifest_trust import (
    Certificates,
    ManifestError,
    client_notes,
    find_authorities,
    read_client,
    server_notes,
    to_pem,
)
from bulkhead.service.manifest_yaml import Document, to_yaml
from bulkhead.service.scalars import require_name
from bulkhead.service.state import state_dir as find_state_dir
from bulkhead.service.tls import TlsError

CLUSTER_FOLDER, APISERVER_FOLDER = "cluster", "apiserver"

_T = TypeVar("_T")
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")  # how namespaces are named
_FOLDER = re.compile(r"(?:/[-A-Za-z0-9._+@=]+)+/?")

_FILE_OF_KIND = {
    "MutatingWebhookConfiguration": "mutating.yaml",
    "ValidatingWebhookConfiguration": "validating.yaml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestOptions:
    """What the command line says, as it says it."""

    url: str | None = None
    service: str | None = None
    ca: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    embed_client_certificate: bool = False
    name: str = "bulkhead"
    apiserver_dir: str = "/etc/kubernetes/bulkhead"
    namespace: str | None = None
    excluded_namespaces: tuple[str, ...] = ()
    default_exclusions: bool = True
    combined: bool = False
    error_policy: ClusterPolicy = "Fail"
    reinvocation_policy: Literal["IfNeeded", "Never"] = "IfNeeded"
    authorizer_order: str = f"Node,RBAC,{BULKHEAD}"
    authorization_failure_policy: Literal["Deny", "NoOpinion"] = "Deny"


@dataclass(frozen=True, slots=True)
class Manifests:
    """All that was made, and what is good to know of it."""

    cluster: tuple[Document, ...]
    """Objects to be applied to the cluster."""
    files: tuple[ManifestFile, ...]
    """All files, those with the objects too."""
    instructions: str
    notes: tuple[str, ...]


def manifests(files: ConfigFiles, output: str, force: bool, state_dir: Path | None, **chosen: object) -> int:
    """Writes the files and says what to do with them, or prints the cluster's objects; the exit code."""
    try:
        config = files.load(insecure=True)  # where it may listen is decided when it serves
        options = ManifestOptions(**chosen)  # type: ignore[arg-type]  # click has checked them
        made = make_manifests(config, options, find_state_dir(state_dir or config.server.state_dir))
        for note in made.notes:
            click.echo(f"note: {note}", err=True)
        if output == "-":
            click.echo("".join(f"---\n{to_yaml(each)}" for each in made.cluster), nl=False)
            return 0
        stale = write_files(Path(output), made.files, force=force)
    except ConfigError as error:
        click.echo(str(error), err=True)
        click.echo("bulkhead: the configuration cannot be used; see above", err=True)
        return EXIT_USAGE
    except (ManifestError, TlsError) as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_USAGE
    except SandboxError as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_FAILED
    for path in stale:
        click.echo(
            f"note: {path} is of an earlier run, and not used any more: delete it, and what was made of it "
            "in the cluster",
            err=True,
        )
    click.echo(f"Written to {output}:")
    for file in made.files:
        click.echo(f"  {file.path}")
    click.echo(f"\n{made.instructions}", nl=False)
    return 0


def make_manifests(config: Config, options: ManifestOptions, state_dir: Path) -> Manifests:
    """Makes them; writes nothing, but for the certificate that Bulkhead would make at its start.

    Raises ManifestError, TlsError, SandboxError.
    """
    checked = _Checked.of(config, options)
    authorities = find_authorities(config, options.ca, state_dir)
    client = None
    if options.client_certificate is not None and options.client_key is not None:
        client = read_client(options.client_certificate, options.client_key)
    notes = [
        *server_notes(config, authorities, checked.hosts, state_dir),
        *client_notes(config, client),
    ]
    cluster: list[Document] = []
    if config.admission.modules:
        admission = _admission_options(options, checked, authorities)
        cluster = webhook_configurations(config, admission)
        notes += admission_notes(config, admission)
    api_server = ApiServerOptions(
        name=options.name,
        url=checked.url,
        admission=(checked.service or checked.url) if cluster else None,
        authorities=to_pem(authorities),
        client=client,
        embed_client=options.embed_client_certificate,
        folder=checked.folder,
        authorizer_order=checked.authorizers,
        authorization_failure_policy=options.authorization_failure_policy,
    )
    documents = apiserver_documents(config, api_server)
    text = instructions(tuple(documents), api_server, has_webhooks=bool(cluster))
    files = (
        ManifestFile("README.txt", text),
        *(ManifestFile(f"{CLUSTER_FOLDER}/{_FILE_OF_KIND[each['kind']]}", to_yaml(each)) for each in cluster),
        *_apiserver_files(documents, api_server),
    )
    return Manifests(tuple(cluster), files, text, tuple(notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """What the command line says, understood."""

    url: UrlEndpoint | None
    service: ServiceEndpoint | None
    folder: PurePosixPath
    authorizers: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, options: ManifestOptions) -> _Checked:
        """Raises ManifestError for what cannot be used, or not with this configuration."""
        checked = cls(
            url=None if options.url is None else _read("--url", UrlEndpoint.parse, options.url),
            service=None
            if options.service is None
            else _read("--service", ServiceEndpoint.parse, options.service),
            folder=_read_folder(options.apiserver_dir),
            authorizers=_read_order(options.authorizer_order),
        )
        _require_names(options)
        if (options.client_certificate is None) != (options.client_key is None):
            raise ManifestError("--client-certificate and --client-key belong together: give both")
        if options.embed_client_certificate and options.client_certificate is None:
            raise ManifestError("--embed-client-certificate needs --client-certificate and --client-key")
        checked._require_endpoint(config)
        return checked

    def _require_endpoint(self, config: Config) -> None:
        if self.url is None and self.service is None:
            raise ManifestError("say where kube-apiserver finds Bulkhead: give --url or --service")
        if not any(modules for _, modules in config.sections()):
            raise ManifestError(
                "the configuration has no modules, so there is nothing that a cluster could ask"
            )
        asked_by_url = config.authentication.modules or config.authorization.modules
        if self.url is None and asked_by_url:
            raise ManifestError(
                "kube-apiserver asks for authentication and authorization at a URL, and its host does not "
                "know the names of Services: give --url as well"
            )

    @property
    def hosts(self) -> list[str]:
        """What the server's certificate must be for."""
        return [each.host for each in (self.url, self.service) if each is not None]


def _admission_options(
    options: ManifestOptions, checked: _Checked, authorities: Certificates
) -> AdmissionOptions:
    endpoint = checked.service or checked.url
    assert endpoint is not None
    own = options.namespace or (checked.service.namespace if checked.service else "bulkhead")
    default = ("kube-system", own) if options.default_exclusions else ()
    return AdmissionOptions(
        name=options.name,
        endpoint=endpoint,
        authorities=to_pem(authorities),
        excluded_namespaces=tuple(dict.fromkeys((*default, *options.excluded_namespaces))),
        error_policy=options.error_policy,
        reinvocation_policy=options.reinvocation_policy,
        combined=options.combined,
    )


def _read(option: str, parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise ManifestError(f"{option}: {error}") from None


def _read_folder(text: str) -> PurePosixPath:
    if _FOLDER.fullmatch(text) is None or ".." in PurePosixPath(text).parts:
        raise ManifestError(
            "--apiserver-dir: expected an absolute path on kube-apiserver's host, without spaces, "
            f"got {text!r}"
        )
    return PurePosixPath(text)


def _read_order(text: str) -> tuple[str, ...]:
    order = tuple(each.strip() for each in text.split(","))
    known = (*AUTHORIZERS, BULKHEAD)
    if BULKHEAD not in order or len(set(order)) != len(order) or not set(order) <= set(known):
        raise ManifestError(
            f"--authorizer-order: expected each at most once of {', '.join(known)}, and {BULKHEAD} among "
            f"them, with commas in between, got {text!r}"
        )
    return order


def _require_names(options: ManifestOptions) -> None:
    _read("--name", require_name, options.name)
    given = () if options.namespace is None else (("--namespace", options.namespace),)
    for option, name in (*given, *(("--exclude-namespace", each) for each in options.excluded_namespaces)):
        if _LABEL.fullmatch(name) is None:
            raise ManifestError(f"{option}: expected the name of a namespace, got {name!r}")


def _apiserver_files(documents: dict[str, Document], options: ApiServerOptions) -> Iterator[ManifestFile]:
    uses_client = options.client is not None and bool(documents)
    for name, document in documents.items():
        secret = uses_client and options.embed_client and name.endswith(".kubeconfig")
        yield ManifestFile(f"{APISERVER_FOLDER}/{name}", to_yaml(document), secret)
    if options.client is not None and uses_client and not options.embed_client:
        certificate, key = options.client.certificate.decode(), options.client.key.decode()
        yield ManifestFile(f"{APISERVER_FOLDER}/{CLIENT_CERTIFICATE}", certificate)
        yield ManifestFile(f"{APISERVER_FOLDER}/{CLIENT_KEY}", key, secret=True)
