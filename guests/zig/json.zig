//! JSON as it was written. A value is the slice of the input that holds it: nothing is copied or
//! converted, so numbers keep every digit, objects keep the order of their keys, and the memory
//! needed is that of the text.

const std = @import("std");
const failure = @import("failure.zig");
const Failed = failure.Failed;
const fail = failure.fail;

/// As deep as Kubernetes itself reads JSON.
pub const max_depth = 10_000;

pub const Kind = enum {
    object,
    array,
    string,
    number,
    boolean,
    null,

    /// With its article, for error messages.
    pub fn name(kind: Kind) []const u8 {
        return switch (kind) {
            .object => "an object",
            .array => "an array",
            .string => "a string",
            .number => "a number",
            .boolean => "a boolean",
            .null => "null",
        };
    }
};

/// Checks the whole of `text`, which everything else here relies on, and returns the value in it.
/// Fails where it is not UTF-8 or not one document of RFC 8259, or nested deeper than `max_depth`.
pub fn parse(text: []const u8) Failed!Value {
    if (text.len == 0) return fail(&.{"standard input is empty"});
    var checker: Checker = .{ .text = text };
    checker.document() catch |err| {
        var digits: [20]u8 = undefined;
        const what = switch (err) {
            error.NotJson => "standard input is not a JSON document: something unexpected at byte ",
            error.TooDeep => "standard input is nested too deeply at byte ",
        };
        return fail(&.{ what, decimal(&digits, checker.at) });
    };
    if (!checker.ascii and !std.unicode.utf8ValidateSlice(text)) {
        return fail(&.{"standard input is not UTF-8"});
    }
    const start = skipSpace(text, 0);
    return .{ .text = text[start..skipValue(text, start)] };
}

/// One value of a document that was checked.
pub const Value = struct {
    /// The value as it was written, without space around it.
    text: []const u8,

    pub fn kind(value: Value) Kind {
        return switch (value.text[0]) {
            '{' => .object,
            '[' => .array,
            '"' => .string,
            't', 'f' => .boolean,
            'n' => .null,
            else => .number,
        };
    }

    /// The member named `key`, or null where there is none. Fails where there are two, since readers
    /// differ in which one they take, and where `value` is not an object.
    pub fn get(value: Value, key: []const u8) Failed!?Value {
        if (value.kind() != .object) return fail(&.{ "\"", key, "\" was looked for in ", value.kind().name() });
        var found: ?Value = null;
        var iterator = value.members();
        while (iterator.next()) |member| {
            if (!member.key.isString(key)) continue;
            if (found != null) return fail(&.{ "\"", key, "\" occurs twice in the same object" });
            found = member.value;
        }
        return found;
    }

    /// The value of this kind at `path` (keys joined by dots), or null where it, or an object on the
    /// way to it, is absent or null. Fails where anything else stands there.
    pub fn find(value: Value, wanted: Kind, path: []const u8) Failed!?Value {
        var at = value;
        var keys = std.mem.splitScalar(u8, path, '.');
        while (keys.next()) |key| {
            at = try at.get(key) orelse return null;
            const last = keys.index == null;
            const expected: Kind = if (last) wanted else .object;
            if (at.kind() == expected) continue;
            if (at.kind() == .null) return null;
            const here = if (keys.index) |index| path[0 .. index - 1] else path;
            return fail(&.{ here, ": expected ", expected.name(), ", found ", at.kind().name() });
        }
        return at;
    }

    /// As `find`, and fails where there is none.
    pub fn require(value: Value, wanted: Kind, path: []const u8) Failed!Value {
        return try value.find(wanted, path) orelse
            fail(&.{ path, ": expected ", wanted.name(), ", found nothing" });
    }

    /// Whether this is the string `text`, however it is escaped.
    pub fn isString(value: Value, text: []const u8) bool {
        if (value.kind() != .string) return false;
        const written = value.text[1 .. value.text.len - 1];
        // An escape is never shorter than what it stands for.
        if (written.len < text.len) return false;
        var characters: Characters = .{ .text = written };
        var rest = text;
        while (characters.next()) |character| {
            if (!std.mem.startsWith(u8, rest, character.slice())) return false;
            rest = rest[character.len..];
        }
        return rest.len == 0;
    }

    /// What this string says, unescaped. A lone surrogate becomes U+FFFD, as in Go. The caller has
    /// made sure that it is a string, and owns the copy.
    pub fn decode(value: Value, allocator: std.mem.Allocator) error{OutOfMemory}![]u8 {
        std.debug.assert(value.kind() == .string);
        var characters: Characters = .{ .text = value.text[1 .. value.text.len - 1] };
        const decoded = try allocator.alloc(u8, characters.text.len);
        var len: usize = 0;
        while (characters.next()) |character| {
            @memcpy(decoded[len..][0..character.len], character.slice());
            len += character.len;
        }
        return allocator.realloc(decoded, len);
    }

    /// The members of this object, in their order. The caller has made sure that it is one.
    pub fn members(value: Value) Members {
        std.debug.assert(value.kind() == .object);
        return .{ .text = value.text };
    }

    /// The elements of this array, in their order. The caller has made sure that it is one.
    pub fn items(value: Value) Items {
        std.debug.assert(value.kind() == .array);
        return .{ .text = value.text };
    }
};

