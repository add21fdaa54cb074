// A fixed number of callers, each asking again as soon as it has its answer, over a connection of its
// own: HTTP/1.1 with keep-alive over TLS, as kube-apiserver asks webhooks.
//
// It shares the CPUs with the server that it measures, so it is as cheap as it can be: one thread, a
// request that is written once, answers compared with the first one. It prints one JSON object:
// {"elapsedNanoseconds", "cpuNanoseconds", "warmUpAnswers", "latencies": nanoseconds of each answer after
// the warm-up, in no order}.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
)

type load struct {
	address string
	tls     *tls.Config
	request []byte
	expect  []byte
}

type report struct {
	ElapsedNanoseconds int64   `json:"elapsedNanoseconds"`
	CPUNanoseconds     int64   `json:"cpuNanoseconds"`
	WarmUpAnswers      int     `json:"warmUpAnswers"`
	Latencies          []int64 `json:"latencies"`
}

func main() {
	log.SetFlags(0)
	runtime.GOMAXPROCS(1)
	address := flag.String("address", "", "host:port of the server")
	ca := flag.String("ca", "", "file with the certificate authority of the server")
	path := flag.String("path", "/validate?timeout=10s", "path and query of the webhook")
	body := flag.String("body", "", "file with the body of every request")
	expect := flag.String("expect", `"allowed":true`, "what every answer must contain, spaces aside")
	callers := flag.Int("callers", 1, "connections")
	warmUp := flag.Duration("warm-up", 300*time.Millisecond, "how long to ask before measuring")
	duration := flag.Duration("duration", 5*time.Second, "how long to measure")
	flag.Parse()

	config, err := trusting(*ca)
	if err != nil {
		log.Fatal(err)
	}
	content, err := os.ReadFile(*body)
	if err != nil {
		log.Fatal(err)
	}
	l := load{*address, config, request(*address, *path, content), []byte(*expect)}
	result, err := l.measure(*callers, *warmUp, *duration)
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		log.Fatal(err)
	}
}

func trusting(file string) (*tls.Config, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return &tls.Config{RootCAs: pool, NextProtos: []string{"http/1.1"}}, nil
}

// The headers are those that kube-apiserver sends.
func request(address, path string, body []byte) []byte {
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: kube-apiserver-admission\r\n"+
		"Content-Length: %d\r\nAccept: application/json, */*\r\nContent-Type: application/json\r\n"+
		"Accept-Encoding: gzip\r\n\r\n", path, address, len(body))
	return append([]byte(head), body...)
}

// measure opens all connections, asks for warmUp, and then for duration counts the answers.
func (l load) measure(callers int, warmUp, duration time.Duration) (*report, error) {
	connections := make([]net.Conn, callers)
	for i := range connections {
		connection, err := tls.Dial("tcp", l.address, l.tls)
		if err != nil {
			return nil, err
		}
		defer connection.Close()
		connections[i] = connection
	}
	begin := time.Now().Add(warmUp)
	end := begin.Add(duration)
	latencies := make([][]int64, callers)
	warmUps := make([]int, callers)
	failures := make([]error, callers)
	var group sync.WaitGroup
	for i, connection := range connections {
		group.Go(func() {
			latencies[i], warmUps[i], failures[i] = l.ask(connection, begin, end)
		})
	}
	time.Sleep(time.Until(begin))
	before := cpuNanoseconds()
	group.Wait()
	result := &report{Latencies: []int64{}}
	result.ElapsedNanoseconds, result.CPUNanoseconds = int64(time.Since(begin)), cpuNanoseconds()-before
	for i, failure := range failures {
		if failure != nil {
			return nil, failure
		}
		result.WarmUpAnswers += warmUps[i]
		result.Latencies = append(result.Latencies, latencies[i]...)
	}
	return result, nil
}

// ask goes on until end; it tells the latencies of what was asked after begin, and how much was before.
func (l load) ask(connection net.Conn, begin, end time.Time) (latencies []int64, warmUps int, err error) {
	reader := bufio.NewReader(connection)
	var good []byte
	for start := time.Now(); start.Before(end); start = time.Now() {
		if _, err := connection.Write(l.request); err != nil {
			return nil, 0, err
		}
		answer, err := read(reader)
		if err != nil {
			return nil, 0, err
		}
		if start.Before(begin) {
			warmUps++
		} else {
			latencies = append(latencies, int64(time.Since(start)))
		}
		if bytes.Equal(answer, good) {
			continue
		}
		if !bytes.Contains(bytes.ReplaceAll(answer, []byte(" "), nil), l.expect) {
			return nil, 0, fmt.Errorf("unexpected answer: %.300q", answer)
		}
		good = answer
	}
	return latencies, warmUps, nil
}

func read(reader *bufio.Reader) ([]byte, error) {
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("unexpected status: %s: %.300q", response.Status, answer)
	}
	return answer, err
}

func cpuNanoseconds() int64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	return usage.Utime.Nano() + usage.Stime.Nano()
}
