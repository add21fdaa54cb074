"""From the kind of an object to the resource that requests name: a guess, as there is no cluster to ask."""

from __future__ import annotations

from dataclasses import dataclass

_UNCHANGED_ENDINGS = ("endpoints",)

# Where the rule fails: (group, kind).
_IRREGULAR = {
    ("gateway.networking.k8s.io", "Gateway"): "gateways",
    ("networking.istio.io", "Gateway"): "gateways",
    ("security.openshift.io", "SecurityContextConstraints"): "securitycontextconstraints",
    ("k8s.cni.cncf.io", "NetworkAttachmentDefinition"): "network-attachment-definitions",
    ("elasticsearch.k8s.elastic.co", "Elasticsearch"): "elasticsearches",
}

# What is sent to a subresource: (group, kind) and the group, version, resource and subresource.
_OF_SUBRESOURCES = {
    ("", "PodExecOptions"): ("", "v1", "pods", "exec"),
    ("", "PodAttachOptions"): ("", "v1", "pods", "attach"),
    ("", "PodPortForwardOptions"): ("", "v1", "pods", "portforward"),
    ("", "PodProxyOptions"): ("", "v1", "pods", "proxy"),
    ("", "ServiceProxyOptions"): ("", "v1", "services", "proxy"),
    ("", "NodeProxyOptions"): ("", "v1", "nodes", "proxy"),
    ("", "Binding"): ("", "v1", "pods", "binding"),
    ("policy", "Eviction"): ("", "v1", "pods", "eviction"),
    ("authentication.k8s.io", "TokenRequest"): ("", "v1", "serviceaccounts", "token"),
}

_CLUSTER_SCOPED = {
    "": ("ComponentStatus", "Namespace", "Node", "NodeProxyOptions", "PersistentVolume"),
    "admissionregistration.k8s.io": (
        "MutatingAdmissionPolicy",
        "MutatingAdmissionPolicyBinding",
        "MutatingWebhookConfiguration",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
        "ValidatingWebhookConfiguration",
    ),
    "apiextensions.k8s.io": ("CustomResourceDefinition",),
    "apiregistration.k8s.io": ("APIService",),
    "authentication.k8s.io": ("SelfSubjectReview", "TokenReview"),
    "authorization.k8s.io": ("SelfSubjectAccessReview", "SelfSubjectRulesReview", "SubjectAccessReview"),
    "certificates.k8s.io": ("CertificateSigningRequest", "ClusterTrustBundle"),
    "flowcontrol.apiserver.k8s.io": ("FlowSchema", "PriorityLevelConfiguration"),
    "gateway.networking.k8s.io": ("GatewayClass",),
    "internal.apiserver.k8s.io": ("StorageVersion",),
    "networking.k8s.io": ("IPAddress", "IngressClass", "ServiceCIDR"),
    "node.k8s.io": ("RuntimeClass",),
    "policy": ("PodSecurityPolicy",),
    "rbac.authorization.k8s.io": ("ClusterRole", "ClusterRoleBinding"),
    "resource.k8s.io": ("DeviceClass", "DeviceTaintRule", "ResourcePoolStatusRequest", "ResourceSlice"),
    "scheduling.k8s.io": ("PriorityClass",),
    "storage.k8s.io": ("CSIDriver", "CSINode", "StorageClass", "VolumeAttachment", "VolumeAttributesClass"),
    "storagemigration.k8s.io": ("StorageVersionMigration",),
}


@dataclass(frozen=True, slots=True)
class Resource:
    """What a request is for."""

    group: str
    version: str
    resource: str
    subresource: str = ""

    def __str__(self) -> str:
        """As kubectl writes it: `deployments.v1.apps/scale`, `pods`."""
        whole = f"{self.resource}.{self.version}.{self.group}" if self.group else self.resource
        return f"{whole}/{self.subresource}" if self.subresource else whole


def guess_resource(group: str, version: str, kind: str) -> Resource:
    """The resource of a kind, by Kubernetes' own rule where nothing better is known."""
    if (known := _OF_SUBRESOURCES.get((group, kind))) is not None:
        return Resource(*known)
    return Resource(group, version, _IRREGULAR.get((group, kind)) or _plural(kind))


def _plural(kind: str) -> str:
    """As meta.UnsafeGuessKindToResource of k8s.io/apimachinery."""
    singular = kind.lower()
    if singular.endswith(_UNCHANGED_ENDINGS):
        return singular
    if singular.endswith("s"):
        return f"{singular}es"
    if singular.endswith("y"):
        return f"{singular[:-1]}ies"
    return f"{singular}s"


def is_cluster_scoped(group: str, kind: str) -> bool:
    """Whether objects of this kind are known to be in no namespace."""
    return kind in _CLUSTER_SCOPED.get(group, ())
