/*
 * The control protocol between the service and the spawner, version 1.
 *
 * Transport: one AF_UNIX SOCK_SEQPACKET socket pair, so that every message arrives whole or not at
 * all. All numbers are in the machine's own byte order: both ends are processes of one machine and
 * one package. sandbox/spawner.py has the other end; a test compares the two, with what
 * `bulkhead-spawner --protocol` prints.
 *
 *   spawner -> service   HELLO     once, at the start
 *   service -> spawner   RUN       with file descriptors: standard input, output and error, then
 *                                  those that the process shall see as 3, 4, ...
 *   service -> spawner   KILL      ends a run; its ENDED reply follows as for any other
 *   spawner -> service   ENDED     the process is reaped; nothing of it is left
 *   spawner -> service   FAILED    there never was a process
 *
 * Every RUN gets exactly one ENDED or FAILED. A KILL for a run that has ended is ignored. When the
 * service's end of the socket closes, the spawner kills all runs and exits; when the spawner dies,
 * the kernel kills its children (PR_SET_PDEATHSIG).
 */
#ifndef BULKHEAD_PROTOCOL_H
#define BULKHEAD_PROTOCOL_H

#include <stdint.h>

#define BULKHEAD_PROTOCOL_MAGIC 0x44484b42u /* "BKHD" */
#define BULKHEAD_PROTOCOL_VERSION 1

/* Longer requests are refused: argv and environment are the service's own and short. */
#define BULKHEAD_MAX_MESSAGE_BYTES 65536
#define BULKHEAD_MAX_FILES 8
#define BULKHEAD_MAX_STRINGS 512

enum message_type {
  MESSAGE_HELLO = 1,
  MESSAGE_RUN = 2,
  MESSAGE_KILL = 3,
  MESSAGE_ENDED = 4,
  MESSAGE_FAILED = 5,
};

/* What the spawner did to a run, as opposed to what happened to it. */
enum end_reason {
  END_BY_ITSELF = 0,
  END_WALL_TIME = 1,
  END_KILLED = 2, /* a KILL message */
};

/* Where the start of a process failed. */
enum failure_stage {
  STAGE_REQUEST = 1, /* a malformed request, or descriptors that did not arrive */
  STAGE_PREPARE = 2, /* pipe, vfork, pidfd, epoll */
  STAGE_CONFINE = 3, /* limits and process attributes, in the child */
  STAGE_EXEC = 4,
};

struct message_header {
  uint32_t magic;
  uint16_t version;
  uint16_t type;
  uint64_t run_id;
};

struct run_request {
  struct message_header header;
  uint64_t wall_nanoseconds; /* then SIGKILL by the spawner */
  uint64_t cpu_nanoseconds;  /* then SIGPROF by the kernel; RLIMIT_CPU a second behind */
  uint64_t data_bytes;       /* RLIMIT_DATA */
  uint64_t address_bytes;    /* RLIMIT_AS */
  uint64_t file_bytes;       /* RLIMIT_FSIZE: the most that standard output can hold */
  uint64_t stderr_bytes;     /* kept of standard error; the rest is read and dropped */
  uint32_t open_files;       /* RLIMIT_NOFILE */
  uint32_t pin_cpu;          /* 1: the whole run on one CPU of the spawner's choice */
  uint32_t argument_count;
  uint32_t environment_count;
  /* argument_count + environment_count NUL-terminated strings follow; the first is the program. */
};

struct ended_reply {
  struct message_header header;
  int32_t wait_status; /* as from wait4 */
  uint32_t reason;     /* enum end_reason */
  uint64_t wall_nanoseconds;
  uint64_t cpu_nanoseconds; /* user and system, all threads */
  uint64_t peak_resident_bytes;
  uint32_t stderr_truncated;
  uint32_t reserved;
};

struct failed_reply {
  struct message_header header;
  uint32_t stage; /* enum failure_stage */
  int32_t error;  /* errno */
};

#endif
