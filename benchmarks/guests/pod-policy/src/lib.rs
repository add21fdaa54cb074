//! A policy of the usual kind and size, to measure with: it parses the whole review with serde_json,
//! looks at every container of a Pod, before and now, and answers with what it saw as audit annotations.
//!
//! The setting `sleepMilliseconds` has it wait before it answers, with all that it holds: so its memory can
//! be looked at.

use serde_json::{Map, Value, json};
use std::io::{self, Read, Write};
use std::thread;
use std::time::Duration;

const CONTAINERS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];
const HOST_NAMESPACES: [&str; 3] = ["hostNetwork", "hostPID", "hostIPC"];

#[unsafe(no_mangle)]
pub extern "C" fn validate() {
    let printed = match read().and_then(|call| answer(&call)) {
        Ok(response) => json!({ "response": response }),
        Err(error) => json!({ "error": error }),
    };
    let mut out = io::stdout().lock();
    // A failure to write leaves an answer that is no JSON: the module failed.
    let _ = out
        .write_all(printed.to_string().as_bytes())
        .and_then(|()| out.flush());
}

fn read() -> Result<Value, String> {
    let mut text = Vec::new();
    io::stdin()
        .read_to_end(&mut text)
        .map_err(|error| error.to_string())?;
    serde_json::from_slice(&text).map_err(|error| error.to_string())
}

fn answer(call: &Value) -> Result<Value, String> {
    let response = decide(&call["request"]);
    if let Some(time) = call["settings"]["sleepMilliseconds"].as_u64() {
        thread::sleep(Duration::from_millis(time));
    }
    response
}

fn decide(review: &Value) -> Result<Value, String> {
    let request = review["request"].as_object().ok_or("no request")?;
    let pod = &request["object"];
    let mut faults = Vec::new();
    host_access(&pod["spec"], &mut faults);
    for (container, field) in containers(pod) {
        privileges(container, field, &mut faults);
    }
    Ok(json!({
        "apiVersion": review["apiVersion"],
        "kind": review["kind"],
        "response": {
            "uid": request["uid"],
            "allowed": faults.is_empty(),
            "status": { "message": faults.join("; ") },
            "auditAnnotations": annotations(pod, request.get("oldObject").unwrap_or(&Value::Null)),
        },
    }))
}

/// Every container of a Pod, with the name of the field that it is in.
fn containers(pod: &Value) -> impl Iterator<Item = (&Value, &'static str)> {
    CONTAINERS.into_iter().flat_map(|field| {
        let listed = pod["spec"][field].as_array();
        listed
            .into_iter()
            .flatten()
            .map(move |container| (container, field))
    })
}

fn host_access(spec: &Value, faults: &mut Vec<String>) {
    for field in HOST_NAMESPACES {
        if spec[field] == true {
            faults.push(format!("spec.{field} is not allowed"));
        }
    }
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        if volume.get("hostPath").is_some() {
            faults.push(format!("volume {} is of the host", volume["name"]));
        }
    }
}

fn privileges(container: &Value, field: &str, faults: &mut Vec<String>) {
    let security = &container["securityContext"];
    for setting in ["privileged", "allowPrivilegeEscalation"] {
        if security[setting] == true {
            faults.push(format!(
                "{field} {}: {setting} is not allowed",
                container["name"]
            ));
        }
    }
    for capability in security["capabilities"]["add"]
        .as_array()
        .into_iter()
        .flatten()
    {
        if capability != "NET_BIND_SERVICE" {
            faults.push(format!(
                "{field} {}: capability {capability}",
                container["name"]
            ));
        }
    }
}

/// The images that are used now, and those that are no longer.
fn annotations(pod: &Value, old: &Value) -> Map<String, Value> {
    let images = |pod| {
        containers(pod)
            .filter_map(|(container, _)| container["image"].as_str())
            .collect::<Vec<_>>()
    };
    let (now, before) = (images(pod), images(old));
    let gone: Vec<_> = before
        .into_iter()
        .filter(|image| !now.contains(image))
        .collect();
    [("images", now), ("images-gone", gone)]
        .into_iter()
        .map(|(name, images)| (name.to_owned(), Value::from(images.join(","))))
        .collect()
}
