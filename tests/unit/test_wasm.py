"""The parser of outside bytes: what it reads, what it refuses, and that nothing else comes out."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkhead.sandbox.errors import InvalidModule, InvalidModuleReason
from bulkhead.sandbox.wasm import (
    MAX_CUSTOM_SECTIONS,
    MAX_EXPORTS,
    MAX_FUNCTIONS,
    MAX_IMPORTS,
    MAX_NAME_BYTES,
    MAX_TYPES,
    ExternKind,
    FunctionType,
    GlobalType,
    MemoryType,
    TableType,
    parse,
    shown,
)
from tests.support.wat import wasm_tools

Wat = Callable[[str], bytes]

HEADER = b"\0asm\x01\0\0\0"

RICH = """
(module
  (type $unused (func (param v128 externref) (result funcref)))
  (import "env" "log" (func $log (param i32 i64 f32 f64) (result i32)))
  (import "env" "table" (table 2 5 externref))
  (import "env" "stack" (global (mut i32)))
  (import "env" "base" (global i64))
  (memory (export "memory") 3 16)
  (table (export "calls") 4 funcref)
  (global (export "answer") i32 (i32.const 42))
  (export "stack" (global 0))
  (export "log" (func $log))
  (export "table" (table 0))
  (func $start)
  (func (export "authn"))
  (func (export "two") (result i32 i64) i32.const 1 i64.const 2)
  (start $start)
  (elem (i32.const 0) func $start)
  (data (i32.const 0) "hello")
  (@custom "io.example" "content"))
