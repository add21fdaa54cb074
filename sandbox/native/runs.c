/* A run's life, from its request to its reply. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "spawner.h"

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif

/* What is read of a pipe after its run has ended: all that the largest pipe can hold (1 MiB unless
 * root enlarged it). A bound, because what left the run's group may go on writing. */
#define MOST_LAST_READS 16
/* From SIGKILL to the zygote's word that the run has ended. Later it is the zygote that hangs. */
/* A run's standard error is left in its pipe, which holds 64 KiB, until the run has taken so long: most
 * are over by then, and need not be watched. */
#define DRAIN_NANOSECONDS (2 * NANOSECONDS_PER_SECOND / 1000)
#define ZYGOTE_PATIENCE_NANOSECONDS (NANOSECONDS_PER_SECOND / 2)

struct run *runs;

static uint64_t nanoseconds(struct timeval time) {
  return (uint64_t)time.tv_sec * NANOSECONDS_PER_SECOND + (uint64_t)time.tv_usec * 1000u;
}

struct run *find_run(const struct client *client, uint64_t id) {
  for (struct run *run = runs; run != NULL; run = run->next)
    if (run->client == client && run->id == id && !run->ended) return run;
  return NULL;
}

struct run *find_run_by_number(uint64_t number) {
  for (struct run *run = runs; run != NULL; run = run->next)
    if (run->number == number && !run->ended) return run;
  return NULL;
}

static struct run *new_run(struct client *client, uint64_t id) {
  static uint64_t last_number;
  struct run *run = calloc(1, sizeof *run);
  if (run == NULL) die("calloc");
  run->process = (struct source){SOURCE_PROCESS, {.run = run}};
  run->errors_source = (struct source){SOURCE_STDERR, {.run = run}};
  run->errors_fd = run->pidfd = run->input_fd = run->output_fd = run->cpu = -1;
  run->id = id;
  run->number = ++last_number;
  run->client = client;
  run->deadline = run->drain_at = UINT64_MAX;
  run->next = runs;
  runs = run;
  return run;
}

/* ---- the beginning --------------------------------------------------------------------------- */

/* Standard input: what came with the message, or the file that did. 0, or -1 with errno. */
static int open_input(struct run *run, const struct run_message *message, size_t size, int *files, int count) {
  if (count == 1) {
    run->input_fd = files[0];
    files[0] = -1;
    return 0;
  }
  if (count != 0 || message->stdin_bytes != size - sizeof *message) {
    errno = EINVAL;
    return -1;
  }
  if ((run->input_fd = new_memfile("stdin")) < 0) return -1;
  const char *bytes = (const char *)(message + 1);
  for (size_t done = 0; done < message->stdin_bytes;) {
    ssize_t wrote = pwrite(run->input_fd, bytes + done, message->stdin_bytes - done, (off_t)done);
    if (wrote < 0) return -1;
    done += (size_t)wrote;
  }
  return 0;
}

static int open_outputs(struct run *run, int *errors_write_end) {
  int ends[2];
  if ((run->output_fd = new_memfile("stdout")) < 0 || pipe2(ends, O_CLOEXEC) != 0) return -1;
  run->errors_fd = ends[0];
  *errors_write_end = ends[1];
  return fcntl(run->errors_fd, F_SETFL, O_NONBLOCK) != 0 ? -1 : 0;
}

static int execute(struct run *run, const int *standard_files) {
  struct program *program = run->program;
  int cpu = run->pinned ? choose_cpu() : -1;
  struct launch launch = {
      .argv = program->argv,
      .envp = program->envp,
      .file_count = program->file_count,
      .limits = &run->limits,
      .layers = program->layers,
      .cpu = cpu,
  };
  memcpy(launch.files, program->files, sizeof program->files);
  memcpy(launch.files, standard_files, 3 * sizeof standard_files[0]);
  int stage = launch_process(&launch, &run->pid, &run->pidfd);
  if (stage == 0 && watch(run->pidfd, &run->process) != 0) {
    int saved = errno;
    kill_and_reap(run->pid);
    errno = saved;
    stage = STAGE_PREPARE;
  }
  if (stage == 0) {
    run->cpu = cpu;
    take_cpu(cpu, 1);
  }
  return stage;
}

