//! Refuses ConfigMaps that have the data key `not-allowed-value`, and lets everything else pass.

const bulkhead = @import("bulkhead");
pub const panic = bulkhead.panic;

export fn validate() void {
    bulkhead.answer(decide);
}

fn decide(call: bulkhead.Call, out: *bulkhead.Writer) !void {
    const review: bulkhead.AdmissionReview = try .of(call);
    const config_map = try review.objectOf("", "ConfigMap") orelse return review.allow(out);
    const data = try config_map.find(.object, "data") orelse return review.allow(out);
    if (try data.get("not-allowed-value") == null) return review.allow(out);
    return review.deny(out, "data key \"not-allowed-value\" is not allowed in a ConfigMap");
}