"""


def leb(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def section(section_id: int, content: bytes) -> bytes:
    return bytes([section_id]) + leb(len(content)) + content


def refusal(data: bytes) -> InvalidModule:
    with pytest.raises(InvalidModule) as caught:
        parse(data)
    return caught.value


def assert_refused(data: bytes, reason: InvalidModuleReason, text: str) -> None:
    error = refusal(data)
    assert text in str(error)
    assert error.reason is reason


TYPES = section(1, b"\x02\x60\x00\x00\x60\x01\x7f\x00")  # () -> () and (i32) -> ()


class TestReads:
    def test_the_smallest_module(self) -> None:
        module = parse(HEADER)
        assert (module.imports, module.exports, module.memories) == ((), (), ())

    def test_imports_with_their_types(self, wat: Wat) -> None:
        module = parse(wat(RICH))
        assert [(each.module, each.name, each.kind, str(each.type)) for each in module.imports] == [
            ("env", "log", ExternKind.FUNCTION, "(i32, i64, f32, f64) -> (i32)"),
            ("env", "table", ExternKind.TABLE, "externref, 2 to 5"),
            ("env", "stack", ExternKind.GLOBAL, "mut i32"),
            ("env", "base", ExternKind.GLOBAL, "i64"),
        ]

    def test_exports_with_their_types(self, wat: Wat) -> None:
        exports = {each.name: (each.kind, each.type) for each in parse(wat(RICH)).exports}
        assert exports == {
            "memory": (ExternKind.MEMORY, MemoryType(3, 16)),
            "calls": (ExternKind.TABLE, TableType("funcref", 4, None)),
            "answer": (ExternKind.GLOBAL, None),
            "stack": (ExternKind.GLOBAL, GlobalType("i32", mutable=True)),
            "log": (ExternKind.FUNCTION, FunctionType(b"\x7f\x7e\x7d\x7c", b"\x7f")),
            "table": (ExternKind.TABLE, TableType("externref", 2, 5)),
            "authn": (ExternKind.FUNCTION, FunctionType(b"", b"")),
            "two": (ExternKind.FUNCTION, FunctionType(b"", b"\x7f\x7e")),
        }

    def test_sizes_start_and_counts(self, wat: Wat) -> None:
        module = parse(wat(RICH))
        assert module.tables == (TableType("externref", 2, 5), TableType("funcref", 4, None))
        assert module.memories == (MemoryType(3, 16),)
        assert module.memories[0].minimum_bytes == 3 * 65536
        assert module.function_count == 4
        assert module.has_start

    def test_where_a_custom_section_lies(self, wat: Wat) -> None:
        data = wat(RICH)
        custom = next(each for each in parse(data).custom_sections if each.name == "io.example")
        assert data[custom.offset : custom.offset + custom.size_bytes] == b"content"

    def test_custom_sections_between_any_others(self) -> None:
        extra = section(0, b"\x01x") + section(0, b"\x01x" + b"y")
        module = parse(HEADER + extra + TYPES + extra)
        assert [each.size_bytes for each in module.custom_sections] == [0, 1, 0, 1]

    def test_numbers_padded_to_five_bytes(self) -> None:
        """Linkers leave room in section sizes and counts, to fill in later."""
        types = b"\x01\x89\x80\x80\x80\x00" + b"\x81\x80\x80\x80\x00\x60\x00\x00\x00"
        assert "1 bytes too many" in str(refusal(HEADER + types))
        assert parse(HEADER + types.replace(b"\x89", b"\x88")[:-1]).imports == ()

    def test_function_types_beyond_one_byte(self, wat: Wat) -> None:
        types = "".join(f"(type (func {'(param i32)' * number}))" for number in range(300))
        module = parse(wat(f'(module {types} (func (export "last") (type 299)) (func (type 1)))'))
        assert str(module.exports[0].type).count("i32") == 299

    def test_names_in_any_script(self, wat: Wat) -> None:
        assert parse(wat('(module (func (export "перевірка🦀\\00")))')).exports[0].name == "перевірка🦀\0"


class TestRefusesOtherFiles:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            (b"", "empty"),
            (b"\0as", "ends after 3 bytes"),
            (b"\0asm\x01\0", "ends after 6 bytes"),
            (b"(module)", "WebAssembly text (WAT)"),
            (b"\xef\xbb\xbf\n  ;; a comment\n(module)", "WebAssembly text (WAT)"),
            (b"\0asm\x0d\0\x01\0", "component"),
            (b"\0asm\x02\0\0\0", "version bytes 02 00 00 00"),
            (b"\0asm\x01\0\0\x01", "version bytes 01 00 00 01"),
            (b"\x7fELF\x02\x01\x01\0\0\0", "ELF"),
            (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
            (b"\xff\xfe(\0m\0", "starts with ff fe 28 00"),
            (b"AGFzbQEAAAA=", "must start with the bytes 00 61 73 6d"),
        ],
    )
    def test_and_says_what_they_are(self, data: bytes, text: str) -> None:
        assert_refused(data, InvalidModuleReason.NOT_WASM, text)

    def test_a_real_component(self, wat: Wat) -> None:
        assert_refused(wat("(component)"), InvalidModuleReason.NOT_WASM, "component")


class TestRefusesFeaturesByName:
    @pytest.mark.parametrize(
        ("text", "feature"),
        [
            ("(module (type (struct (field i32))))", "gc"),
            ("(module (type (array i8)))", "gc"),
            ("(module (type (sub (func))))", "gc"),
            ("(module (rec (type (func)) (type (func))))", "gc"),
            ("(module (type (func (param anyref))))", "gc"),
            ("(module (type (func)) (type (func (param (ref null 0)))))", "function-references"),
            ("(module (func (param (ref extern))))", "function-references"),
            ("(module (func) (table 1 (ref func) (ref.func 0)))", "function-references"),
            ("(module (tag))", "exceptions"),
            ('(module (import "env" "failed" (tag)))', "exceptions"),
            ("(module (func (param exnref)))", "exceptions"),
            ("(module (memory 1 1 shared))", "threads"),
            ('(module (import "env" "memory" (memory 1 1 shared)))', "threads"),
            ("(module (memory i64 1))", "memory64"),
            ("(module (table i64 1 funcref))", "memory64"),
            ("(module (memory 1 (pagesize 1)))", "custom-page-sizes"),
            ("(module (type $f (func)) (type (cont $f)))", "stack-switching"),
            ('(module (type $f (func)) (import "a" "b" (func (exact (type $f)))))', "custom-descriptors"),
        ],
    )
    def test_that_are_switched_off(self, wat: Wat, text: str, feature: str) -> None:
        assert_refused(wat(text), InvalidModuleReason.UNSUPPORTED_FEATURE, f"({feature})")


class TestRefusesMalformed:
    @pytest.mark.parametrize(
        ("body", "text"),
        [
            (b"\x0f\x00", "unknown section id 15"),
            (b"\xff\x00", "unknown section id 255"),
            (b"\x01", "type section: it ends too soon"),
            (b"\x01\x05\x00", "has 5 bytes, and the file ends after 1"),
            (b"\x01\x80\x80\x80\x80\x80\x00", "longer than 5 bytes"),
            (b"\x01\xff\xff\xff\xff\x1f", "larger than 32 bits"),
            (b"\x01\xff\xff\xff\xff\x0f", "the file ends after 0"),
            (TYPES + TYPES, "type section comes twice"),
            (section(5, b"\x00") + TYPES, "type section comes out of order"),
            (section(1, b"\x00\x00"), "1 bytes too many"),
            (section(1, b"\x02\x60\x00\x00"), "promises 2 types"),
            (section(1, b"\xe8\x07\x60\x00\x00"), "promises 1000 types"),
            (section(1, b"\x01\x60\x01\x20\x00"), "unknown value type 0x20"),
            (section(1, b"\x01\x61\x00\x00"), "unknown form of type 0x61"),
            (section(2, b"\x01\x00\x00\x00\x00"), "type 0, and there are 0"),
            (section(2, b"\x01\x00\x00\x09\x00"), "unknown kind of import 0x09"),
            (section(2, b"\x01\x01\xff\x00\x03\x7f\x00"), "not valid UTF-8"),
            (section(2, b"\x01\x03\xed\xa0\x80\x00\x03\x7f\x00"), "not valid UTF-8"),
            (section(2, b"\x01\x00\x20\x03\x7f\x00"), "it ends too soon"),
            (section(2, b"\x01\x00\x00\x03\x7f\x05"), "unknown mutability 0x05"),
            (TYPES + section(3, b"\x01\x02") + section(10, b"\x01\x02\x00\x0b"), "type 2, and there are 2"),
            (TYPES + section(3, b"\x02\x00\x80"), "does not hold 2 numbers"),
            (TYPES + section(3, b"\x01\x80\x80\x80\x80\x80\x00"), "too long for 1 functions"),
            (TYPES + section(3, b"\x02\x80\x80\x80\x80\x80\x00\x00"), "does not hold 2 numbers"),
            (TYPES + section(3, b"\x01\xff\xff\xff\xff\x7f"), "larger than 32 bits"),
            (TYPES + section(3, b"\x01\x00"), "1 functions are declared, and 0 have code"),
            (section(10, b"\x01\x02\x00\x0b"), "0 functions are declared, and 1 have code"),
            (section(4, b"\x01\x7f\x00\x00"), "a table of i32"),
            (section(4, b"\x01\x70\x10\x00"), "unknown table flags 0x10"),
            (section(5, b"\x01\x01\x05\x04"), "maximum of 4, below its minimum of 5"),
            (section(5, b"\x01\x00\x01") + section(7, b"\x02\x01m\x02\x00\x01m\x02\x00"), "'m' comes twice"),
            (section(7, b"\x01\x01m\x02\x00"), "memory 0 is exported, and does not exist"),
            (section(7, b"\x01\x01f\x00\x07"), "func 7 is exported, and does not exist"),
            (section(7, b"\x01\x01t\x01\x00"), "table 0 is exported, and does not exist"),
            (section(7, b"\x01\x01g\x03\x00"), "global 0 is exported, and does not exist"),
            (section(7, b"\x01\x01x\x08\x00"), "unknown kind of export 0x08"),
            (section(8, b"\x03"), "function 3 does not exist"),
            (TYPES + section(3, b"\x01\x01") + section(8, b"\x00"), "must be () -> (), and is (i32) -> ()"),
            (section(12, b"\x02") + section(11, b"\x00"), "2 data segments are announced, and there are 0"),
            (section(0, b""), "custom section: it ends too soon"),
            (section(0, b"\x05abc"), "custom section: it ends too soon"),
            (section(0, b"\x01\xff"), "not valid UTF-8"),
            (section(10, b""), "code section: it ends too soon"),
        ],
    )
    def test_and_says_where(self, body: bytes, text: str) -> None:
        assert_refused(HEADER + body, InvalidModuleReason.MALFORMED, text)

    def test_every_truncation_of_a_module_but_those_between_harmless_sections(self, wat: Wat) -> None:
        data = wat(RICH)
        accepted = set()
        for length in range(8, len(data)):
            try:
                parse(data[:length])
            except InvalidModule:
                continue
            accepted.add(length)
        ends = section_ends(data)
        assert accepted <= ends
        assert len(ends - accepted) >= 5  # cut between "function" and "code"


def section_ends(data: bytes) -> set[int]:
    ends, at = {8}, 8
    while at < len(data):
        size, shift, at = 0, 0, at + 1
        while True:
            byte = data[at]
            size |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                break
        at += size
        ends.add(at)
    return ends


class TestLimits:
    @pytest.mark.parametrize(
        ("body", "text"),
        [
            (section(1, leb(MAX_TYPES + 1) + bytes(3 * MAX_TYPES + 3)), "20001 types"),
            (section(2, leb(MAX_IMPORTS + 1)), "10001 imports"),
            (section(3, leb(MAX_FUNCTIONS + 1)), "1000001 functions"),
            (section(7, leb(MAX_EXPORTS + 1)), "20001 exports"),
            (section(4, leb(101)), "101 tables"),
            (section(5, leb(101)), "101 memories"),
            (section(1, b"\x01\x60" + leb(1001) + b"\x7f" * 1001 + b"\x00"), "1001 parameters"),
            (section(2, b"\x01" + leb(MAX_NAME_BYTES + 1) + b"a" * 5000), "4097 bytes"),
            (section(0, leb(MAX_NAME_BYTES + 1) + b"a" * 5000), "4097 bytes"),
            (section(0, b"\x00") * (MAX_CUSTOM_SECTIONS + 1), "more than 1000 custom sections"),
            (section(5, b"\x01\x00" + leb(65537)), "65537 pages"),
            (section(5, b"\x01\x01\x01" + leb(65537)), "65537 pages"),
            (section(2, leb(101) + b"\x00\x00\x02\x00\x01" * 101), "more than 100 memories"),
            (section(2, leb(101) + b"\x00\x00\x01\x70\x00\x01" * 101), "more than 100 tables"),
        ],
    )
    def test_refuses_more_than_any_module_needs(self, body: bytes, text: str) -> None:
        assert_refused(HEADER + body, InvalidModuleReason.LIMIT, text)

    def test_reads_a_memory_of_exactly_4_gib(self) -> None:
        assert parse(HEADER + section(5, b"\x01\x00" + leb(65536))).memories[0].minimum_bytes == 4 << 30

    def test_reads_names_and_functions_up_to_the_cap(self) -> None:
        name = leb(MAX_NAME_BYTES) + b"a" * MAX_NAME_BYTES
        count = MAX_FUNCTIONS
        functions = section(3, leb(count) + b"\x80\x00" * count) + section(10, leb(count))
        module = parse(HEADER + section(0, name) + TYPES + functions)
        assert module.function_count == MAX_FUNCTIONS
        assert len(module.custom_sections[0].name) == MAX_NAME_BYTES

    def test_does_not_look_into_bodies_or_data(self) -> None:
        """32 MiB of code and data take no more than the few numbers around them."""
        filler = b"\xff" * (16 << 20)
        module = parse(HEADER + section(10, b"\x00" + filler) + section(11, b"\x09" + filler))
        assert module.function_count == 0


class TestShown:
    def test_escapes_what_a_terminal_or_a_log_would_act_on(self) -> None:
        assert shown("a\n\x1b[31m\u202e'") == '"a\\n\\x1b[31m\\u202e\'"'

    def test_cuts_long_names(self) -> None:
        assert shown("x" * 100_000) == f"'{'x' * 80}'…"


class TestSurvives:
    @settings(max_examples=500, deadline=None)
    @given(st.binary(max_size=200))
    def test_any_bytes_behind_the_header(self, body: bytes) -> None:
        assert parses_or_refuses(HEADER + body)

    @settings(max_examples=500, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 15), st.binary(max_size=60)), max_size=8))
    def test_any_content_in_well_formed_sections(self, sections: list[tuple[int, bytes]]) -> None:
        assert parses_or_refuses(HEADER + b"".join(section(*each) for each in sections))

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_sections_in_order_with_small_numbers(self, data: st.DataObject) -> None:
        """Small bytes mean small counts and indices, so these get further than random ones."""
        small = st.lists(st.integers(0, 8) | st.sampled_from([0x60, 0x70, 0x7F]), max_size=30).map(bytes)
        ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 10, 11]
        body = b"".join(section(each, data.draw(small)) for each in ids if data.draw(st.booleans()))
        assert parses_or_refuses(HEADER + body)

    def test_thousands_of_mutations_of_real_modules(self, wat: Wat) -> None:
        chance = random.Random(20)
        for data in (wat(RICH), *(smith(seed) for seed in range(10))):
            for _ in range(1_000):
                assert parses_or_refuses(mutated(data, chance))

    def test_agrees_with_wasm_tools_on_generated_modules(self) -> None:
        """Modules by wasm-smith are valid and odd; wasm-tools' own reader says what is in them."""
        read = 0
        for seed in range(60):
            data = smith(seed)
            module = parse(data)
            shown_text = subprocess.run(
                [wasm_tools(), "print", "--skeleton"], input=data, capture_output=True, check=True
            ).stdout.decode()
            assert len(module.imports) == shown_text.count("\n  (import ")
            assert len(module.exports) == shown_text.count("\n  (export ")
            assert module.has_start == ("\n  (start " in shown_text)
            read += bool(module.imports or module.exports)
        assert read > 20