/* Returns 0, or the stage that failed with errno set. */
static int start_run(struct run *run, const struct run_message *message) {
  int write_end = -1, stage = STAGE_PREPARE;
  if (open_outputs(run, &write_end) != 0) goto done;
  int standard_files[3] = {run->input_fd, run->output_fd, write_end};
  run->pinned = message->pin_cpu;
  stage = run_in_zygote(run, standard_files) == 0 ? 0 : execute(run, standard_files);
done:;
  int saved = errno;
  close_fd(&write_end);
  close_fd(&run->input_fd);
  errno = saved;
  return stage;
}

void begin_run(struct client *client, const struct run_message *message, size_t size, int *files, int count, int lost) {
  struct run *run = new_run(client, message->header.run_id);
  int stage = STAGE_REQUEST;
  errno = lost;
  if (!lost && (run->program = find_program(message->key)) == NULL) errno = client->lost != 0 ? client->lost : ENOENT;
  if (run->program != NULL) {
    run->program->uses++;
    run->limits = message->limits;
    run->errors_most_bytes = message->stderr_bytes;
    run->started_at = run->program->used_at = now_nanoseconds();
    stage = open_input(run, message, size, files, count) != 0 ? (errno == EINVAL ? STAGE_REQUEST : STAGE_PREPARE)
                                                               : start_run(run, message);
  }
  int saved = errno;
  for (int i = 0; i < count; i++) close_fd(&files[i]);
  if (stage == 0) {
    run->drain_at = run->started_at + DRAIN_NANOSECONDS;
    uint64_t wall = message->wall_nanoseconds;
    if (!run->overdue) run->deadline = wall < UINT64_MAX - run->started_at ? run->started_at + wall : UINT64_MAX;
  } else {
    fail_run(run, (enum failure_stage)stage, saved);
  }
}

void on_run_started(struct run *run, int pidfd) {
  run->pidfd = pidfd;
  if (run->overdue) syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0); /* killed meanwhile */
}

/* ---- standard error ------------------------------------------------------------------------- */

enum pipe_state { PIPE_ENDED, PIPE_EMPTY, PIPE_READ };

static void keep_errors(struct run *run, const char *bytes, uint64_t size) {
  uint64_t room = run->errors_most_bytes - run->errors_bytes;
  uint64_t keep = size < room ? size : room;
  if (keep < size) run->errors_truncated = 1;
  if (keep == 0) return;
  char *grown = realloc(run->errors, run->errors_bytes + keep);
  if (grown == NULL) {
    run->errors_truncated = 1;
    return;
  }
  memcpy(grown + run->errors_bytes, bytes, keep);
  run->errors = grown;
  run->errors_bytes += keep;
}

/* Reads what is in the pipe now, and keeps what there is room for. */
static enum pipe_state read_errors(struct run *run) {
  static char buffer[65536];
  ssize_t got = read(run->errors_fd, buffer, sizeof buffer);
  if (got == 0) return PIPE_ENDED;
  if (got < 0) return PIPE_EMPTY;
  keep_errors(run, buffer, (uint64_t)got);
  return PIPE_READ;
}

void on_run_errors(struct run *run) {
  if (run->ended || run->errors_fd < 0) return;
  if (read_errors(run) == PIPE_ENDED) close_fd(&run->errors_fd); /* closed by the run; leaves epoll, too */
}

static void watch_errors(struct run *run) {
  run->drain_at = UINT64_MAX;
  if (run->errors_fd >= 0 && watch(run->errors_fd, &run->errors_source) != 0) kill_run(run, END_BY_ITSELF);
}

