//! Lets the members of magic-group do anything with ConfigMaps, and has no opinion on the rest.

const bulkhead = @import("bulkhead");
pub const panic = bulkhead.panic;

export fn authz() void {
    bulkhead.answer(decide);
}

const allow =
    \\{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","status":{"allowed":true}}
;
/// Neither allowed nor denied: the next authorizer is asked.
const no_opinion =
    \\{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","status":{"allowed":false}}
;

fn decide(call: bulkhead.Call, out: *bulkhead.Writer) !void {
    try call.expect("authorization.k8s.io/v1", "SubjectAccessReview");
    const spec = try call.request.require(.object, "spec");
    const allowed = try isMember(spec) and try wantsConfigMaps(spec);
    try out.writeAll(if (allowed) allow else no_opinion);
}

fn isMember(spec: bulkhead.Value) !bool {
    const groups = try spec.find(.array, "groups") orelse return false;
    var names = groups.items();
    while (names.next()) |name| {
        if (name.isString("magic-group")) return true;
    }
    return false;
}

fn wantsConfigMaps(spec: bulkhead.Value) !bool {
    const attributes = try spec.find(.object, "resourceAttributes") orelse return false;
    const resource = try attributes.find(.string, "resource") orelse return false;
    if (try attributes.find(.string, "group")) |group| {
        if (!group.isString("")) return false;
    }
    return resource.isString("configmaps");
}
