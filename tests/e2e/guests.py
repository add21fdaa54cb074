"""The configuration under test: the demo's modules, and some that do what they should not."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bulkhead.service import demo
from tests.support.guests import PRELUDE, SLEEPING_VALIDATE, printing

GROUP = "e2e.bulkhead.dev"
# Custom resources, each for the modules that are asked about it.
RESOURCES = ("widgets", "failing", "ignoring", "erring", "sleeping", "dozing", "napping")

_TRAPPING = f'(module {PRELUDE} (func (export "validate") (unreachable)))'


def _says(**response: Any) -> str:
    review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
    return printing("validate", json.dumps({"response": review}))


def refusing(message: str) -> str:
    """Refuses whatever it is asked about."""
    return _says(allowed=False, status={"message": message, "code": 403, "reason": "Forbidden"})


def patching(*operations: Any) -> str:
    """Allows, and changes the object with a JSON patch."""
    patch = base64.b64encode(json.dumps(operations).encode()).decode()
    return _says(allowed=True, patch=patch, patchType="JSONPatch")


def _rule(operations: list[str], group: str, *resources: str) -> dict[str, Any]:
    return {
        "operations": operations,
        "apiGroups": [group],
        "apiVersions": ["v1"],
        "resources": list(resources),
    }


_SLOW = {"limits": {"timeout": "500ms"}}

# name: (module text, rules, more)
_ADMISSION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # The second fails without what the first has done.
    "stamp-first": (
        patching(
            {"op": "test", "path": "/kind", "value": "Widgets"},
            {"op": "add", "path": "/metadata/labels/first", "value": "stamped"},
        ),
        _rule(["CREATE"], GROUP, "widgets"),
        {"mutating": True},
    ),
    "stamp-second": (
        patching(
            {"op": "test", "path": "/metadata/labels/first", "value": "stamped"},
            {"op": "add", "path": "/metadata/labels/second", "value": "stamped"},
        ),
        _rule(["CREATE"], GROUP, "widgets"),
        {"mutating": True},
    ),
    "no-exec": (refusing("no shells here"), _rule(["CONNECT"], "", "pods/exec"), {}),
    "no-scale": (refusing("no scaling here"), _rule(["UPDATE"], "apps", "deployments/scale"), {}),
    "no-delete": (refusing("secrets stay"), _rule(["DELETE"], "", "secrets"), {}),
    "fails": (_TRAPPING, _rule(["CREATE"], GROUP, "failing"), {"failurePolicy": "Fail"}),
    "ignored": (_TRAPPING, _rule(["CREATE"], GROUP, "ignoring"), {"failurePolicy": "Ignore"}),
    "errs": (_TRAPPING, _rule(["CREATE"], GROUP, "erring"), {"failurePolicy": "Error"}),
    "sleeps": (SLEEPING_VALIDATE, _rule(["CREATE"], GROUP, "sleeping"), _SLOW),
    "dozes": (SLEEPING_VALIDATE, _rule(["CREATE"], GROUP, "dozing"), {**_SLOW, "failurePolicy": "Ignore"}),
    "naps": (SLEEPING_VALIDATE, _rule(["CREATE"], GROUP, "napping"), {**_SLOW, "failurePolicy": "Error"}),
}


def write_configuration(folder: Path, wat: Callable[[str], bytes], server: dict[str, Any]) -> Path:
    """Writes bulkhead.yaml with its modules; returns its path."""
    magic = demo.CONFIGURATION.parent
    for name, (text, _, _) in _ADMISSION.items():
        (folder / f"{name}.wasm").write_bytes(wat(text))
    configmaps = _rule(["CREATE", "UPDATE"], "", "configmaps")
    modules = [
        {"module": str(magic / "magic-mutate.wasm"), "mutating": True, "rules": [configmaps]},
        {"module": str(magic / "magic-validate.wasm"), "rules": [configmaps]},
        *(
            {"name": name, "module": f"{name}.wasm", "rules": [rule], **more}
            for name, (_, rule, more) in _ADMISSION.items()
        ),
    ]
    configuration = {
        "server": server,
        "authentication": {"modules": [{"module": str(magic / "magic-authn.wasm")}]},
        "authorization": {"modules": [{"module": str(magic / "magic-authz.wasm")}]},
        "admission": {"modules": modules},
    }
    path = folder / "bulkhead.yaml"
    path.write_text(json.dumps(configuration, indent=1))  # which is YAML, too
    return path