pub const Member = struct {
    /// A string.
    key: Value,
    value: Value,
};

pub const Members = struct {
    text: []const u8,
    at: usize = 1,

    pub fn next(members: *Members) ?Member {
        const key = nextValue(members.text, &members.at) orelse return null;
        const value = nextValue(members.text, &members.at) orelse unreachable;
        return .{ .key = key, .value = value };
    }
};

pub const Items = struct {
    text: []const u8,
    at: usize = 1,

    pub fn next(items: *Items) ?Value {
        return nextValue(items.text, &items.at);
    }
};

/// The next value of an object or array, a key being one, too; null at its end.
fn nextValue(text: []const u8, at: *usize) ?Value {
    var start = skipSpace(text, at.*);
    if (text[start] == ',' or text[start] == ':') start = skipSpace(text, start + 1);
    if (text[start] == '}' or text[start] == ']') return null;
    at.* = skipValue(text, start);
    return .{ .text = text[start..at.*] };
}

fn skipSpace(text: []const u8, from: usize) usize {
    var at = from;
    while (at < text.len and isSpace(text[at])) at += 1;
    return at;
}

fn isSpace(byte: u8) bool {
    return byte == ' ' or byte == '\n' or byte == '\r' or byte == '\t';
}

/// The index after the value at `from`.
fn skipValue(text: []const u8, from: usize) usize {
    return switch (text[from]) {
        '"' => skipString(text, from),
        '{', '[' => skipContainer(text, from),
        else => skipScalar(text, from),
    };
}

fn skipContainer(text: []const u8, from: usize) usize {
    var at = from;
    var depth: usize = 0;
    while (true) {
        const byte = text[at];
        if (byte == '"') {
            at = skipString(text, at);
            continue;
        }
        at += 1;
        switch (byte) {
            '{', '[' => depth += 1,
            '}', ']' => {
                depth -= 1;
                if (depth == 0) return at;
            },
            else => {},
        }
    }
}

fn skipScalar(text: []const u8, from: usize) usize {
    var at = from;
    while (at < text.len) : (at += 1) {
        switch (text[at]) {
            '0'...'9', 'a'...'z', 'E', '+', '-', '.' => {},
            else => break,
        }
    }
    return at;
}

/// The index after the string whose opening quote stands at `from`.
fn skipString(text: []const u8, from: usize) usize {
    var at = from + 1;
    while (true) {
        at = nextSpecial(text, at);
        switch (text[at]) {
            '"' => return at + 1,
            '\\' => at += 2,
            else => at += 1,
        }
    }
}