uint64_t next_of_runs(void) {
  uint64_t next = UINT64_MAX;
  for (const struct run *run = runs; run != NULL; run = run->next) {
    if (run->ended) continue;
    if (run->deadline < next) next = run->deadline;
    if (run->drain_at < next) next = run->drain_at;
  }
  return next;
}

/* ---- the end ---------------------------------------------------------------------------------- */

void kill_run(struct run *run, enum end_reason reason) {
  if (run->ended || run->overdue) return;
  if (run->reason == END_BY_ITSELF) run->reason = reason;
  run->overdue = 1;
  run->deadline = UINT64_MAX;
  if (run->zygote == NULL) {
    kill(-run->pid, SIGKILL);
  } else {
    if (run->pidfd >= 0) syscall(SYS_pidfd_send_signal, run->pidfd, SIGKILL, NULL, 0);
    run->deadline = now_nanoseconds() + ZYGOTE_PATIENCE_NANOSECONDS;
  }
}

/* Nothing but the reply is left of it. */
static void close_run(struct run *run) {
  take_cpu(run->cpu, -1);
  run->cpu = -1;
  close_fd(&run->pidfd);
  close_fd(&run->errors_fd);
  close_fd(&run->input_fd);
  run->ended = 1;
  run->deadline = UINT64_MAX;
}

void fail_run(struct run *run, enum failure_stage stage, int error) {
  close_run(run);
  close_fd(&run->output_fd);
  free(run->errors);
  run->errors = NULL;
  run->errors_bytes = run->stdout_bytes = 0;
  run->reply.failed = (struct failed_message){message_header(MESSAGE_FAILED, run->id), (uint32_t)stage, error};
}

void end_run(struct run *run, int wait_status, uint64_t cpu_nanoseconds, uint64_t peak_resident_bytes,
             uint64_t touched_bytes) {
  struct stat output;
  if (run->ended) return;
  uint64_t wall = now_nanoseconds() - run->started_at;
  for (int i = 0; i < MOST_LAST_READS && run->errors_fd >= 0 && read_errors(run) == PIPE_READ; i++) continue;
  run->stdout_bytes = fstat(run->output_fd, &output) == 0 ? (uint64_t)output.st_size : 0;
  close_run(run);
  run->reply.ended = (struct ended_message){
      .header = message_header(MESSAGE_ENDED, run->id),
      .wait_status = wait_status,
      .reason = (uint32_t)run->reason,
      .wall_nanoseconds = wall,
      .cpu_nanoseconds = cpu_nanoseconds,
      .peak_resident_bytes = peak_resident_bytes,
      .touched_bytes = touched_bytes,
      .stdout_bytes = run->stdout_bytes,
      .stderr_truncated = (uint32_t)run->errors_truncated,
      .way = run->zygote != NULL ? WAY_ZYGOTE : WAY_EXEC,
      .layers = run->zygote != NULL ? run->zygote->layers : run->program->layers,
  };
}

/* An executed one. */
void on_run_exit(struct run *run) {
  struct rusage usage;
  int status;
  if (run->ended) return;
  /* What the process may have left behind, before its number is free for others. */
  kill(-run->pid, SIGKILL);
  pid_t reaped;
  while ((reaped = wait4(run->pid, &status, 0, &usage)) < 0 && errno == EINTR) continue;
  if (reaped < 0) die("wait4");
  end_run(run, status, nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime), (uint64_t)usage.ru_maxrss * 1024u,
          (uint64_t)usage.ru_minflt * (uint64_t)sysconf(_SC_PAGESIZE));
}

void attend_runs(void) {
  uint64_t now = now_nanoseconds();
  for (struct run *run = runs; run != NULL; run = run->next) {
    if (!run->ended && run->drain_at <= now) watch_errors(run);
    if (run->ended || run->deadline > now) continue;
    if (!run->overdue) {
      kill_run(run, END_WALL_TIME);
    } else if (run->zygote != NULL) { /* it was killed, and nobody says so */
      run->deadline = UINT64_MAX;
      kill_zygote(run->zygote);
    }
  }
}

/* ---- replies ---------------------------------------------------------------------------------- */

