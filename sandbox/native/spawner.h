/*
 * What the parts of the spawner share. One thread, one epoll, everything in lists.
 *
 *   spawner.c   the loop, the clients and their messages
 *   programs.c  what can be run
 *   zygotes.c   the processes that fork runs
 *   runs.c      a run's life, from its request to its reply
 *   process.c   executing a program in a confined child
 */
#ifndef BULKHEAD_SPAWNER_H
#define BULKHEAD_SPAWNER_H

#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "protocol.h"
#include "zygote_protocol.h"

#define MORE_VARIABLES 2 /* of a program that is wasmtime */
#define NANOSECONDS_PER_SECOND 1000000000ull

struct run;
struct zygote;
struct program;
struct client;

/* What an epoll event is about. */
struct source {
  enum { SOURCE_CLIENT, SOURCE_PROCESS, SOURCE_STDERR, SOURCE_ZYGOTE, SOURCE_ZYGOTE_PROCESS } kind;
  union {
    struct client *client;
    struct run *run;
    struct zygote *zygote;
  } of;
};

/* ---- the loop (spawner.c) ------------------------------------------------------------------ */

extern unsigned spawner_layers; /* of isolation that work here */
extern const char *spawner_library; /* the path of the library that is preloaded */

void __attribute__((noreturn)) die(const char *what);
uint64_t now_nanoseconds(void);
void close_fd(int *fd);
int watch(int fd, struct source *source); /* 0, or -1 with errno */
int new_memfile(const char *name); /* -1 with errno */
struct message_header message_header(enum message_type type, uint64_t run_id);
/* Makes the loop come around by this time. */
void wake_at(uint64_t when);

/* ---- clients (spawner.c) ------------------------------------------------------------------- */

struct reference { /* a client's claim on a program */
  struct reference *next;
  struct program *program;
};

struct client {
  struct client *next;
  struct source source;
  int fd; /* -1: gone */
  int blocked; /* its socket is full; EPOLLOUT is armed */
  struct reference *programs;
  int lost; /* errno of the last program that could not be registered; 0: none was lost */
};

extern struct client *clients;

/* 1: sent. 0: the socket is full. -1: the client is gone. */
int send_to_client(struct client *client, const void *message, size_t size);

/* ---- programs ------------------------------------------------------------------------------ */

struct program {
  struct program *next;
  uint8_t key[BULKHEAD_KEY_BYTES];
  int uses; /* clients' references, runs and zygotes; at 0 it goes */
  int wanted; /* clients' references alone; at 0 its zygote is retired */
  uint32_t flags, layers;
  uint64_t idle_nanoseconds, used_at;
  char *strings, *variables[MORE_VARIABLES];
  char **argv, **envp; /* point into these */
  int files[BULKHEAD_MAX_FILES];
  int file_count; /* the first three are not set: they are the run's */
  struct zygote *zygote; /* that takes runs; NULL: none */
  struct zygote *successor; /* that is being started */
  int unfit;
  uint64_t start_at; /* not before; UINT64_MAX: on demand */
  uint64_t pause_nanoseconds;
  uint64_t crashed_at;
  unsigned crashes;
};

extern struct program *programs;

struct program *find_program(const uint8_t *key);
/* Returns 0, or -1 with errno. Takes the files, whatever comes of it. */
int register_program(struct client *client, const struct program_message *message, size_t size, int *files, int count);
void forget_program(struct client *client, const uint8_t *key);
void forget_all_programs(struct client *client);
void release_program(struct program *program);

/* ---- processes ----------------------------------------------------------------------------- */

/* Everything a child needs before exec, made beforehand: it may share our memory. */
struct launch {
  char **argv, **envp;
  int files[BULKHEAD_MAX_FILES + 1]; /* to become 0, 1, 2, ... */
  int file_count;
  const struct confine_limits *limits; /* NULL: those of loading */
  unsigned layers;
  int as_zygote; /* the first of a PID namespace, where there are namespaces */
  int in_namespaces;
  int cpu; /* or -1 */
  pid_t parent;
};

/* Starts a process. Returns 0, or the stage that failed with errno set; then no process is left. */
int launch_process(struct launch *launch, pid_t *pid, int *pidfd);
void kill_and_reap(pid_t pid);
/* Index of the CPU with the fewest executed runs; -1 where there is no choice. */
int choose_cpu(void);
void find_cpus(void);
void take_cpu(int index, int change);
void set_up_launching(void);

/* ---- zygotes ------------------------------------------------------------------------------- */

struct zygote {
  struct zygote *next;
  struct source source, process;
  struct program *program;
  enum { ZYGOTE_IS_STARTING, ZYGOTE_IS_READY, ZYGOTE_IS_RETIRING, ZYGOTE_IS_DEAD } state;
  pid_t pid;
  int pidfd;
  int control_fd; /* -1: closed */
  unsigned layers;
  int active; /* runs */
  uint64_t served, started_at, deadline;
};

/* Asks the program's zygote for a run. 0, or -1: execute the program instead. */
int run_in_zygote(struct run *run, const int *files);
void on_zygote_message(struct zygote *zygote);
void on_zygote_end(struct zygote *zygote);
void kill_zygote(struct zygote *zygote);
void retire_zygotes(struct program *program);
/* Tells a client how it stands, where it has to do with a program that others use already. */
void tell_zygote_state(struct client *client, const struct program *program);
/* Starts, replaces and stops zygotes, where it is time. */
void tend_zygotes(void);
void sweep_zygotes(void);
void kill_all_zygotes(void);

/* ---- runs ---------------------------------------------------------------------------------- */

struct run {
  struct run *next;
  struct source process, errors_source; /* for epoll */
  uint64_t id; /* the client's */
  uint64_t number; /* ours, which no other run has */
  struct client *client; /* NULL: gone */
  struct program *program;
  struct zygote *zygote; /* NULL: it was executed */
  struct confine_limits limits;
  pid_t pid; /* of an executed one */
  int pidfd;
  int input_fd, output_fd;
  int errors_fd; /* read end of the pipe that is its standard error */
  char *errors;
  uint64_t errors_bytes, errors_most_bytes;
  int errors_truncated;
  uint32_t pinned;
  int cpu; /* of an executed one that is pinned: an index, or -1 */
  uint64_t started_at, deadline;
  uint64_t drain_at; /* when its standard error is to be watched */
  enum end_reason reason;
  int overdue; /* it was killed, and its end has not come */
  int ended; /* waits for its reply to be sent */
  int replied;
  uint64_t stdout_bytes, sent_bytes; /* the latter of both streams, standard error first */
  union {
    struct ended_message ended;
    struct failed_message failed;
  } reply;
};

extern struct run *runs;

void begin_run(struct client *client, const struct run_message *message, size_t size, int *files, int count, int lost);
struct run *find_run(const struct client *client, uint64_t id);
struct run *find_run_by_number(uint64_t number);
void kill_run(struct run *run, enum end_reason reason);
void fail_run(struct run *run, enum failure_stage stage, int error);
void end_run(struct run *run, int wait_status, uint64_t cpu_nanoseconds, uint64_t peak_resident_bytes,
             uint64_t touched_bytes);
void on_run_started(struct run *run, int pidfd);
void on_run_exit(struct run *run);
void on_run_errors(struct run *run);
/* Kills what is overdue, and watches the standard error of what takes longer. */
void attend_runs(void);
/* When they need attention next. */
uint64_t next_of_runs(void);
void send_replies(void);
void sweep_runs(void);
void orphan_runs(const struct client *client);

#endif
