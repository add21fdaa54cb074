//! Authenticates the token `magic-token` as magic-user, and nobody else.

const bulkhead = @import("bulkhead");
pub const panic = bulkhead.panic;

export fn authn() void {
    bulkhead.answer(decide);
}

const head =
    \\{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":
;
const magic_user =
    \\{"authenticated":true,"user":{"username":"magic-user","uid":"0","groups":["magic-group"]}}}
;
const nobody =
    \\{"authenticated":false}}
;

fn decide(call: bulkhead.Call, out: *bulkhead.Writer) !void {
    try call.expect("authentication.k8s.io/v1", "TokenReview");
    const token = try call.request.require(.string, "spec.token");
    try out.writeAll(head);
    try out.writeAll(if (token.isString("magic-token")) magic_user else nobody);
}
