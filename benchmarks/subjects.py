"""What is run: modules, and the recorded review that they are asked about."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from benchmarks.products import HERE, Missing, go_policy, pod_policy

_REVIEWS = HERE.parent / "tests" / "data" / "reviews"


@dataclass(frozen=True, slots=True)
class Subject:
    """A module with the entry point `validate` that lets the review pass."""

    name: str
    file: Path
    about: str
    sleeps: bool = False
    """It knows the setting `sleepMilliseconds`."""

    def __str__(self) -> str:
        return f"{self.name}: {self.about}; {self.file.stat().st_size / 1000:.0f} KB"


def subjects(skipped: list[str]) -> list[Subject]:
    """The modules that can be had here; says in `skipped` which cannot."""
    small = Path(str(files("bulkhead.service.demo") / "magic-validate.wasm"))
    found = [Subject("magic-validate", small, "of the demo, in Zig; looks at the kind of the object")]
    about = {
        "pod-policy": "in Rust; parses all of the review with serde_json and looks at every container",
        "go-policy": "in Go, with the standard toolchain; starts Go's runtime for every run",
    }
    for name, build in (("pod-policy", pod_policy), ("go-policy", go_policy)):
        try:
            found.append(Subject(name, build(), about[name], sleeps=name == "pod-policy"))
        except Missing as missing:
            skipped.append(f"the module {name}: {missing}")
    return found


def recorded(name: str) -> bytes:
    """The body of a request that a real kube-apiserver sent."""
    document = json.loads((_REVIEWS / f"{name}.json").read_bytes())
    return json.dumps(document["body"], separators=(",", ":")).encode()


def pod_review() -> bytes:
    """An update of a Pod: 3.8 KB."""
    return recorded("admission-validate-update-pods")
