// Reads replies of a webhook as kube-apiserver does, with its own types and checks.
//
// Standard input: one JSON object per line, {"name", "path", "request", "reply"}: what was sent, and what
// came back. Standard output: one line for each reply that is no good, {"name", "problem"}.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	admissionv1beta1 "k8s.io/api/admission/v1beta1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authenticationv1beta1 "k8s.io/api/authentication/v1beta1"
	authorizationv1 "k8s.io/api/authorization/v1"
	authorizationv1beta1 "k8s.io/api/authorization/v1beta1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	webhook "k8s.io/apiserver/pkg/admission/plugin/webhook/request"
	sigsjson "sigs.k8s.io/json"
)

type exchange struct {
	Name    string          `json:"name"`
	Path    string          `json:"path"`
	Request json.RawMessage `json:"request"`
	Reply   string          `json:"reply"`
}

type head struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Request    struct {
		UID types.UID `json:"uid"`
	} `json:"request"`
}

var kinds = map[string]func() runtime.Object{
	"authentication.k8s.io/v1 TokenReview":             func() runtime.Object { return &authenticationv1.TokenReview{} },
	"authentication.k8s.io/v1beta1 TokenReview":        func() runtime.Object { return &authenticationv1beta1.TokenReview{} },
	"authorization.k8s.io/v1 SubjectAccessReview":      func() runtime.Object { return &authorizationv1.SubjectAccessReview{} },
	"authorization.k8s.io/v1beta1 SubjectAccessReview": func() runtime.Object { return &authorizationv1beta1.SubjectAccessReview{} },
	"admission.k8s.io/v1 AdmissionReview":              func() runtime.Object { return &admissionv1.AdmissionReview{} },
	"admission.k8s.io/v1beta1 AdmissionReview":         func() runtime.Object { return &admissionv1beta1.AdmissionReview{} },
}

func check(exchange exchange) error {
	var sent, got head
	if err := json.Unmarshal(exchange.Request, &sent); err != nil {
		return fmt.Errorf("the request: %w", err)
	}
	make, known := kinds[sent.APIVersion+" "+sent.Kind]
	if !known {
		return fmt.Errorf("no type for %s %s", sent.APIVersion, sent.Kind)
	}
	reply := make()
	strict, err := sigsjson.UnmarshalStrict([]byte(exchange.Reply), reply)
	if err != nil {
		return fmt.Errorf("cannot be read: %w", err)
	}
	if len(strict) > 0 {
		return fmt.Errorf("not strictly of its type: %v", strict)
	}
	if err := json.Unmarshal([]byte(exchange.Reply), &got); err != nil {
		return err
	}
	if got.APIVersion != sent.APIVersion || got.Kind != sent.Kind {
		return fmt.Errorf("is a %s %s", got.APIVersion, got.Kind)
	}
	if sent.Kind == "AdmissionReview" {
		_, err = webhook.VerifyAdmissionResponse(sent.Request.UID, strings.HasPrefix(exchange.Path, "/mutate"), reply)
	}
	return err
}

func main() {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 64<<20)
	out := json.NewEncoder(os.Stdout)
	for in.Scan() {
		var next exchange
		if err := json.Unmarshal(in.Bytes(), &next); err != nil {
			fmt.Fprintln(os.Stderr, "replycheck:", err)
			os.Exit(2)
		}
		if err := check(next); err != nil {
			_ = out.Encode(map[string]string{"name": next.Name, "problem": err.Error()})
		}
	}
	if err := in.Err(); err != nil {
		fmt.Fprintln(os.Stderr, "replycheck:", err)
		os.Exit(2)
	}
}