SMITH_FEATURES_OFF = (
    "--gc-enabled=false",
    "--exceptions-enabled=false",
    "--threads-enabled=false",
    "--memory64-enabled=false",
    "--custom-page-sizes-enabled=false",
    "--compact-imports-enabled=false",
)


def smith(seed: int) -> bytes:
    """A valid module made by wasm-smith; the same for the same seed."""
    entropy = random.Random(seed).randbytes(3_000)
    command = [str(wasm_tools()), "smith", *SMITH_FEATURES_OFF]
    return subprocess.run(command, input=entropy, capture_output=True, check=True).stdout


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Flips, cuts, repeats or moves a few bytes, mostly near the front, where the sections are."""
    copy = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(8, len(copy))
        change = chance.randrange(4)
        if change == 0:
            copy[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            copy[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif change == 2:
            del copy[at : at + chance.randint(1, 4)]
        else:
            copy[at:at] = copy[at : at + chance.randint(1, 16)]
        if len(copy) <= 9:
            break
    return bytes(copy)


def parses_or_refuses(data: bytes) -> bool:
    """False cannot be returned: anything but InvalidModule fails the test with its traceback."""
    try:
        module = parse(data)
    except InvalidModule as error:
        return bool(str(error))
    types = [each.type for each in module.imports] + [each.type for each in module.exports]
    return all(str(each) for each in types)
