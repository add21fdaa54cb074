//! Why a module gives no answer, in words: becomes `{"error": "…"}`.

const std = @import("std");
const heap = @import("heap.zig");

pub const Failed = error{Failed};

/// What `fail` was told last.
pub var message: []const u8 = "the module failed without saying why";

/// Remembers the text that `parts` make together, and returns the error that carries it upwards:
///
///     return bulkhead.fail(&.{ "settings.", key, " must not be negative" });
pub fn fail(parts: []const []const u8) Failed {
    message = std.mem.concat(heap.allocator, u8, parts) catch "out of memory";
    return error.Failed;
}
