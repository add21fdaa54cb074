//! What modules that validate and modules that mutate share.

const std = @import("std");
const Base64 = @import("base64.zig").Base64;
const Call = @import("bulkhead.zig").Call;
const Failed = @import("failure.zig").Failed;
const Value = @import("json.zig").Value;
const Writer = std.Io.Writer;
const writeString = @import("bulkhead.zig").writeString;

const api_version = "admission.k8s.io/v1";
const kind = "AdmissionReview";

pub const AdmissionReview = struct {
    request: Value,
    /// A string; the answer bears it, too.
    uid: Value,

    /// Fails unless the call is an AdmissionReview that has a request with a uid.
    pub fn of(call: Call) Failed!AdmissionReview {
        try call.expect(api_version, kind);
        const request = try call.request.require(.object, "request");
        return .{ .request = request, .uid = try request.require(.string, "uid") };
    }

    /// The object under review, of whatever kind; null where there is none, as when it is deleted.
    pub fn object(review: AdmissionReview) Failed!?Value {
        return review.request.find(.object, "object");
    }

    /// As `object`, and null also where it is of another kind. The core group is "".
    pub fn objectOf(review: AdmissionReview, group: []const u8, kind_name: []const u8) Failed!?Value {
        const its_kind = try review.request.require(.object, "kind");
        if (!(try its_kind.require(.string, "kind")).isString(kind_name)) return null;
        const its_group = try its_kind.find(.string, "group");
        if (!(if (its_group) |name| name.isString(group) else group.len == 0)) return null;
        return review.object();
    }

    /// Answers that the object may pass.
    pub fn allow(review: AdmissionReview, out: *Writer) Writer.Error!void {
        try review.begin(out, "true");
        try out.writeAll("}}");
    }

    /// Answers that the object may not pass; `message` is for the user who sent it.
    pub fn deny(review: AdmissionReview, out: *Writer, message: []const u8) Writer.Error!void {
        try review.begin(out, "false");
        try out.writeAll(",\"status\":{\"code\":403,\"reason\":\"Forbidden\",\"message\":");
        try writeString(out, message);
        try out.writeAll("}}}");
    }

    /// Answers that the object may pass, changed to the one whose JSON text these pieces make together.
    pub fn allowEdited(review: AdmissionReview, out: *Writer, pieces: []const []const u8) Writer.Error!void {
        try review.begin(out, "true");
        try out.writeAll(",\"patchType\":\"Full\",\"patch\":\"");
        var base64: Base64 = .{ .out = out };
        for (pieces) |piece| try base64.write(piece);
        try base64.finish();
        try out.writeAll("\"}}");
    }

    fn begin(review: AdmissionReview, out: *Writer, allowed: []const u8) Writer.Error!void {
        try out.writeAll("{\"apiVersion\":\"" ++ api_version ++ "\",\"kind\":\"" ++ kind ++ "\",\"response\":{\"uid\":");
        try out.writeAll(review.uid.text);
        try out.writeAll(",\"allowed\":");
        try out.writeAll(allowed);
    }
};
