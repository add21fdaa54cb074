//! Base64 of a text that comes in pieces.

const std = @import("std");
const Writer = std.Io.Writer;

pub const Base64 = struct {
    out: *Writer,
    /// What did not fill a group of three bytes yet.
    pending: [3]u8 = undefined,
    pending_len: usize = 0,

    const encoder = std.base64.standard.Encoder;

    pub fn write(base64: *Base64, bytes: []const u8) Writer.Error!void {
        var rest = bytes;
        while (base64.pending_len > 0 and rest.len > 0) {
            base64.pending[base64.pending_len] = rest[0];
            base64.pending_len += 1;
            rest = rest[1..];
            if (base64.pending_len == 3) try base64.finish();
        }
        while (rest.len >= 3) {
            const groups: usize = @min(rest.len / 3, 1024);
            _ = encoder.encode(try base64.out.writableSlice(groups * 4), rest[0 .. groups * 3]);
            rest = rest[groups * 3 ..];
        }
        if (rest.len > 0) {
            @memcpy(base64.pending[0..rest.len], rest);
            base64.pending_len = rest.len;
        }
    }

    /// Writes what is pending, padded. Comes after the last `write`.
    pub fn finish(base64: *Base64) Writer.Error!void {
        const len = encoder.calcSize(base64.pending_len);
        _ = encoder.encode(try base64.out.writableSlice(len), base64.pending[0..base64.pending_len]);
        base64.pending_len = 0;
    }
};
