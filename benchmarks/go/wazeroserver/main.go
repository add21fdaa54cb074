// The other way to run untrusted modules, for comparison: one process that answers admission reviews with
// a module inside itself, run by wazero. It is made as one would make it in earnest:
//
//   - the module is compiled to machine code once, at the start;
//   - every review gets an instance of its own, with fresh memory, closed afterwards;
//   - the module has standard input and output, clocks and random numbers, and nothing else;
//   - a deadline, if -close-on-done is given. Without it a module that loops is never stopped, which no
//     server could afford; it is there to show what it costs;
//   - a bound on the runs at a time, if -slots is given: it keeps memory and the slowest answers in
//     bounds, for some of the throughput;
//   - a review and an answer are parsed and checked as far as is needed to answer rightly;
//   - net/http's server, TLS and keep-alive, HTTP/1.1 alone, as kube-apiserver speaks to webhooks.
//
// What it does not do, and Bulkhead does: bound a run's CPU, stay alive when wazero or the module's
// machine code goes wrong, keep modules from each other's memory with more than the compiler's promise.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"
)

const (
	maxBodyBytes = 8 << 20
	maxPages     = 1024             // 64 MiB, as Bulkhead's default
	wallLimit    = 10 * time.Second // what the callers give a review
	memoryLimit  = 256 << 20
)

func main() {
	log.SetFlags(0)
	certificate := flag.String("certificate", "", "the server's certificate, PEM")
	key := flag.String("key", "", "its key, PEM")
	module := flag.String("module", "", "the module, a wasm file")
	entry := flag.String("entry", "validate", "the exported function to call; _start for a command")
	closeOnDone := flag.Bool("close-on-done", false, "stop a module at its deadline")
	slots := flag.Int("slots", 0, "runs at a time, more wait; 0: no limit")
	flag.Parse()
	// The memories of past runs are garbage: collecting it by size of memory, instead of at every
	// doubling, is worth a quarter to twice the reviews per second.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)

	pair, err := tls.LoadX509KeyPair(*certificate, *key)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	policy, err := load(ctx, *module, *entry, *closeOnDone, *slots)
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr())
	server := &http.Server{
		Handler:           policy,
		ReadHeaderTimeout: 10 * time.Second,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}},
	}
	log.Fatal(server.ServeTLS(listener, "", ""))
}

// policy answers reviews with one module.
type policy struct {
	runtime  wazero.Runtime
	compiled wazero.CompiledModule
	entry    string
	slots    chan struct{} // nil: no limit
}

func load(ctx context.Context, file, entry string, closeOnDone bool, slots int) (*policy, error) {
	code, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	config := wazero.NewRuntimeConfigCompiler().
		WithMemoryLimitPages(maxPages).
		WithCloseOnContextDone(closeOnDone)
	engine := wazero.NewRuntimeWithConfig(ctx, config)
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, engine); err != nil {
		return nil, err
	}
	compiled, err := engine.CompileModule(ctx, code)
	if err != nil {
		return nil, err
	}
	p := &policy{engine, compiled, entry, nil}
	if slots > 0 {
		p.slots = make(chan struct{}, slots)
	}
	return p, nil
}

// run calls the entry point of a new instance, and returns what it printed.
func (p *policy) run(ctx context.Context, input io.Reader) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, wallLimit)
	defer cancel()
	if p.slots != nil {
		p.slots <- struct{}{}
		defer func() { <-p.slots }()
	}
	var output bytes.Buffer
	config := wazero.NewModuleConfig().
		WithName(""). // anonymous: there are many at a time
		WithArgs("policy").
		WithStdin(input).
		WithStdout(&output).
		WithRandSource(rand.Reader).
		WithSysWalltime().
		WithSysNanotime().
		WithStartFunctions("_initialize") // called if there is one
	instance, err := p.runtime.InstantiateModule(ctx, p.compiled, config)
	if err != nil {
		return nil, err
	}
	defer instance.Close(ctx)
	function := instance.ExportedFunction(p.entry)
	if function == nil {
		return nil, fmt.Errorf("no export %q", p.entry)
	}
	_, err = function.Call(ctx)
	var exit *sys.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 0 {
		err = nil
	}
	return output.Bytes(), err
}

// What of an AdmissionReview is needed to check it and to answer it.
type review struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Request    *request  `json:"request,omitempty"`
	Response   *response `json:"response,omitempty"`
}

type request struct {
	UID string `json:"uid"`
}

type response struct {
	UID              string            `json:"uid"`
	Allowed          bool              `json:"allowed"`
	Status           json.RawMessage   `json:"status,omitempty"`
	Warnings         []string          `json:"warnings,omitempty"`
	AuditAnnotations map[string]string `json:"auditAnnotations,omitempty"`
}

// What a module prints.
type result struct {
	Response *review `json:"response"`
	Error    string  `json:"error"`
}

func (p *policy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var asked review
	if err := json.Unmarshal(body, &asked); err != nil || asked.Kind != "AdmissionReview" || asked.Request == nil {
		http.Error(w, "not an AdmissionReview", http.StatusBadRequest)
		return
	}
	answer, err := p.answer(r.Context(), body, asked)
	if err != nil {
		log.Print(err)
		http.Error(w, "the module failed", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(answer)
}

func (p *policy) answer(ctx context.Context, body []byte, asked review) ([]byte, error) {
	input := io.MultiReader(bytes.NewReader([]byte(`{"request":`)), bytes.NewReader(body), bytes.NewReader([]byte("}")))
	output, err := p.run(ctx, input)
	if err != nil {
		return nil, err
	}
	var told result
	if err := json.Unmarshal(output, &told); err != nil {
		return nil, err
	}
	if told.Error != "" || told.Response == nil || told.Response.Response == nil {
		return nil, fmt.Errorf("no answer from the module: %q", told.Error)
	}
	verdict := told.Response.Response
	if verdict.UID != asked.Request.UID {
		return nil, errors.New("the module answered another review")
	}
	return json.Marshal(review{APIVersion: asked.APIVersion, Kind: asked.Kind, Response: verdict})
}
