/*
 * The control protocol between the spawner and a zygote, version 1.
 *
 * A zygote is an unmodified wasmtime with the library of zygote.c preloaded, which has loaded one
 * module and stopped just before it would run it. It forks one child for each run.
 *
 * Transport: one AF_UNIX SOCK_SEQPACKET socket pair, so that a message arrives whole or not at all.
 * All numbers are in the machine's own byte order: both ends are built together.
 *
 *   zygote -> spawner   READY     once, at the fork point: the zygote is confined and waits
 *   zygote -> spawner   UNFIT     once, instead: there will be no zygote, for this reason; it exits
 *   spawner -> zygote   RUN       with three file descriptors: standard input, output and error
 *   zygote -> spawner   STARTED   with one: a pidfd of the child; the way to kill it
 *   zygote -> spawner   ENDED     the child is reaped; nothing of it is left
 *   zygote -> spawner   FAILED    there never was a child
 *
 * Every RUN gets one FAILED, or one STARTED and then one ENDED. A zygote whose socket is full keeps
 * its replies and takes no new runs until they are sent. When the spawner's end closes, the zygote
 * exits, and its children are killed: it is the first process of its PID namespace, and where there
 * is none, they have it as their parent-death signal. When a zygote dies, the spawner sees the end
 * of the socket, and all its runs are over. Descriptors that did not arrive, as the zygote's table
 * was full (EMFILE), fail that one run.
 */
#ifndef BULKHEAD_ZYGOTE_PROTOCOL_H
#define BULKHEAD_ZYGOTE_PROTOCOL_H

#include <stdint.h>

#include "confine.h"

#define ZYGOTE_PROTOCOL_MAGIC 0x475a4b42u /* "BKZG" */
#define ZYGOTE_PROTOCOL_VERSION 1

/* Of one zygote at a time; more fail with EAGAIN. */
#define ZYGOTE_MAX_RUNS 256

/* How the library is told what it is: in the environment of wasmtime, which no guest sees. */
#define ZYGOTE_FD_VARIABLE "BULKHEAD_ZYGOTE_FD"     /* the control socket; unset: one run, no fork */
#define ZYGOTE_LAYERS_VARIABLE "BULKHEAD_ISOLATION" /* the layers to set up, enum confine_layer */
/* Set, by the probe: a run that is not forked says on standard error when it is confined. */
#define ZYGOTE_ANNOUNCE_VARIABLE "BULKHEAD_ANNOUNCE"
#define ZYGOTE_ANNOUNCEMENT "bulkhead: confined"

enum zygote_message_type {
  ZYGOTE_READY = 1,
  ZYGOTE_UNFIT = 2,
  ZYGOTE_RUN = 3,
  ZYGOTE_STARTED = 4,
  ZYGOTE_ENDED = 5,
  ZYGOTE_FAILED = 6,
};

struct zygote_header {
  uint32_t magic;
  uint16_t version;
  uint16_t type; /* enum zygote_message_type */
  uint64_t run_id;
};

struct zygote_ready {
  struct zygote_header header;
  uint32_t layers; /* those that hold, enum confine_layer */
  uint32_t reserved;
};

struct zygote_run {
  struct zygote_header header;
  struct confine_limits limits;
  uint32_t pin_cpu; /* 1: the run stays on the CPU that it begins on */
  uint32_t reserved;
};

struct zygote_started {
  struct zygote_header header;
};

struct zygote_ended {
  struct zygote_header header;
  int32_t wait_status; /* as from wait4 */
  uint32_t reserved;
  uint64_t cpu_nanoseconds; /* user and system, all threads */
  uint64_t peak_resident_bytes; /* what it shares with the zygote is counted, too */
  uint64_t touched_bytes;       /* its page faults' pages */
};

/* Also UNFIT. */
struct zygote_failed {
  struct zygote_header header;
  int32_t error; /* errno */
  char step[44]; /* what failed; ends with NUL */
};

#endif
