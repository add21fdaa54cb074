//! Tests of the library, built for WASI like the modules and run in wasmtime by
//! tests/integration/test_guest_library.py.

const std = @import("std");
const bulkhead = @import("bulkhead.zig");
const failure = @import("failure.zig");
const json = @import("json.zig");
const testing = std.testing;

test "accepts what RFC 8259 allows" {
    const documents = [_][]const u8{
        "null",                           "true",                       "false",                   "0",
        "-0",                             "-12.50e+3",                  "1E-9",                    "12345678901234567890",
        "1e999999",                       "\"\"",                       "\"\\u0000\"",             "\"\\ud800\"",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"",
        "\"\u{7f}ü€😀\"",
        " [ ] ",                          "\r\n\t{ }",                  "[1,[2,{\"a\":[]}],\"\"]", "{\"a\":{\"a\":null}}",
        "{\"\":0,\"\":0}",                "[\"abcdefghijklmnop\\nq\"]",
    };
    for (documents) |document| {
        const value = try json.parse(document);
        try testing.expectEqualStrings(std.mem.trim(u8, document, " \r\n\t"), value.text);
    }
}

test "refuses what is not JSON" {
    const documents = [_][]const u8{
        "",              " ",         "nul",          "nulll",            "True",                 "01",           "-",
        "+1",            ".5",        "1.",           "1e",               "1e+",                  "0x1",          "NaN",
        "Infinity",      "\"",        "\"\\\"",       "\"\\x\"",          "\"\\u12g4\"",          "\"\\u12",      "\"\n\"",
        "\"\x00\"",      "'a'",       "[",            "]",                "[1",                   "[1,]",         "[,1]",
        "[1 2]",         "[1}",       "{",            "{\"a\"}",          "{\"a\":}",             "{\"a\":1,}",   "{a:1}",
        "{1:1}",         "{\"a\" 1}", "{\"a\":1]",    "1 2",              "{}{}",                 "[]x",          "/**/1",
        "\xef\xbb\xbf1", "\"\xff\"",  "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xe2\x82\"", "1\xa0",
    };
    for (documents) |document| {
        try testing.expectError(error.Failed, json.parse(document));
    }
}

test "says where a document stops being JSON" {
    try testing.expectError(error.Failed, json.parse("{\"a\": tru}"));
    try testing.expectEqualStrings(
        "standard input is not a JSON document: something unexpected at byte 9",
        failure.message,
    );
}

test "refuses nesting beyond the limit, and takes what is just within" {
    const opened: [json.max_depth]u8 = @splat('[');
    const closed: [json.max_depth]u8 = @splat(']');
    const deepest = opened ++ closed;
    const value = try json.parse(&deepest);
    try testing.expectEqual(deepest.len, value.text.len);
    try testing.expectError(error.Failed, json.parse("[" ++ deepest ++ "]"));
}

test "finds values along a path, and tells absent from wrong" {
    const document = try json.parse(
        \\{"a": {"b": {"c": "x\u0079"}, "n": null, "d\u002ee": 1.10}, "a2": []}
    );
    try testing.expect((try document.require(.string, "a.b.c")).isString("xy"));
    try testing.expectEqual(null, try document.find(.string, "a.b.z"));
    try testing.expectEqual(null, try document.find(.string, "a.n"));
    try testing.expectEqual(null, try document.find(.string, "a.n.z"));
    try testing.expectEqualStrings("1.10", (try (try document.get("a")).?.get("d.e")).?.text);

    try testing.expectError(error.Failed, document.require(.string, "a.b.z"));
    try testing.expectEqualStrings("a.b.z: expected a string, found nothing", failure.message);
    try testing.expectError(error.Failed, document.find(.number, "a.b.c"));
    try testing.expectEqualStrings("a.b.c: expected a number, found a string", failure.message);
    try testing.expectError(error.Failed, document.find(.number, "a2.b.c"));
    try testing.expectEqualStrings("a2: expected an object, found an array", failure.message);
    try testing.expectError(error.Failed, (try document.get("a2")).?.get("b"));
    try testing.expectEqualStrings("\"b\" was looked for in an array", failure.message);
}

test "refuses an object that says two things" {
    const document = try json.parse(
        \\{"allowed": false, "other": 1, "a\u006clowed": true}
    );
    try testing.expectError(error.Failed, document.get("allowed"));
    try testing.expect(try document.get("other") != null);
}