static union {
  struct message_header align;
  char bytes[BULKHEAD_MAX_MESSAGE_BYTES];
} reply_buffer;

/* Copies a part of what the run wrote, standard error first. Returns 0 where it cannot be read. */
static int copy_output(const struct run *run, uint64_t from, size_t size, char *target) {
  if (from < run->errors_bytes) {
    memcpy(target, run->errors + from, size);
    return 1;
  }
  for (size_t done = 0; done < size;) {
    ssize_t got = pread(run->output_fd, target + done, size - done, (off_t)(from - run->errors_bytes + done));
    if (got <= 0) return 0;
    done += (size_t)got;
  }
  return 1;
}

/* Sends what does not fit into the reply itself. 1: all is sent. */
static int send_output(struct run *run) {
  uint64_t all = run->errors_bytes + run->stdout_bytes;
  if (run->sent_bytes == 0 && all <= sizeof reply_buffer - sizeof(struct ended_message)) return 1;
  while (run->sent_bytes < all) {
    int errors = run->sent_bytes < run->errors_bytes;
    uint64_t left = (errors ? run->errors_bytes : all) - run->sent_bytes;
    size_t room = sizeof reply_buffer - sizeof(struct output_message);
    size_t size = left < room ? (size_t)left : room;
    struct output_message head = {message_header(MESSAGE_OUTPUT, run->id), errors ? 2 : 1, (uint32_t)size};
    memcpy(reply_buffer.bytes, &head, sizeof head);
    if (!copy_output(run, run->sent_bytes, size, reply_buffer.bytes + sizeof head))
      memset(reply_buffer.bytes + sizeof head, 0, size);
    int sent = send_to_client(run->client, reply_buffer.bytes, sizeof head + size);
    if (sent <= 0) return sent;
    run->sent_bytes += size;
  }
  return 1;
}

static int send_end(struct run *run) {
  struct ended_message *ended = &run->reply.ended;
  size_t size = sizeof *ended;
  if (run->sent_bytes == 0) {
    ended->stderr_here = (uint32_t)run->errors_bytes;
    ended->stdout_here = (uint32_t)run->stdout_bytes;
    char *target = reply_buffer.bytes + size;
    if ((run->errors_bytes > 0 && !copy_output(run, 0, run->errors_bytes, target)) ||
        (run->stdout_bytes > 0 && !copy_output(run, run->errors_bytes, run->stdout_bytes, target + run->errors_bytes)))
      ended->wait_status = SIGKILL; /* memory is so short that pages of the file cannot be had */
    size += run->errors_bytes + run->stdout_bytes;
  }
  memcpy(reply_buffer.bytes, ended, sizeof *ended);
  return send_to_client(run->client, reply_buffer.bytes, size);
}

static int send_reply(struct run *run) {
  if (run->reply.failed.header.type == MESSAGE_FAILED)
    return send_to_client(run->client, &run->reply.failed, sizeof run->reply.failed);
  int sent = send_output(run);
  return sent > 0 ? send_end(run) : sent;
}

/* Sends what is due, as far as the sockets take it. */
void send_replies(void) {
  for (struct run *run = runs; run != NULL; run = run->next) {
    if (!run->ended || run->replied || (run->client != NULL && run->client->blocked)) continue;
    if (run->client == NULL || send_reply(run) != 0) run->replied = 1;
  }
}

/* Frees what has ended and been told. Only between batches: events of a batch may point to it. */
void sweep_runs(void) {
  for (struct run **at = &runs; *at != NULL;) {
    struct run *run = *at;
    if (!run->replied) {
      at = &run->next;
      continue;
    }
    *at = run->next;
    close_fd(&run->output_fd);
    if (run->program != NULL) release_program(run->program);
    free(run->errors);
    free(run);
  }
}

void orphan_runs(const struct client *client) {
  for (struct run *run = runs; run != NULL; run = run->next) {
    if (run->client != client) continue;
    run->client = NULL;
    kill_run(run, END_KILLED);
  }
}
