"""What a module is, and whether we can run it, up to the real runtime's own opinion of WASI."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.sandbox.errors import InvalidModule, InvalidModuleReason, UnknownModule
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.module import (
    MAX_KUBEWARDEN_METADATA_BYTES,
    MAX_RUNNABLE_TABLES,
    Abi,
    Export,
    Import,
    ModuleInfo,
    check_runnable,
    describe,
    digest_of,
    parse_digest,
    read_kubewarden_metadata,
)
from bulkhead.sandbox.wasi import WASI_FUNCTIONS, WASI_MODULE
from bulkhead.sandbox.wasm import ExternKind, MemoryType

Wat = Callable[[str], bytes]
Described = Callable[[str], ModuleInfo]

MEMORY = '(memory (export "memory") 1)'
MAXIMUM = Limits(memory_bytes=128 << 20, table_elements=1_000)


@pytest.fixture
def described(wat: Wat) -> Described:
    """Assembles and describes: `described('(func (export "authn"))')`; the module form is added."""
    return lambda fields: describe(wat(f"(module {fields})"), max_bytes=1 << 20)


def metadata(json: str) -> str:
    return '(@custom "io.kubewarden.metadata" "{}")'.format(json.replace("\\", "\\\\").replace('"', '\\"'))


class TestDigest:
    def test_is_sha256_of_the_bytes(self) -> None:
        assert digest_of(b"abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()

    def test_comes_back_from_parsing_unchanged(self) -> None:
        assert parse_digest(digest_of(b"abc")) == digest_of(b"abc")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "sha256:",
            "a" * 64,
            "sha256:" + "a" * 63,
            "sha256:" + "a" * 65,
            "sha256:" + "A" * 64,
            "sha256:" + "٣" * 64,
            "sha256:" + "a" * 64 + "\n",
            "sha256:../" + "a" * 61,
            "SHA256:" + "a" * 64,
            "sha512:" + "a" * 64,
            "sha256:" + "a" * 63 + "\0",
            "../" * 350_000,
        ],
    )
    def test_refuses_anything_else_without_echoing_it_whole(self, text: str) -> None:
        with pytest.raises(UnknownModule, match="is not a module digest") as caught:
            parse_digest(text)
        assert len(str(caught.value)) < 1_000
        assert "\n" not in str(caught.value)

    @given(st.from_regex(r"sha256:[0-9a-f/.\0\n]{64}") | st.from_regex(r"\Asha256:[0-9a-f]{64}\Z"))
    def test_what_it_accepts_is_always_safe_in_a_path(self, text: str) -> None:
        try:
            digest = parse_digest(text)
        except UnknownModule:
            return
        hexadecimal = digest.removeprefix("sha256:")
        assert len(hexadecimal) == 64
        assert set(hexadecimal) <= set("0123456789abcdef")


class TestDescribe:
    def test_tells_digest_size_imports_and_exports(self, wat: Wat) -> None:
        data = wat(
            f'(module (import "{WASI_MODULE}" "fd_write" (func (param i32 i32 i32 i32) (result i32)))'
            f' {MEMORY} (func (export "authn")) (func (export "helper") (param i32) (result i64)'
            " i64.const 0))"
        )
        info = describe(data, max_bytes=len(data))
        assert info.digest == digest_of(data)
        assert info.size_bytes == len(data)
        assert info.imports == (
            Import(WASI_MODULE, "fd_write", ExternKind.FUNCTION, "(i32, i32, i32, i32) -> (i32)"),
        )
        assert info.exports == (
            Export("memory", ExternKind.MEMORY, "1 or more pages", runnable=False),
            Export("authn", ExternKind.FUNCTION, "() -> ()", runnable=True),
            Export("helper", ExternKind.FUNCTION, "(i32) -> (i64)", runnable=False),
        )
        assert info.memories == (MemoryType(1, None),)
        assert info.kubewarden_metadata is None

    def test_refuses_a_module_over_the_size_limit_before_reading_it(self) -> None:
        with pytest.raises(InvalidModule, match="has 1025 bytes; at most 1Ki") as caught:
            describe(bytes(1025), max_bytes=1024)
        assert caught.value.reason is InvalidModuleReason.TOO_LARGE

    def test_refuses_what_is_not_a_module(self) -> None:
        with pytest.raises(InvalidModule, match="WebAssembly text") as caught:
            describe(b"(module)", max_bytes=1024)
        assert caught.value.reason is InvalidModuleReason.NOT_WASM

    def test_describes_a_module_that_we_cannot_run(self, described: Described) -> None:
        info = described('(import "nobody" "has" (func (param f64))) (memory 1) (memory 2)')
        assert [each.signature for each in info.imports] == ["(f64) -> ()"]
        assert [each.minimum_pages for each in info.memories] == [1, 2]


class TestAbi:
    @pytest.mark.parametrize(
        ("fields", "abi"),
        [
            ('(func (export "authn"))', Abi.K8S_WASM),
            ('(func (export "authz"))', Abi.K8S_WASM),
            ('(func (export "validate")) (func (export "_start"))', Abi.K8S_WASM),
            ('(func (export "validate") (param i32))', Abi.K8S_WASM),
            ('(memory (export "validate") 1) (func (export "_start"))', Abi.WASI_COMMAND),
            ('(func (export "_start"))', Abi.WASI_COMMAND),
            ('(func (export "_initialize")) (func (export "anything"))', Abi.WASI_REACTOR),
            ("", Abi.WASI_REACTOR),
            (
                '(import "wapc" "__guest_request" (func (param i32 i32)))'
                ' (func (export "__guest_call") (param i32 i32) (result i32) i32.const 1)'
                ' (func (export "_start"))',
                Abi.KUBEWARDEN_WAPC,
            ),
            ('(func (export "__guest_call")) (func (export "_start"))', Abi.WASI_COMMAND),
            (
                '(import "env" "opa_abort" (func (param i32))) (func (export "opa_eval"))',
                Abi.OPA,
            ),
            ('(import "env" "opa_builtin0" (func)) (func (export "eval"))', Abi.OPA),
            ('(import "env" "memory" (memory 1)) (func (export "eval"))', Abi.WASI_REACTOR),
            (metadata('{"executionMode": "wasi"}') + '(func (export "_start"))', Abi.KUBEWARDEN_WASI),
            (metadata('{"executionMode": "wasi"}') + '(func (export "validate"))', Abi.KUBEWARDEN_WASI),
            (metadata('{"executionMode": "kubewarden-wapc"}'), Abi.KUBEWARDEN_WAPC),
            (metadata('{"protocolVersion": "v1"}'), Abi.KUBEWARDEN_WAPC),
            (metadata('{"executionMode": "opa"}'), Abi.OPA),
            (
                metadata('{"executionMode": "gatekeeper"}')
                + '(import "env" "opa_abort" (func (param i32))) (func (export "opa_eval"))',
                Abi.GATEKEEPER,
            ),
        ],
    )
    def test_is_recognised(self, described: Described, fields: str, abi: Abi) -> None:
        assert described(fields).abi is abi


class TestKubewardenMetadata:
    def test_is_kept_as_it_stands_in_the_module(self, described: Described) -> None:
        raw = described(metadata('{"executionMode":  "wasi", "mutating": true}')).kubewarden_metadata
        assert raw == b'{"executionMode":  "wasi", "mutating": true}'
        assert read_kubewarden_metadata(raw) == {"executionMode": "wasi", "mutating": True}

    @pytest.mark.parametrize(
        ("json", "text"),
        [
            ("", "not JSON"),
            ("{", "not JSON"),
            ("[]", "expected a JSON object"),
            ("{} {}", "not JSON"),
            ('{"a": NaN}', "not JSON"),
            ("[" * 100_000, "nested too deep"),
            ('{"executionMode": "lisp"}', "executionMode is 'lisp'; expected one of kubewarden-wapc, wasi"),
            ('{"executionMode": 7}', "executionMode is of type int"),
        ],
    )
    def test_refuses_malformed_ones(self, described: Described, json: str, text: str) -> None:
        with pytest.raises(InvalidModule) as caught:
            described(metadata(json))
        assert text in str(caught.value)
        assert caught.value.reason is InvalidModuleReason.MALFORMED

    def test_refuses_two_of_them(self, described: Described) -> None:
        with pytest.raises(InvalidModule, match="has 2 such sections") as caught:
            described(metadata('{"executionMode": "wasi"}') + metadata("{}"))
        assert caught.value.reason is InvalidModuleReason.MALFORMED

    def test_refuses_one_over_a_mebibyte(self) -> None:
        with pytest.raises(InvalidModule, match="at most 1Mi") as caught:
            read_kubewarden_metadata(b" " * (MAX_KUBEWARDEN_METADATA_BYTES + 1))
        assert caught.value.reason is InvalidModuleReason.LIMIT

    @given(st.binary(max_size=100))
    def test_reading_any_bytes_gives_an_object_or_a_refusal(self, raw: bytes) -> None:
        try:
            value: object = read_kubewarden_metadata(raw)
        except InvalidModule as error:
            value = error.reason
        assert isinstance(value, dict) or value is InvalidModuleReason.MALFORMED


class TestRunnable:
    @pytest.mark.parametrize(
        "fields",
        [
            f'{MEMORY} (func (export "authn"))',
            f'{MEMORY} (func (export "_start"))',
            f'{MEMORY} (func (export "_initialize")) (func (export "anything"))',
            f'{MEMORY} (func (export "")) (func (export "_start"))',
            f'{MEMORY} (func (export "_start")) (func (export "helper") (param i32))',
            f'(import "{WASI_MODULE}" "proc_exit" (func (param i32))) {MEMORY} (func (export "_start"))',
            f'{MEMORY} (table 1000 funcref) (func (export "_start"))',
            '(memory (export "memory") 2048) (func (export "_start"))',
            f'{metadata("{}")} {MEMORY} (func (export "_start"))',
        ],
    )
    def test_accepts(self, described: Described, fields: str) -> None:
        check_runnable(described(fields), MAXIMUM)
        assert any(export.runnable for export in described(fields).exports)

    @pytest.mark.parametrize(
        ("fields", "reason", "text"),
        [
            (
                f'(import "nobody" "thing" (func (param i32))) {MEMORY} (func (export "_start"))',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "imports func 'thing' of 'nobody' as (i32) -> ()",
            ),
            (
                f'(import "wasi_unstable" "fd_close" (func (param i32) (result i32))) {MEMORY}',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "built for an older WASI",
            ),
            (
                f'(import "wasi" "thread-spawn" (func (param i32) (result i32))) {MEMORY}',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "threads are not supported",
            ),
            (
                f'(import "{WASI_MODULE}" "fd_close" (func (param i64) (result i32))) {MEMORY}',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "as (i64) -> (i32), and a module can only import the functions of wasi_snapshot_preview1; "
                "there it has the signature (i32) -> (i32)",
            ),
            (
                f'(import "{WASI_MODULE}" "fd_dup" (func)) {MEMORY}',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "'fd_dup'",
            ),
            (
                f'(import "{WASI_MODULE}" "fd_close" (global i32)) {MEMORY}',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "imports global 'fd_close'",
            ),
            (
                '(import "env" "memory" (memory 1)) (export "memory" (memory 0)) (func (export "_start"))',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "imports memory 'memory' of 'env' as 1 or more pages",
            ),
            (
                '(import "wapc" "__guest_request" (func (param i32 i32)))'
                ' (func (export "__guest_call") (param i32 i32) (result i32) i32.const 1)',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "Kubewarden waPC policies are not supported by this version",
            ),
            (
                '(import "env" "opa_abort" (func (param i32))) (func (export "eval"))',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "Rego (OPA) policies are not supported by this version",
            ),
            (
                metadata('{"executionMode": "gatekeeper"}') + '(import "env" "memory" (memory 1))',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "Rego (Gatekeeper) policies are not supported by this version",
            ),
            (
                metadata('{"executionMode": "wasi"}') + f'(import "host" "call" (func)) {MEMORY}',
                InvalidModuleReason.UNKNOWN_IMPORT,
                "host calls of Kubewarden policies are not supported by this version",
            ),
            ('(func (export "_start"))', InvalidModuleReason.NO_MEMORY, "does not export its memory"),
            ('(memory 1) (func (export "_start"))', InvalidModuleReason.NO_MEMORY, "'memory'"),
            (
                '(memory 1) (func (export "memory")) (func (export "_start"))',
                InvalidModuleReason.NO_MEMORY,
                "does not export its memory",
            ),
            (
                f'{MEMORY} (memory 1) (func (export "_start"))',
                InvalidModuleReason.UNSUPPORTED_FEATURE,
                "(multi-memory)",
            ),
            (MEMORY + "(memory 0)" * 89, InvalidModuleReason.UNSUPPORTED_FEATURE, "90 memories"),
            (
                '(memory (export "memory") 2049) (func (export "_start"))',
                InvalidModuleReason.LIMIT,
                "of 131136Ki to start; this server allows at most 128Mi",
            ),
            (
                '(memory (export "memory") 65536) (func (export "_start"))',
                InvalidModuleReason.LIMIT,
                "4Gi",
            ),
            (
                f'{MEMORY} (table 5 externref) (table 1001 funcref) (func (export "_start"))',
                InvalidModuleReason.LIMIT,
                "a table of 1001 elements to start; this server allows at most 1000",
            ),
            (
                MEMORY + "(table 0 funcref)" * (MAX_RUNNABLE_TABLES + 1),
                InvalidModuleReason.LIMIT,
                "9 tables; at most 8",
            ),
            (MEMORY, InvalidModuleReason.NO_ENTRY_POINT, "exports nothing that can run"),
            (
                f'{MEMORY} (func (export "_initialize"))',
                InvalidModuleReason.NO_ENTRY_POINT,
                "exports nothing that can run",
            ),
            (
                f'{MEMORY} (func (export "authn") (result i32) i32.const 0) (func (export "_start"))',
                InvalidModuleReason.WRONG_SIGNATURE,
                "'authn' is () -> (i32); to be run it must be a function () -> ()",
            ),
            (
                f'{MEMORY} (func (export "_start") (param i32 i32))',
                InvalidModuleReason.WRONG_SIGNATURE,
                "'_start' is (i32, i32) -> ()",
            ),
            (
                f'{MEMORY} (global (export "authz") i32 (i32.const 1)) (func (export "_start"))',
                InvalidModuleReason.WRONG_SIGNATURE,
                "'authz' is a global",
            ),
            (
                f'{MEMORY} (func (export "_initialize") (param i32)) (func (export "_start"))',
                InvalidModuleReason.WRONG_SIGNATURE,
                "'_initialize' is (i32) -> ()",
            ),
            (
                f'{MEMORY} (func (export "") (result i32) i32.const 0) (func (export "_start"))',
                InvalidModuleReason.WRONG_SIGNATURE,
                "'' is () -> (i32)",
            ),
        ],
    )
    def test_refuses(self, described: Described, fields: str, reason: InvalidModuleReason, text: str) -> None:
        with pytest.raises(InvalidModule) as caught:
            check_runnable(described(fields), MAXIMUM)
        assert text in str(caught.value)
        assert caught.value.reason is reason

    def test_messages_hold_no_control_characters_of_the_modules_own(self, described: Described) -> None:
        info = described(f'(import "a\\0a\\1b[2J" "\\0d" (func)) {MEMORY} (func (export "_start"))')
        with pytest.raises(InvalidModule) as caught:
            check_runnable(info, MAXIMUM)
        assert str(caught.value).isprintable()


class TestEntryPoint:
    def test_accepts_an_exported_function_without_parameters_and_results(self, described: Described) -> None:
        info = described(f'{MEMORY} (func (export "decide")) (func (export "_start"))')
        info.require_entry_point("decide")
        info.require_entry_point("_start")
        assert [each.name for each in info.exports if each.runnable] == ["decide", "_start"]

    @pytest.mark.parametrize(
        ("name", "reason", "text"),
        [
            ("nothing", InvalidModuleReason.NO_ENTRY_POINT, "no export 'nothing'; it can run 'decide'"),
            ("", InvalidModuleReason.NO_ENTRY_POINT, "no export ''"),
            ("_initialize", InvalidModuleReason.NO_ENTRY_POINT, "is not an entry point; it can run"),
            ("helper", InvalidModuleReason.WRONG_SIGNATURE, "'helper' is (i32) -> (i32)"),
            ("memory", InvalidModuleReason.WRONG_SIGNATURE, "'memory' is a memory"),
        ],
    )
    def test_refuses_other_names(
        self, described: Described, name: str, reason: InvalidModuleReason, text: str
    ) -> None:
        info = described(
            f'{MEMORY} (func (export "decide")) (func (export "_initialize"))'
            ' (func (export "helper") (param i32) (result i32) local.get 0)'
        )
        with pytest.raises(InvalidModule) as caught:
            info.require_entry_point(name)
        assert text in str(caught.value)
        assert caught.value.reason is reason

    def test_lists_only_a_few_of_many_names(self, described: Described) -> None:
        info = described("".join(f'(func (export "f{number:04}"))' for number in range(500)))
        with pytest.raises(InvalidModule, match=r"'f0000', .*'f0009', …$"):
            info.require_entry_point("other")


@pytest.fixture(scope="module")
def wasmtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's wasmtime, made executable: the wheel installs it without that permission."""
    spec = find_spec("wasmtime_cli")
    assert spec is not None
    assert spec.origin is not None
    copy = tmp_path_factory.mktemp("wasmtime") / "wasmtime"
    shutil.copyfile(Path(spec.origin).parent / "wasmtime", copy)
    copy.chmod(0o700)
    return copy


