//! Helpers for modules that answer Kubernetes reviews: `{"request": …, "settings": …}` on standard
//! input, `{"response": …}` or `{"error": "…"}` on standard output. A whole module:
//!
//!     const bulkhead = @import("bulkhead");
//!     pub const panic = bulkhead.panic;
//!
//!     export fn authz() void {
//!         bulkhead.answer(decide);
//!     }
//!
//!     fn decide(call: bulkhead.Call, out: *bulkhead.Writer) !void {
//!         const user = try call.request.require(.string, "spec.user");
//!         try out.print(
//!             \\{{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","status":{{"allowed":{}}}}}
//!         , .{user.isString("alice")});
//!     }
//!
//! docs/module-specification.md describes the reviews, and what a module gets and may do.

const std = @import("std");
const wasi = std.os.wasi;

const failure = @import("failure.zig");
const heap = @import("heap.zig");
const json = @import("json.zig");

pub const AdmissionReview = @import("admission.zig").AdmissionReview;
pub const Base64 = @import("base64.zig").Base64;
pub const Failed = failure.Failed;
pub const Kind = json.Kind;
pub const Member = json.Member;
pub const Value = json.Value;
pub const Writer = std.Io.Writer;
pub const allocator = heap.allocator;
pub const fail = failure.fail;
pub const parse = json.parse;

/// What a module's main file declares as its `panic`: a mistake in the module traps, which the host
/// sees as a failed run. The default prints where it happened, at 40 KB of code for each module.
pub const panic = std.debug.no_panic;

/// What a module is asked.
pub const Call = struct {
    /// The review, an object.
    request: Value,
    /// The module's settings from the configuration; null where it has none.
    settings: ?Value,

    /// Fails unless the review is of this kind: answering another one would be a guess.
    pub fn expect(call: Call, comptime api_version: []const u8, comptime kind: []const u8) Failed!void {
        const same_version = (try call.request.require(.string, "apiVersion")).isString(api_version);
        const same_kind = (try call.request.require(.string, "kind")).isString(kind);
        if (!same_version or !same_kind) return fail(&.{"expected a " ++ kind ++ " of " ++ api_version});
    }
};

/// Where output is gathered. As much as a decision without a patch ever is: one write for each run.
var output_buffer: [16 << 10]u8 = undefined;
const frame_start = "{\"response\":";
const frame_end = "}";

/// The body of an entry point: reads the call, has `decide` write the response (JSON), and flushes.
/// Where `decide` fails, the answer is `{"error": …}` instead, with the text that `fail` was given or
/// the name of any other error. Traps only where output cannot be written, or was already on its way
/// when `decide` failed.
pub fn answer(comptime decide: fn (Call, *Writer) anyerror!void) void {
    var out: Writer = .{ .vtable = &.{ .drain = drain }, .buffer = &output_buffer };
    tryAnswer(decide, &out) catch |err| {
        if (drained) @trap();
        out.end = 0;
        const text = switch (err) {
            error.Failed => failure.message,
            error.OutOfMemory => "out of memory: the review is too large for this module's memory limit",
            else => @errorName(err),
        };
        writeError(&out, text) catch @trap();
    };
    out.flush() catch @trap();
}

fn tryAnswer(comptime decide: fn (Call, *Writer) anyerror!void, out: *Writer) anyerror!void {
    const call = try readCall();
    try out.writeAll(frame_start);
    try decide(call, out);
    try out.writeAll(frame_end);
}

fn writeError(out: *Writer, text: []const u8) Writer.Error!void {
    try out.writeAll("{\"error\":");
    try writeString(out, text);
    try out.writeAll(frame_end);
}

/// Writes `text`, which is UTF-8, as a JSON string.
pub fn writeString(out: *Writer, text: []const u8) Writer.Error!void {
    return std.json.Stringify.encodeJsonString(text, .{}, out);
}

fn readCall() (Failed || error{OutOfMemory})!Call {
    const document = try parse(try readInput());
    if (document.kind() != .object) return fail(&.{"standard input: expected an object with the key \"request\""});
    const settings = try document.get("settings");
    return .{
        .request = try document.require(.object, "request"),
        .settings = if (settings) |value| (if (value.kind() == .null) null else value) else null,
    };
}

/// Room for a usual review at once; then it doubles.
const first_input_bytes = 32 << 10;

fn readInput() (Failed || error{OutOfMemory})![]u8 {
    var input = try allocator.alloc(u8, first_input_bytes);
    var len: usize = 0;
    while (true) {
        if (len == input.len) input = try allocator.realloc(input, input.len * 2);
        const room: wasi.iovec_t = .{ .base = input[len..].ptr, .len = input.len - len };
        var count: usize = 0;
        if (wasi.fd_read(0, @ptrCast(&room), 1, &count) != .SUCCESS) {
            return fail(&.{"standard input cannot be read"});
        }
        if (count == 0) return allocator.realloc(input, len);
        len += count;
    }
}

/// Whether output was sent, which cannot be taken back.
var drained = false;

fn drain(out: *Writer, data: []const []const u8, splat: usize) Writer.Error!usize {
    drained = true;
    try writeOutput(out.buffered());
    out.end = 0;
    var count: usize = 0;
    for (data, 1..) |bytes, number| {
        const times = if (number == data.len) splat else 1;
        for (0..times) |_| try writeOutput(bytes);
        count += bytes.len * times;
    }
    return count;
}

fn writeOutput(bytes: []const u8) Writer.Error!void {
    var rest = bytes;
    while (rest.len > 0) {
        const piece: wasi.ciovec_t = .{ .base = rest.ptr, .len = rest.len };
        var count: usize = 0;
        if (wasi.fd_write(1, @ptrCast(&piece), 1, &count) != .SUCCESS or count == 0) return error.WriteFailed;
        rest = rest[count..];
    }
}
