"""`bulkhead doctor`: what this machine offers, what is degraded, and what to do about it."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import platform
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from bulkhead.sandbox import Layer, Runtime, Sandbox, SandboxError, SandboxOptions, find_layers
from bulkhead.sandbox.cpus import cpu_quota
from bulkhead.service.cli import EXIT_FAILED
from bulkhead.service.state import state_dir as find_state_dir
from bulkhead.service.workers import automatic_workers

_LEAST_OPEN_FILES = 4096  # a run in flight takes about ten, a connection one
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_CLOSE_RANGE = 436
_LAYER_WORDS = {
    Layer.LIMITS: "memory, CPU time, output, descriptors and core files are bounded by the kernel",
    Layer.NO_NEW_PRIVS: "nothing that a run executes can raise its privileges",
    Layer.NAMESPACES: "users, processes, network, IPC, host name and mounts of its own",
    Layer.CAPABILITIES: "a run has none",
    Layer.EMPTY_ROOT: "a run's root directory is empty",
    Layer.LANDLOCK: "a run may open no file",
    Layer.SECCOMP: "a system call that no run needs kills it",
}
_NAMESPACES_ADVICE = (
    "allow user namespaces (user.max_user_namespaces, kernel.unprivileged_userns_clone, "
    "kernel.apparmor_restrict_unprivileged_userns, the container's seccomp profile)"
)
_LAYER_ADVICE = {
    Layer.LIMITS: "run Bulkhead where setrlimit is allowed",
    Layer.NO_NEW_PRIVS: "Linux 3.5 or later",
    Layer.NAMESPACES: _NAMESPACES_ADVICE,
    Layer.CAPABILITIES: "run Bulkhead as a user without capabilities, and it has none to drop",
    Layer.EMPTY_ROOT: _NAMESPACES_ADVICE,
    Layer.LANDLOCK: "Linux 5.13 or later with landlock among its security modules (lsm=landlock,…)",
    Layer.SECCOMP: "a kernel with CONFIG_SECCOMP_FILTER",
}


class State(StrEnum):
    """How well something is."""

    OK = "ok"
    DEGRADED = "degraded"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    found: str
    advice: str = ""


def doctor(as_json: bool, state_dir: Path | None, wasmtime: Path | None) -> int:
    """Prints the findings; returns the exit code, 0 if Bulkhead can serve here."""
    findings = asyncio.run(_findings(find_state_dir(state_dir), wasmtime))
    can_serve = all(each.state is not State.MISSING for each in findings)
    if as_json:
        print(json.dumps({"canServe": can_serve, "findings": [asdict(each) for each in findings]}, indent=2))  # noqa: T201
    else:
        _print_table(findings, can_serve)
    return 0 if can_serve else EXIT_FAILED


async def _findings(state_dir: Path, wasmtime: Path | None) -> list[Finding]:
    return [*await _sandbox(state_dir, wasmtime), *_isolation(), *_machine()]


async def _sandbox(state_dir: Path, wasmtime: Path | None) -> list[Finding]:
    """Opens a real sandbox, which probes wasmtime and starts the spawner."""
    try:
        # What an earlier start remembered is not what this machine has now.
        (state_dir / "bin" / "runtime.json").unlink(missing_ok=True)
        async with await Sandbox.open(SandboxOptions(state_dir=state_dir, wasmtime=wasmtime)) as sandbox:
            return [*_runtime(sandbox.runtime), Finding("state directory", State.OK, str(state_dir))]
    except (SandboxError, OSError) as error:
        return [
            Finding(
                "sandbox", State.MISSING, str(error), "see above; nothing can be run before this is mended"
            )
        ]


def _runtime(runtime: Runtime) -> list[Finding]:
    which = "wasmtime-min" if runtime.minimal else "the full binary, which takes half as long again"
    forked = "runs are forked from a wasmtime that has loaded their module; the probe passed"
    findings = [
        Finding("wasmtime", State.OK, f"{runtime.version}, from {runtime.source}: {runtime.compiler}"),
        Finding("runner", State.OK if runtime.minimal else State.DEGRADED, f"{which}: {runtime.runner}"),
        Finding("flags", State.OK, " ".join(runtime.flags)),
        Finding("spawner", State.OK, "starts processes, and the probe passed: answers, traps, memory limit"),
        Finding("zygotes", State.DEGRADED, f"every run starts wasmtime anew: {runtime.zygote_obstacle}")
        if runtime.zygote_obstacle
        else Finding("zygotes", State.OK, forked),
    ]
    findings += [Finding("wasmtime", State.DEGRADED, warning) for warning in runtime.warnings]
    return findings


def _machine() -> list[Finding]:
    checks: tuple[Callable[[], Finding], ...] = (_kernel, _close_range, _memfd)
    checks += (_user, _open_files, _cpus)
    return [check() for check in checks]


def _isolation() -> list[Finding]:
    """Each wall around a run, tried in a process of its own."""
    return [
        Finding(f"isolation: {each.name}", State.OK, _LAYER_WORDS[each.layer])
        if each.works
        else Finding(
            f"isolation: {each.name}", State.DEGRADED, f"not here: {each.obstacle}", _LAYER_ADVICE[each.layer]
        )
        for each in find_layers()
    ]


def _kernel() -> Finding:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        advice = "Linux 5.3 or later is needed"
        return Finding("kernel", State.MISSING, f"Linux {platform.release()}, no pidfd: {error}", advice)
    return Finding("kernel", State.OK, f"Linux {platform.release()} on {platform.machine()}, with pidfd")


def _close_range() -> Finding:
    # An empty range above all descriptors: harmless, and tells whether the call is known.
    if _libc.syscall(_SYS_CLOSE_RANGE, 0x7FFFFFF0, 0x7FFFFFF1, 0) == 0:
        return Finding("close_range", State.OK, "available")
    return Finding(
        "close_range",
        State.DEGRADED,
        "not available: descriptors are closed one by one",
        "Linux 5.9 or later",
    )


def _memfd() -> Finding:
    noexec_seal = 0x8
    try:
        os.close(os.memfd_create("bulkhead-doctor", os.MFD_CLOEXEC | noexec_seal))
    except OSError:
        return Finding("memfd", State.OK, "available, without the no-exec seal (Linux 6.3)")
    return Finding("memfd", State.OK, "available, with the no-exec seal")


def _user() -> Finding:
    if os.geteuid() == 0:
        advice = (
            "run Bulkhead as a user of its own: what reads requests and compiles modules need not be root"
        )
        return Finding("user", State.DEGRADED, "root", advice)
    return Finding("user", State.OK, f"uid {os.geteuid()}")


def _open_files() -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if hard != resource.RLIM_INFINITY and hard < _LEAST_OPEN_FILES:
        advice = f"raise it to {_LEAST_OPEN_FILES} or more (ulimit -Hn, LimitNOFILE=)"
        return Finding("open files", State.DEGRADED, shown, advice)
    return Finding("open files", State.OK, shown)


def _cpus() -> Finding:
    allowed, workers = len(os.sched_getaffinity(0)), automatic_workers()
    return Finding(
        "CPUs", State.OK, f"{allowed} of {os.cpu_count()} allowed, {_quota()}; --workers auto is {workers}"
    )


def _quota() -> str:
    quota = cpu_quota()
    return "no cgroup quota" if quota is None else f"a cgroup quota of {quota:g}"


def _print_table(findings: list[Finding], can_serve: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    colours = {State.OK: "green", State.DEGRADED: "yellow", State.MISSING: "red"}
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(each.what) for each in findings)
    for each in findings:
        state = f"[{colours[each.state]}]{each.state:<8}[/]"
        console.print(f"{each.what:<{width}}  {state}  {escape(each.found)}")
        if each.advice:
            console.print(f"{'':<{width}}            → {escape(each.advice)}")
    console.print("Bulkhead can serve here." if can_serve else "[red]Bulkhead cannot serve here.[/]")
