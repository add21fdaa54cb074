//go:build tools

// Package e2e names what is built from other modules.
package e2e

import _ "k8s.io/kubernetes/cmd/kube-apiserver/app"
