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
RESOURCES = ("widgets", "failing", "ignoring", "erring", "sleeping", "dozing", "napping", "talking", "frozen")

TRAPPING_VALIDATE = f'(module {PRELUDE} (func (export "validate") (unreachable)))'


def saying(**response: Any) -> str:
    """Answers this, whatever it is asked."""
    review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
    return printing("validate", json.dumps({"response": review}))


def refusing(message: str) -> str:
    """Refuses whatever it is asked about."""
    return saying(allowed=False, status={"message": message, "code": 403, "reason": "Forbidden"})


def patching(*operations: Any) -> str:
    """Allows, and changes the object with a JSON patch."""
    patch = base64.b64encode(json.dumps(operations).encode()).decode()
    return saying(allowed=True, patch=patch, patchType="JSONPatch")


def rule(operations: list[str], group: str, *resources: str) -> dict[str, Any]:
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
        rule(["CREATE"], GROUP, "widgets"),
        {"mutating": True},
    ),
    "stamp-second": (
        patching(
            {"op": "test", "path": "/metadata/labels/first", "value": "stamped"},
            {"op": "add", "path": "/metadata/labels/second", "value": "stamped"},
        ),
        rule(["CREATE"], GROUP, "widgets"),
        {"mutating": True},
    ),
    "no-exec": (refusing("no shells here"), rule(["CONNECT"], "", "pods/exec"), {}),
    "no-scale": (refusing("no scaling here"), rule(["UPDATE"], "apps", "deployments/scale"), {}),
    "no-delete": (refusing("secrets stay"), rule(["DELETE"], "", "secrets"), {}),
    "talks": (
        saying(allowed=True, warnings=["mind the gap"], auditAnnotations={"seen": "yes"}),
        rule(["CREATE"], GROUP, "talking"),
        {},
    ),
    "no-change": (refusing("stays as it is"), rule(["UPDATE"], GROUP, "frozen"), {}),
    "fails": (TRAPPING_VALIDATE, rule(["CREATE"], GROUP, "failing"), {"failurePolicy": "Fail"}),
    "ignored": (TRAPPING_VALIDATE, rule(["CREATE"], GROUP, "ignoring"), {"failurePolicy": "Ignore"}),
    "errs": (TRAPPING_VALIDATE, rule(["CREATE"], GROUP, "erring"), {"failurePolicy": "Error"}),
    "sleeps": (SLEEPING_VALIDATE, rule(["CREATE"], GROUP, "sleeping"), _SLOW),
    "dozes": (SLEEPING_VALIDATE, rule(["CREATE"], GROUP, "dozing"), {**_SLOW, "failurePolicy": "Ignore"}),
    "naps": (SLEEPING_VALIDATE, rule(["CREATE"], GROUP, "napping"), {**_SLOW, "failurePolicy": "Error"}),
}


def modules(folder: Path, wat: Callable[[str], bytes]) -> dict[str, Any]:
    """Writes modules; returns the sections of a configuration that has them."""
    folder.mkdir()
    magic = demo.CONFIGURATION.parent
    for name, (text, _, _) in _ADMISSION.items():
        (folder / f"{name}.wasm").write_bytes(wat(text))
    configmaps = rule(["CREATE", "UPDATE"], "", "configmaps")
    admission = [
        {"module": str(magic / "magic-mutate.wasm"), "mutating": True, "rules": [configmaps]},
        {"module": str(magic / "magic-validate.wasm"), "rules": [configmaps]},
        *(
            {"name": name, "module": f"../{folder.name}/{name}.wasm", "rules": [rules], **more}
            for name, (_, rules, more) in _ADMISSION.items()
        ),
    ]
    return {
        "authentication": {"modules": [{"module": str(magic / "magic-authn.wasm")}]},
        "authorization": {"modules": [{"module": str(magic / "magic-authz.wasm")}]},
        "admission": {"modules": admission},
    }