class TestWasiFunctions:
    """Our table against the runtime: what we let in must link, and what we refuse must not."""

    def test_every_one_of_them_links_with_our_signature(self, wat: Wat, wasmtime: Path) -> None:
        imports = " ".join(import_of(name, signature) for name, signature in WASI_FUNCTIONS.items())
        data = wat(f'(module {imports} {MEMORY} (func (export "_start")))')
        check_runnable(describe(data, max_bytes=1 << 20), MAXIMUM)
        done = run(wasmtime, data)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("name", sorted(WASI_FUNCTIONS))
    def test_none_of_them_links_with_another_signature(self, wat: Wat, wasmtime: Path, name: str) -> None:
        parameters, arrow, results = WASI_FUNCTIONS[name].partition(" -> ")
        other = f"({parameters.strip('()')}, i32)".replace("(, ", "(") + arrow + results
        data = wat(f'(module {import_of(name, other)} {MEMORY} (func (export "_start")))')
        with pytest.raises(InvalidModule, match=name):
            check_runnable(describe(data, max_bytes=1 << 20), MAXIMUM)
        done = run(wasmtime, data)
        assert done.returncode != 0
        assert b"incompatible import type" in done.stderr

    def test_names_that_we_do_not_know_do_not_link(self, wat: Wat, wasmtime: Path) -> None:
        data = wat(f'(module (import "{WASI_MODULE}" "sock_open" (func)) {MEMORY} (func (export "_start")))')
        done = run(wasmtime, data)
        assert done.returncode != 0
        assert b"unknown import" in done.stderr


def import_of(name: str, signature: str) -> str:
    parameters, _, results = signature.replace(",", "").partition(" -> ")
    types = f"(param {parameters.strip('()')}) (result {results.strip('()')})"
    return f'(import "{WASI_MODULE}" "{name}" (func {types}))'


def run(wasmtime: Path, data: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [str(wasmtime), "run", "-C", "cache=n", "/dev/stdin"]
    return subprocess.run(command, input=data, capture_output=True, check=False, timeout=60)