/// The index of the next quote, backslash, control character or byte of a non-ASCII character, which
/// are what ends or interrupts a string; the text's length if there is none. Takes eight bytes at a
/// time: reading strings is most of the work.
fn nextSpecial(text: []const u8, from: usize) usize {
    const each: u64 = 0x0101010101010101;
    var at = from;
    while (at + 8 <= text.len) : (at += 8) {
        const word = std.mem.readInt(u64, text[at..][0..8], .little);
        const quote = word ^ each * '"';
        const backslash = word ^ each * '\\';
        // A byte below n borrows from its highest bit when n is taken away. The lowest such bit is
        // always right; those above it may be wrong, and are not looked at.
        const below = (quote -% each) & ~quote | (backslash -% each) & ~backslash | (word -% each * ' ') & ~word;
        const special = (below | word) & each * 0x80;
        if (special != 0) return at + @ctz(special) / 8;
    }
    while (at < text.len) : (at += 1) {
        if (isSpecial(text[at])) break;
    }
    return at;
}

fn isSpecial(byte: u8) bool {
    return byte == '"' or byte == '\\' or byte < ' ' or byte >= 0x80;
}

/// One character of a string, as UTF-8; or one byte of it, where it is not escaped.
const Character = struct {
    bytes: [4]u8,
    len: u3,

    fn of(codepoint: u21) Character {
        var character: Character = .{ .bytes = undefined, .len = undefined };
        character.len = std.unicode.utf8Encode(codepoint, &character.bytes) catch unreachable;
        return character;
    }

    fn slice(character: *const Character) []const u8 {
        return character.bytes[0..character.len];
    }
};

/// The characters between the quotes of a string.
const Characters = struct {
    text: []const u8,
    at: usize = 0,

    fn next(characters: *Characters) ?Character {
        if (characters.at == characters.text.len) return null;
        const byte = characters.take();
        if (byte != '\\') return .{ .bytes = .{ byte, 0, 0, 0 }, .len = 1 };
        return switch (characters.take()) {
            'b' => .of(8),
            'f' => .of(12),
            'n' => .of('\n'),
            'r' => .of('\r'),
            't' => .of('\t'),
            'u' => .of(characters.takeCodepoint()),
            else => |same| .of(same),
        };
    }

    fn take(characters: *Characters) u8 {
        defer characters.at += 1;
        return characters.text[characters.at];
    }

    fn takeCodepoint(characters: *Characters) u21 {
        const first = characters.takeUnit();
        if (!std.unicode.utf16IsHighSurrogate(first)) {
            return if (std.unicode.utf16IsLowSurrogate(first)) std.unicode.replacement_character else first;
        }
        const before = characters.at;
        if (std.mem.startsWith(u8, characters.text[before..], "\\u")) {
            characters.at += 2;
            const second = characters.takeUnit();
            if (std.unicode.utf16IsLowSurrogate(second)) {
                return 0x10000 + ((@as(u21, first) & 0x3ff) << 10 | (second & 0x3ff));
            }
        }
        characters.at = before;
        return std.unicode.replacement_character;
    }

    fn takeUnit(characters: *Characters) u16 {
        var unit: u16 = 0;
        for (0..4) |_| {
            const digit = std.fmt.charToDigit(characters.take(), 16) catch unreachable;
            unit = unit << 4 | digit;
        }
        return unit;
    }
};

