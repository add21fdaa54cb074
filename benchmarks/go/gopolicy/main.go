//go:build wasip1

// A policy in Go, built with the standard toolchain: the runtime starts anew, with its garbage collector
// and all of its packages, for every run. It refuses Pods with privileged containers.
package main

import (
	"encoding/json"
	"os"
)

type call struct {
	Request struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Request    struct {
			UID    string `json:"uid"`
			Object struct {
				Spec struct {
					Containers     []container `json:"containers"`
					InitContainers []container `json:"initContainers"`
				} `json:"spec"`
			} `json:"object"`
		} `json:"request"`
	} `json:"request"`
}

type container struct {
	Name            string `json:"name"`
	SecurityContext struct {
		Privileged bool `json:"privileged"`
	} `json:"securityContext"`
}

func main() {}

//go:wasmexport validate
func validate() {
	var asked call
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		json.NewEncoder(os.Stdout).Encode(map[string]any{"error": err.Error()})
		return
	}
	review := asked.Request
	spec := review.Request.Object.Spec
	allowed := true
	for _, each := range append(spec.InitContainers, spec.Containers...) {
		allowed = allowed && !each.SecurityContext.Privileged
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{"response": map[string]any{
		"apiVersion": review.APIVersion,
		"kind":       review.Kind,
		"response":   map[string]any{"uid": review.Request.UID, "allowed": allowed},
	}})
}
