"""What to do with the manifests, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bulkhead.service.manifest_apiserver import (
    ADMISSION_CONFIGURATION,
    AUTHORIZATION_CONFIGURATION,
    AUTHORIZATION_KUBECONFIG,
    ApiServerOptions,
    asked_before_others,
    flags,
    webhook_mode,
)


def instructions(names: Sequence[str], options: ApiServerOptions, *, has_webhooks: bool) -> str:
    """Plain text. `names`: the files for kube-apiserver's host."""
    paragraphs = [*_apiserver(names, options), *(_cluster() if has_webhooks else ())]
    return "\n\n".join(paragraphs) + "\n"


def _apiserver(names: Sequence[str], options: ApiServerOptions) -> Iterator[str]:
    if not names:
        return
    folder = options.folder
    yield (
        f"On each host of kube-apiserver, copy apiserver/ to {folder}, owned by root, and mount that\n"
        f"folder read-only at the same path where kube-apiserver is a Pod. Then set its flags:"
    )
    yield "\n".join(f"  {flag}" for flag in flags(names, options))
    if AUTHORIZATION_CONFIGURATION in names:
        yield (
            "instead of --authorization-mode. Before Kubernetes 1.32, which does not know that file yet:\n\n"
            f"  --authorization-mode={webhook_mode(options.authorizer_order)}\n"
            f"  --authorization-webhook-config-file={options.path_of(AUTHORIZATION_KUBECONFIG)}\n"
            "  --authorization-webhook-version=v1"
        )
        yield _place_of_bulkhead(options)
    if ADMISSION_CONFIGURATION in names:
        yield (
            "Where kube-apiserver has a file of --admission-control-config-file already, add the plugins of\n"
            f"{ADMISSION_CONFIGURATION} to that one instead."
        )


def _place_of_bulkhead(options: ApiServerOptions) -> str:
    if asked_before_others(options.authorizer_order):
        return (
            "Bulkhead is asked before others, and its denials count. Members of system:masters are not\n"
            "subject to it: keep a way to be one (kubeadm: super-admin.conf) for repairs."
        )
    return (
        "Bulkhead is asked last, about what nobody before it has allowed: it can allow more, and not less.\n"
        "For modules that deny: --authorizer-order Node,Bulkhead,RBAC."
    )


def _cluster() -> Iterator[str]:
    yield "While Bulkhead serves, apply the webhooks:"
    yield "  kubectl apply -f cluster/"
    yield (
        "If they ever keep you from working, take them away; kube-apiserver asks no webhook about that:\n\n"
        "  kubectl delete validatingwebhookconfigurations,mutatingwebhookconfigurations \\\n"
        "    -l app.kubernetes.io/name=bulkhead"
    )
