/*
 * The kernel sandbox around a run: what each layer is, and the three places where layers are set up.
 *
 * A process goes through confine_loading before it executes wasmtime. When that has loaded a module
 * and would run it, the preloaded library calls confine_zygote, which takes away for good what only
 * loading needed. Each child then goes through confine_run. A process that is executed for one run
 * alone goes through confine_exec_run instead of the last two.
 *
 * Everything here is made of plain system calls: it runs between fork and exec.
 */
#ifndef BULKHEAD_CONFINE_H
#define BULKHEAD_CONFINE_H

#include <stdint.h>
#include <sys/types.h>

/* What isolates a run; bits of a mask. sandbox/isolation.py has the same. */
enum confine_layer {
  CONFINE_LIMITS = 1,
  CONFINE_NO_NEW_PRIVS = 2,
  CONFINE_NAMESPACES = 4, /* user, PID, network, IPC, UTS, mount and cgroup */
  CONFINE_CAPABILITIES = 8,
  CONFINE_EMPTY_ROOT = 16,
  CONFINE_LANDLOCK = 32,
  CONFINE_SECCOMP = 64,
};
#define CONFINE_LAYER_COUNT 7

struct confine_finding {
  unsigned layer;
  int works;
  int error;        /* errno, where it does not */
  const char *step; /* what failed */
};

/* Tries each layer in a child of its own; returns those that work. Takes some milliseconds. */
unsigned confine_detect(struct confine_finding *findings);

/* For the clone of a process that is to have these layers; 0: no namespaces. Remembers who we are:
 * the child is nobody in its new user namespace until confine_loading says who it is. */
unsigned long confine_clone_flags(unsigned layers);

/* What one run may use. The library and the spawner exchange it: its layout is part of the protocol. */
struct confine_limits {
  uint64_t cpu_nanoseconds; /* then SIGPROF by the kernel; RLIMIT_CPU two seconds behind */
  uint64_t data_bytes;      /* RLIMIT_DATA */
  uint64_t address_bytes;   /* RLIMIT_AS */
  uint64_t file_bytes;      /* RLIMIT_FSIZE */
  uint32_t open_files;      /* RLIMIT_NOFILE */
};

/* Sets limits and the timer of CPU time. 0, or -1 with errno. */
int confine_limit(const struct confine_limits *limits);

struct confine_loading {
  unsigned layers;
  pid_t parent;          /* 0: its death cannot be seen from within a new PID namespace */
  int in_new_namespaces; /* the process was cloned with confine_clone_flags */
};

/* Before exec. 0, or -1 with errno and the step that failed. */
int confine_loading(const struct confine_loading *how, const char **step);

/* At the fork point, with one thread. Returns the layers that hold, or -1 with errno. */
int confine_zygote(unsigned layers, const char **step);

/* In the child, with one thread and its files in place. 0, or -1 with errno. */
int confine_run(unsigned layers, const struct confine_limits *limits, pid_t parent, const char **step);

/* In a process executed for one run, which has its limits already. As confine_zygote. */
int confine_exec_run(unsigned layers, const char **step);

#endif