/// Checks a document without recursion, so that no input can exhaust the stack.
const Checker = struct {
    text: []const u8,
    at: usize = 0,
    depth: usize = 0,
    ascii: bool = true,
    /// For each level whether it is an object. Static, since the stack is small.
    var objects: [max_depth]bool = undefined;

    const Error = error{ NotJson, TooDeep };

    fn document(checker: *Checker) Error!void {
        while (true) {
            if (try checker.valueStart()) continue;
            if (!try checker.valueEnd()) break;
        }
        checker.space();
        if (checker.at != checker.text.len) return error.NotJson;
    }

    /// Takes a scalar, an empty container, or the start of a container up to its first value: then true.
    fn valueStart(checker: *Checker) Error!bool {
        checker.space();
        switch (checker.peek()) {
            '{' => {
                try checker.open(true);
                if (checker.closes('}')) return false;
                try checker.key();
                return true;
            },
            '[' => {
                try checker.open(false);
                return !checker.closes(']');
            },
            '"' => try checker.string(),
            't' => try checker.literal("true"),
            'f' => try checker.literal("false"),
            'n' => try checker.literal("null"),
            else => try checker.number(),
        }
        return false;
    }

    /// Takes what follows a value: true if that asks for another one.
    fn valueEnd(checker: *Checker) Error!bool {
        while (checker.depth > 0) {
            const in_object = objects[checker.depth - 1];
            if (checker.closes(if (in_object) '}' else ']')) continue;
            try checker.expect(',');
            if (in_object) try checker.key();
            return true;
        }
        return false;
    }

    fn open(checker: *Checker, is_object: bool) Error!void {
        if (checker.depth == max_depth) return error.TooDeep;
        objects[checker.depth] = is_object;
        checker.depth += 1;
        checker.at += 1;
    }

    fn closes(checker: *Checker, bracket: u8) bool {
        checker.space();
        if (checker.peek() != bracket) return false;
        checker.at += 1;
        checker.depth -= 1;
        return true;
    }

    fn key(checker: *Checker) Error!void {
        checker.space();
        try checker.string();
        checker.space();
        try checker.expect(':');
    }

    fn string(checker: *Checker) Error!void {
        try checker.expect('"');
        while (true) {
            checker.at = nextSpecial(checker.text, checker.at);
            const byte = checker.peek();
            if (byte < ' ') return error.NotJson; // the end of the text, too
            checker.at += 1;
            switch (byte) {
                '"' => return,
                '\\' => try checker.escape(),
                else => checker.ascii = false,
            }
        }
    }

    fn escape(checker: *Checker) Error!void {
        const byte = checker.peek();
        switch (byte) {
            '"', '\\', '/', 'b', 'f', 'n', 'r', 't', 'u' => checker.at += 1,
            else => return error.NotJson,
        }
        if (byte != 'u') return;
        for (0..4) |_| {
            if (!std.ascii.isHex(checker.peek())) return error.NotJson;
            checker.at += 1;
        }
    }

    fn number(checker: *Checker) Error!void {
        checker.optional('-');
        if (checker.peek() == '0') checker.at += 1 else try checker.digits();
        if (checker.peek() == '.') {
            checker.at += 1;
            try checker.digits();
        }
        if (checker.peek() == 'e' or checker.peek() == 'E') {
            checker.at += 1;
            if (checker.peek() == '+') checker.at += 1 else checker.optional('-');
            try checker.digits();
        }
    }

    fn digits(checker: *Checker) Error!void {
        if (!std.ascii.isDigit(checker.peek())) return error.NotJson;
        while (std.ascii.isDigit(checker.peek())) checker.at += 1;
    }

    fn literal(checker: *Checker, name: []const u8) Error!void {
        for (name) |byte| try checker.expect(byte);
    }

    fn expect(checker: *Checker, byte: u8) Error!void {
        if (checker.peek() != byte) return error.NotJson;
        checker.at += 1;
    }

    fn optional(checker: *Checker, byte: u8) void {
        if (checker.peek() == byte) checker.at += 1;
    }

    fn space(checker: *Checker) void {
        checker.at = skipSpace(checker.text, checker.at);
    }

    /// The next byte; NUL, which JSON has nowhere, at the end.
    fn peek(checker: *const Checker) u8 {
        return if (checker.at < checker.text.len) checker.text[checker.at] else 0;
    }
};

/// `number` in decimal, at the end of `buffer`. Formatting of std.fmt is ten times the code.
fn decimal(buffer: *[20]u8, number: usize) []const u8 {
    var rest = number;
    var start = buffer.len;
    while (true) {
        start -= 1;
        buffer[start] = '0' + @as(u8, @intCast(rest % 10));
        rest /= 10;
        if (rest == 0) return buffer[start..];
    }
}
