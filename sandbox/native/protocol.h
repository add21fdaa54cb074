/*
 * The control protocol between the service and the spawner, version 2.
 *
 * Transport: one AF_UNIX SOCK_SEQPACKET socket pair for each client, so that every message arrives
 * whole or not at all. All numbers are in the machine's own byte order: both ends are processes of
 * one machine and one package. sandbox/spawner.py has the other end; a test compares the two, with
 * what `bulkhead-spawner --protocol` prints.
 *
 *   spawner -> service   HELLO     once for each client, at its start
 *   service -> spawner   PROGRAM   something to run: arguments, environment, and the file descriptors
 *                                  that the process shall see as 3, 4, ...
 *   service -> spawner   FORGET    no more runs of it; those that there are go on
 *   service -> spawner   RUN       of a program; its standard input follows, or comes as a descriptor
 *   service -> spawner   KILL      ends a run; its ENDED reply follows as for any other
 *   spawner -> service   OUTPUT    a part of what a run wrote, where that does not fit into ENDED
 *   spawner -> service   ENDED     the process is reaped; nothing of it is left
 *   spawner -> service   FAILED    there never was a process
 *   spawner -> service   ZYGOTE    how it stands with a program's zygote
 *   service -> spawner   CLIENT    with a socket: one more client; from the first client only
 *
 * Every RUN gets exactly one ENDED or FAILED. A KILL for a run that has ended is ignored. Programs
 * are known by a key that says all about them, so that clients share zygotes. When a client's end of
 * its socket closes, its runs are killed and its programs forgotten; with the first client's, all
 * are, and the spawner exits. When the spawner dies, the kernel kills its children.
 */
#ifndef BULKHEAD_PROTOCOL_H
#define BULKHEAD_PROTOCOL_H

#include <stdint.h>

#include "confine.h"

#define BULKHEAD_PROTOCOL_MAGIC 0x44484b42u /* "BKHD" */
#define BULKHEAD_PROTOCOL_VERSION 2

/* Of one message, either way. Longer requests are refused; longer output comes in parts. */
#define BULKHEAD_MAX_MESSAGE_BYTES 65536
#define BULKHEAD_MAX_FILES 8 /* of a program, its three standard ones included */
#define BULKHEAD_MAX_STRINGS 512
#define BULKHEAD_KEY_BYTES 16

enum message_type {
  MESSAGE_HELLO = 1,
  MESSAGE_PROGRAM = 2,
  MESSAGE_FORGET = 3,
  MESSAGE_RUN = 4,
  MESSAGE_KILL = 5,
  MESSAGE_OUTPUT = 6,
  MESSAGE_ENDED = 7,
  MESSAGE_FAILED = 8,
  MESSAGE_ZYGOTE = 9,
  MESSAGE_CLIENT = 10,
};

/* What the spawner did to a run, as opposed to what happened to it. */
enum end_reason {
  END_BY_ITSELF = 0,
  END_WALL_TIME = 1,
  END_KILLED = 2, /* a KILL message */
};

/* How the process came into being. */
enum start_way {
  WAY_EXEC = 0,
  WAY_ZYGOTE = 1,
};

/* Where the start of a process failed. */
enum failure_stage {
  STAGE_REQUEST = 1, /* a malformed request, or descriptors that did not arrive */
  STAGE_PREPARE = 2, /* files, pipe, process, pidfd, epoll */
  STAGE_CONFINE = 3, /* limits and process attributes, in the child */
  STAGE_EXEC = 4,
};

enum zygote_state {
  ZYGOTE_STATE_READY = 1,
  ZYGOTE_STATE_UNFIT = 2, /* it cannot be: runs of this program execute it, for good */
  ZYGOTE_STATE_DIED = 3,  /* another one is started after a pause */
  ZYGOTE_STATE_SHUNNED = 4, /* runs crashed again and again: they execute the program for a while */
};

enum program_flag {
  PROGRAM_IS_WASMTIME = 1, /* the library is preloaded, which confines a run when it is loaded */
  PROGRAM_HAS_ZYGOTE = 2,
};

struct message_header {
  uint32_t magic;
  uint16_t version;
  uint16_t type;
  uint64_t run_id; /* 0 where there is no run */
};

struct hello_message {
  struct message_header header;
  uint32_t layers; /* of isolation that work here, enum confine_layer */
  uint32_t reserved;
};

struct program_message {
  struct message_header header;
  uint8_t key[BULKHEAD_KEY_BYTES];
  uint64_t idle_nanoseconds; /* then its zygote is stopped, until the next run; 0: never */
  uint32_t flags;            /* enum program_flag */
  uint32_t layers;           /* of isolation that its runs get, where they work */
  uint32_t argument_count;
  uint32_t environment_count;
  /* argument_count + environment_count NUL-terminated strings follow; the first is the program. */
};

struct forget_message {
  struct message_header header;
  uint8_t key[BULKHEAD_KEY_BYTES];
};

struct run_message {
  struct message_header header;
  uint8_t key[BULKHEAD_KEY_BYTES];
  struct confine_limits limits;
  uint64_t wall_nanoseconds; /* then SIGKILL by the spawner */
  uint64_t stderr_bytes;     /* kept of standard error; the rest is read and dropped */
  uint32_t pin_cpu;          /* 1: the whole run on one CPU of the spawner's choice */
  uint32_t stdin_bytes;      /* that follow; with a descriptor, that is standard input */
};

struct output_message {
  struct message_header header;
  uint32_t stream; /* 1 or 2 */
  uint32_t bytes;  /* that follow */
};

struct ended_message {
  struct message_header header;
  int32_t wait_status; /* as from wait4 */
  uint32_t reason;     /* enum end_reason */
  uint64_t wall_nanoseconds;
  uint64_t cpu_nanoseconds; /* user and system, all threads */
  uint64_t peak_resident_bytes; /* what it shared with others is counted, too */
  uint64_t touched_bytes;       /* the pages that it faulted in: its own, and files' that it was the first to look at */
  uint64_t stdout_bytes; /* that it wrote in all, and that the service gets, in parts or below */
  uint32_t stderr_truncated;
  uint32_t way;    /* enum start_way */
  uint32_t layers; /* of isolation that held */
  uint32_t stderr_here; /* bytes that follow of standard error, then as many of standard output */
  uint32_t stdout_here;
  uint32_t reserved;
};

struct failed_message {
  struct message_header header;
  uint32_t stage; /* enum failure_stage */
  int32_t error;  /* errno */
};

struct zygote_message {
  struct message_header header;
  uint8_t key[BULKHEAD_KEY_BYTES];
  uint32_t state; /* enum zygote_state */
  uint32_t layers;
  int32_t error; /* errno, where something failed */
  char step[44]; /* what failed; ends with NUL */
};

#endif