test "compares and decodes strings by what they say" {
    const written = try json.parse(
        \\"a\"\\\/\b\f\n\r\t\u00fc\u20AC\ud83d\ude00 ü😀 \ud83d!\ude00"
    );
    const said = "a\"\\/\x08\x0c\n\r\tü€😀 ü😀 \u{fffd}!\u{fffd}";
    try testing.expect(written.isString(said));
    try testing.expect(!written.isString(said ++ "."));
    try testing.expect(!written.isString(said[0 .. said.len - 1]));
    try testing.expectEqualStrings(said, try written.decode(bulkhead.allocator));
    try testing.expect(!(try json.parse("1")).isString("1"));
    try testing.expect((try json.parse("\"\"")).isString(""));
}

test "walks objects and arrays in order" {
    const document = try json.parse(
        \\ {"b" : [1 , {"x":"]"}, [[]], "," ] ,"a":-2.50 }
    );
    var members = document.members();
    const first = members.next().?;
    try testing.expect(first.key.isString("b"));
    var items = first.value.items();
    for ([_][]const u8{ "1", "{\"x\":\"]\"}", "[[]]", "\",\"" }) |expected| {
        try testing.expectEqualStrings(expected, items.next().?.text);
    }
    try testing.expectEqual(null, items.next());
    try testing.expectEqualStrings("-2.50", members.next().?.value.text);
    try testing.expectEqual(null, members.next());

    var none = (try json.parse("{ }")).members();
    try testing.expectEqual(null, none.next());
}

test "is read by std.json, too" {
    const User = struct { name: []const u8, groups: []const []const u8 = &.{} };
    const document = try json.parse(
        \\{"user": {"name": "alice", "groups": ["a", "b"], "uid": "7"}}
    );
    const text = (try document.require(.object, "user")).text;
    const user = try std.json.parseFromSliceLeaky(User, bulkhead.allocator, text, .{ .ignore_unknown_fields = true });
    try testing.expectEqualStrings("alice", user.name);
    try testing.expectEqual(2, user.groups.len);
}

test "encodes base64 alike however the text is cut" {
    var text: [10_000]u8 = undefined;
    for (&text, 0..) |*byte, index| byte.* = @truncate(index *% 31 +% index / 256);
    var expected_buffer: [std.base64.standard.Encoder.calcSize(text.len)]u8 = undefined;
    var buffer: [expected_buffer.len]u8 = undefined;
    for ([_]usize{ 0, 1, 2, 3, 4, 5, 3071, 3072, 3073, text.len }) |len| {
        const expected = std.base64.standard.Encoder.encode(&expected_buffer, text[0..len]);
        for ([_]usize{ 1, 2, 3, 5, 3072, text.len }) |step| {
            var out: std.Io.Writer = .fixed(&buffer);
            var base64: bulkhead.Base64 = .{ .out = &out };
            var at: usize = 0;
            while (at < len) : (at += step) try base64.write(text[at..@min(at + step, len)]);
            try base64.finish();
            try testing.expectEqualStrings(expected, out.buffered());
        }
    }
}

test "writes strings that are read back the same" {
    var buffer: [200]u8 = undefined;
    var out: std.Io.Writer = .fixed(&buffer);
    const said = "\x00\x1f \"quoted\" \\ \n ü😀";
    try bulkhead.writeString(&out, said);
    try testing.expect((try json.parse(out.buffered())).isString(said));
}

test "gives back the last allocation, grows it in place, and keeps others apart" {
    const allocator = bulkhead.allocator;
    const first = try allocator.alloc(u8, 100);
    allocator.free(first);
    var second = try allocator.alloc(u8, 100);
    try testing.expectEqual(first.ptr, second.ptr);

    @memset(second, 'x');
    const start = second.ptr;
    second = try allocator.realloc(second, 1 << 20);
    try testing.expectEqual(start, second.ptr);
    try testing.expectEqual('x', second[99]);

    const foreign = @wasmMemoryGrow(0, 1);
    try testing.expect(foreign > 0);
    const third = try allocator.alignedAlloc(u8, .@"64", 1 << 20);
    try testing.expect(@intFromPtr(third.ptr) >= (@as(usize, @intCast(foreign)) + 1) << 16);
    try testing.expectEqual(0, @intFromPtr(third.ptr) % 64);
    second = try allocator.realloc(second, 2 << 20);
    try testing.expect(second.ptr != start);
    try testing.expectEqual('x', second[99]);

    try testing.expectError(error.OutOfMemory, allocator.alloc(u8, 3 << 30));
    try testing.expectError(error.OutOfMemory, allocator.alloc(u8, std.math.maxInt(usize) - 100));
}
