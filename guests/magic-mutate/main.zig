//! Gives every ConfigMap `magic-value: foobar`, and leaves everything else as it is.

const bulkhead = @import("bulkhead");
const Value = bulkhead.Value;
pub const panic = bulkhead.panic;

export fn validate() void {
    bulkhead.answer(decide);
}

fn decide(call: bulkhead.Call, out: *bulkhead.Writer) !void {
    const review: bulkhead.AdmissionReview = try .of(call);
    const config_map = try review.objectOf("", "ConfigMap") orelse return review.allow(out);
    const edited = try edit(config_map) orelse return review.allow(out);
    return review.allowEdited(out, &edited);
}

/// The edited object's text: what it was up to some place, what is new, and what it was from there on.
/// All that is not new stays as it was written, to the last digit of its numbers.
const Edited = [3][]const u8;

/// Null where the object has the value already: a module may be asked more than once.
fn edit(config_map: Value) !?Edited {
    const data = try config_map.get("data") orelse
        return append(config_map, config_map, ",\"data\":{\"magic-value\":\"foobar\"}");
    if (data.kind() == .null) return replace(config_map, data, "{\"magic-value\":\"foobar\"}");
    // Fails with a proper message where it is anything else.
    _ = try config_map.require(.object, "data");
    const value = try data.get("magic-value") orelse
        return append(config_map, data, ",\"magic-value\":\"foobar\"");
    return if (value.isString("foobar")) null else replace(config_map, value, "\"foobar\"");
}

fn replace(whole: Value, old: Value, new: []const u8) Edited {
    const start = old.text.ptr - whole.text.ptr;
    return .{ whole.text[0..start], new, whole.text[start + old.text.len ..] };
}

/// Puts `member`, which begins with a comma, at the end of `object`, which is `whole` or inside of it.
fn append(whole: Value, object: Value, member: []const u8) Edited {
    var members = object.members();
    const empty = members.next() == null;
    const brace = object.text.ptr - whole.text.ptr + object.text.len - 1;
    return .{ whole.text[0..brace], member[@intFromBool(empty)..], whole.text[brace..] };
}
