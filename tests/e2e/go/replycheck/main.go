// Reads replies of a webhook as kube-apiserver does, with its own types and checks.
//
// Standard input: one JSON object per line, {"name", "path", "request", "reply"}: what was sent, and what
// came back. Standard output: one line for each reply that is no good, {"name", "problem"}. A reply is good
// if it is strictly of its type, and if kube-apiserver would do with it what it says.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
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
		UID    types.UID       `json:"uid"`
		Object json.RawMessage `json:"object"`
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
	switch reply := reply.(type) {
	case *authorizationv1.SubjectAccessReview:
		return checkAccess(reply.Status.Allowed, reply.Status.Denied)
	case *authorizationv1beta1.SubjectAccessReview:
		return checkAccess(reply.Status.Allowed, reply.Status.Denied)
	case *admissionv1.AdmissionReview, *admissionv1beta1.AdmissionReview:
		mutating := strings.HasPrefix(exchange.Path, "/mutate")
		verified, err := webhook.VerifyAdmissionResponse(sent.Request.UID, mutating, reply)
		if err != nil {
			return err
		}
		return checkAdmission(sent, verified)
	}
	return nil
}

func checkAccess(allowed, denied bool) error {
	if allowed && denied {
		return errors.New("both allowed and denied, which kube-apiserver takes for an error")
	}
	return nil
}

func checkAdmission(sent head, reply *webhook.AdmissionResponse) error {
	if !reply.Allowed && (reply.Result == nil || reply.Result.Message == "") {
		return errors.New("denied without a message")
	}
	if !reply.Allowed && (reply.Result.Code < http.StatusBadRequest || reply.Result.Code > 599) {
		return fmt.Errorf("denied with code %d, of which kube-apiserver makes another", reply.Result.Code)
	}
	if len(reply.Patch) == 0 {
		return nil
	}
	if !reply.Allowed {
		return errors.New("denied, and patched")
	}
	if reply.PatchType != admissionv1.PatchTypeJSONPatch {
		return fmt.Errorf("a patch of type %q", reply.PatchType)
	}
	patch, err := jsonpatch.DecodePatch(reply.Patch)
	if err != nil {
		return fmt.Errorf("the patch cannot be read: %w", err)
	}
	if _, err = patch.Apply(sent.Request.Object); err != nil {
		return fmt.Errorf("the patch cannot be applied: %w", err)
	}
	return nil
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
