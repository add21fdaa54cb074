/*
 * The spawner: starts one process for each run, bounds it, reaps it, and says how it ended.
 *
 * What it is: a single-threaded process, the child of the service. It exists because the service is
 * a large, threaded Python process, which must not fork (locks of other threads, and milliseconds of
 * copied page tables), and whose own resident size would otherwise be counted as its children's.
 * What it owns: the runs' processes and their pidfds, the read ends of their standard error. It
 * parses nothing that a guest wrote. It opens no file after its start.
 * Who waits for it: the service, on the other end of the control socket (protocol.h).
 *
 * A run's standard input and output are files of the service's that the spawner only hands on.
 * Standard error goes through a pipe that the spawner empties, because a file would have to share
 * RLIMIT_FSIZE with standard output: a run that talks too much on standard error shall lose words,
 * not its life.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

#define CONTROL_FD 3
#define EVENTS_PER_WAIT 64
#define NANOSECONDS_PER_SECOND 1000000000ull
/* SIGKILL must not beat SIGPROF, which names the limit: RLIMIT_CPU counts whole seconds. */
#define CPU_BACKSTOP_SECONDS 2
/* What is read of a pipe after its run has ended: all that the largest pipe can hold (1 MiB unless
 * root enlarged it). A bound, because a process that left the run's group may go on writing. */
#define MOST_LAST_READS 16

struct run;

/* What an epoll event is about. */
struct source {
  enum { SOURCE_CONTROL, SOURCE_PROCESS, SOURCE_STDERR } kind;
  struct run *run;
};

struct run {
  struct run *next;
  struct source process, errors; /* for epoll */
  uint64_t id;
  pid_t pid;
  int pidfd;
  int errors_fd;      /* read end of the pipe that is the run's standard error */
  int errors_file_fd; /* where the service wants it */
  uint64_t errors_room_bytes;
  int errors_truncated;
  int cpu; /* index into cpus, or -1 */
  uint64_t started_at, deadline;
  enum end_reason reason;
  int ended; /* reaped; waits for its reply to be sent and for the end of the event batch */
  union {
    struct ended_reply ended;
    struct failed_reply failed;
  } reply;
  size_t reply_bytes; /* 0: no reply is due yet */
};

/* Everything a child needs between vfork and exec, made beforehand: it shares our memory. */
struct launch {
  const struct run_request *limits;
  char **argv, **envp;
  int files[BULKHEAD_MAX_FILES]; /* to become 0, 1, 2, ... */
  int file_count;
  int cpu;
  pid_t parent;
  /* Written by the child, read by us after vfork returns. */
  volatile int failed_stage, failed_errno;
};

static struct {
  int epoll_fd;
  struct run *runs;
  unsigned cpus[CPU_SETSIZE];
  int cpu_load[CPU_SETSIZE], cpu_count;
  int replies_blocked; /* the socket is full; EPOLLOUT is armed */
} spawner;

/* ---- small things -------------------------------------------------------------------------- */

static void __attribute__((noreturn)) die(const char *what) {
  int saved = errno;
  dprintf(STDERR_FILENO, "bulkhead-spawner: %s: %s\n", what, strerror(saved));
  _exit(70);
}

static uint64_t now_nanoseconds(void) {
  struct timespec t;
  if (clock_gettime(CLOCK_MONOTONIC, &t) != 0) die("clock_gettime");
  return (uint64_t)t.tv_sec * NANOSECONDS_PER_SECOND + (uint64_t)t.tv_nsec;
}

static uint64_t timeval_nanoseconds(struct timeval t) {
  return (uint64_t)t.tv_sec * NANOSECONDS_PER_SECOND + (uint64_t)t.tv_usec * 1000u;
}

static void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

static struct message_header header_of(enum message_type type, uint64_t run_id) {
  return (struct message_header){BULKHEAD_PROTOCOL_MAGIC, BULKHEAD_PROTOCOL_VERSION, (uint16_t)type, run_id};
}

static int watch(int fd, struct source *source) {
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};
  return epoll_ctl(spawner.epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

/* ---- placement ----------------------------------------------------------------------------- */

static void find_cpus(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return; /* more CPUs than fit: runs stay unpinned */
  for (unsigned cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &set)) spawner.cpus[spawner.cpu_count++] = cpu;
}

/* The CPU with the fewest runs, or -1. One CPU for all threads of a run halves its cost. */
static int choose_cpu(void) {
  if (spawner.cpu_count < 2) return -1;
  int best = 0;
  for (int i = 1; i < spawner.cpu_count; i++)
    if (spawner.cpu_load[i] < spawner.cpu_load[best]) best = i;
  return best;
}

/* ---- the child, between vfork and exec ------------------------------------------------------ */

/* It shares the spawner's memory until exec: only system calls, and no return to the caller. */

static void __attribute__((noreturn)) child_fails(struct launch *launch, enum failure_stage stage) {
  launch->failed_errno = errno;
  launch->failed_stage = (int)stage;
  _exit(127);
}

static int limit(int resource, uint64_t value) {
  /* Never above a hard limit that the service itself was given. */
  struct rlimit old, new;
  if (getrlimit(resource, &old) != 0) return -1;
  new.rlim_max = old.rlim_max != RLIM_INFINITY && value > old.rlim_max ? old.rlim_max : value;
  new.rlim_cur = new.rlim_max;
  return setrlimit(resource, &new);
}

static int limit_cpu(uint64_t nanoseconds) {
  uint64_t seconds = nanoseconds / NANOSECONDS_PER_SECOND + CPU_BACKSTOP_SECONDS;
  struct itimerval timer = {.it_value = {.tv_sec = (time_t)(nanoseconds / NANOSECONDS_PER_SECOND),
                                         .tv_usec = (suseconds_t)(nanoseconds % NANOSECONDS_PER_SECOND / 1000)}};
  if (timer.it_value.tv_sec == 0 && timer.it_value.tv_usec == 0) timer.it_value.tv_usec = 1;
  /* Unlike a limit that exec resets, an interval timer goes on counting across it. */
  return setitimer(ITIMER_PROF, &timer, NULL) != 0 || limit(RLIMIT_CPU, seconds) != 0 ? -1 : 0;
}

static int confine(const struct launch *launch) {
  const struct run_request *limits = launch->limits;
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return -1;
  if (getppid() != launch->parent) return -1; /* the spawner died before the line above */
  if (setpgid(0, 0) != 0) return -1;          /* killed as a group */
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return -1;
  if (launch->cpu >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(spawner.cpus[launch->cpu], &set);
    sched_setaffinity(0, sizeof set, &set); /* a CPU that was taken away meanwhile: run anywhere */
  }
  if (limit(RLIMIT_CORE, 0) != 0 || limit(RLIMIT_FSIZE, limits->file_bytes) != 0 ||
      limit(RLIMIT_NOFILE, limits->open_files) != 0 || limit(RLIMIT_MEMLOCK, 0) != 0 ||
      limit(RLIMIT_MSGQUEUE, 0) != 0 || limit(RLIMIT_DATA, limits->data_bytes) != 0 ||
      limit(RLIMIT_AS, limits->address_bytes) != 0)
    return -1;
  return limit_cpu(limits->cpu_nanoseconds);
}

/* Puts files[i] at descriptor i and closes all others. The files lie above: reserve_low_descriptors. */
static int place_files(const struct launch *launch) {
  for (int i = 0; i < launch->file_count; i++)
    if (dup2(launch->files[i], i) < 0) return -1;
  if (syscall(SYS_close_range, (unsigned)launch->file_count, ~0u, 0) == 0) return 0;
  if (errno != ENOSYS) return -1;
  /* Linux before 5.9. All descriptors of ours are close-on-exec: this is the second lock. */
  long most = sysconf(_SC_OPEN_MAX);
  for (int fd = launch->file_count; fd < (most > 0 && most < 4096 ? most : 4096); fd++) close(fd);
  return 0;
}

static void __attribute__((noreturn)) be_child(struct launch *launch) {
  /* Files first: RLIMIT_NOFILE would refuse the dup2, and every limit set later binds only the run. */
  if (place_files(launch) != 0) child_fails(launch, STAGE_CONFINE);
  if (confine(launch) != 0) child_fails(launch, STAGE_CONFINE);
  execve(launch->argv[0], launch->argv, launch->envp);
  child_fails(launch, STAGE_EXEC);
}

/* ---- starting ------------------------------------------------------------------------------ */

/* Splits the strings behind the request into argv and envp. 0, or -1 with EINVAL. */
static int split_strings(const struct run_request *request, size_t size, char **argv, char **envp) {
  char *at = (char *)(request + 1), *end = (char *)request + size;
  uint64_t count = (uint64_t)request->argument_count + request->environment_count;
  if (request->argument_count == 0 || count > BULKHEAD_MAX_STRINGS) goto invalid;
  for (uint64_t i = 0; i < count; i++) {
    char *stop = at < end ? memchr(at, 0, (size_t)(end - at)) : NULL;
    if (stop == NULL) goto invalid;
    if (i < request->argument_count) argv[i] = at;
    else envp[i - request->argument_count] = at;
    at = stop + 1;
  }
  argv[request->argument_count] = NULL;
  envp[request->environment_count] = NULL;
  if (at == end) return 0;
invalid:
  errno = EINVAL;
  return -1;
}

static int open_errors_pipe(struct run *run, int *write_end) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return -1;
  run->errors_fd = ends[0];
  *write_end = ends[1];
  return fcntl(run->errors_fd, F_SETFL, O_NONBLOCK);
}

/* vfork and not fork: nothing is copied, and the exec that must follow is the point of it all. */
static pid_t __attribute__((noinline)) vfork_child(struct launch *launch) {
  pid_t pid = vfork();
  if (pid == 0) be_child(launch);
  return pid;
}

static void kill_and_reap(pid_t pid) {
  kill(-pid, SIGKILL);
  kill(pid, SIGKILL);
  while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) continue;
}

/* Starts the process. Returns 0, or the stage that failed with errno set; then no process is left. */
static int start_process(struct run *run, struct launch *launch) {
  int write_end = -1, failed = 0;
  if (open_errors_pipe(run, &write_end) != 0) {
    failed = STAGE_PREPARE;
    goto done;
  }
  launch->files[2] = write_end;
  launch->cpu = launch->limits->pin_cpu ? choose_cpu() : -1;
  launch->parent = getpid();
  run->started_at = now_nanoseconds();
  pid_t pid = vfork_child(launch);
  if (pid < 0) {
    failed = STAGE_PREPARE;
  } else if (launch->failed_stage != 0) {
    kill_and_reap(pid);
    errno = launch->failed_errno;
    failed = launch->failed_stage;
  } else if ((run->pidfd = (int)syscall(SYS_pidfd_open, pid, 0)) < 0 ||
             watch(run->pidfd, &run->process) != 0 || watch(run->errors_fd, &run->errors) != 0) {
    int saved = errno;
    kill_and_reap(pid);
    errno = saved;
    failed = STAGE_PREPARE;
  } else {
    run->pid = pid;
    run->cpu = launch->cpu;
    if (run->cpu >= 0) spawner.cpu_load[run->cpu]++;
  }
done:;
  int saved = errno;
  close_fd(&write_end);
  if (failed != 0) { /* now and not with the reply, which may have to wait: they would wake us for ever */
    close_fd(&run->pidfd);
    close_fd(&run->errors_fd);
  }
  errno = saved;
  return failed;
}

/* ---- replies ------------------------------------------------------------------------------- */

static void arm_control(uint32_t events) {
  static struct source control = {.kind = SOURCE_CONTROL, .run = NULL};
  struct epoll_event event = {.events = events, .data.ptr = &control};
  if (epoll_ctl(spawner.epoll_fd, EPOLL_CTL_MOD, CONTROL_FD, &event) != 0 &&
      epoll_ctl(spawner.epoll_fd, EPOLL_CTL_ADD, CONTROL_FD, &event) != 0)
    die("epoll_ctl on the control socket");
}

static void __attribute__((noreturn)) leave(void) {
  for (struct run *run = spawner.runs; run != NULL; run = run->next)
    if (!run->ended) kill(-run->pid, SIGKILL);
  _exit(0);
}

/* Sends what is due, as far as the socket takes it. A run whose reply is sent is `id` 0. */
static void send_replies(void) {
  int blocked = 0;
  for (struct run *run = spawner.runs; run != NULL; run = run->next) {
    if (run->reply_bytes == 0) continue;
    ssize_t sent = send(CONTROL_FD, &run->reply, run->reply_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      run->reply_bytes = 0;
    } else if (errno == EAGAIN || errno == ENOBUFS || errno == EINTR) {
      blocked = 1;
      break;
    } else {
      leave(); /* the service is gone */
    }
  }
  if (blocked != spawner.replies_blocked) {
    spawner.replies_blocked = blocked;
    /* While nobody reads our replies, take no new work. */
    arm_control(blocked ? EPOLLOUT : EPOLLIN);
  }
}

static void fail_run(struct run *run, enum failure_stage stage, int error) {
  run->ended = 1;
  run->reply.failed = (struct failed_reply){header_of(MESSAGE_FAILED, run->id), (uint32_t)stage, error};
  run->reply_bytes = sizeof run->reply.failed;
}

/* Frees what has ended and been told. Only between batches: events of a batch may point to it. */
static void sweep_runs(void) {
  for (struct run **at = &spawner.runs; *at != NULL;) {
    struct run *run = *at;
    if (run->ended && run->reply_bytes == 0) {
      *at = run->next;
      close_fd(&run->pidfd);
      close_fd(&run->errors_fd);
      close_fd(&run->errors_file_fd);
      free(run);
    } else {
      at = &run->next;
    }
  }
}

/* ---- a run's life -------------------------------------------------------------------------- */

enum pipe_state { PIPE_ENDED, PIPE_EMPTY, PIPE_READ };

/* Reads what is in the pipe now, and keeps what there is room for. */
static enum pipe_state read_errors(struct run *run) {
  static char buffer[65536];
  ssize_t got = read(run->errors_fd, buffer, sizeof buffer);
  if (got == 0) return PIPE_ENDED;
  if (got < 0) return PIPE_EMPTY;
  size_t keep = (uint64_t)got < run->errors_room_bytes ? (size_t)got : (size_t)run->errors_room_bytes;
  if (keep < (size_t)got) run->errors_truncated = 1;
  if (keep > 0) {
    ssize_t kept = write(run->errors_file_fd, buffer, keep);
    if (kept < (ssize_t)keep) run->errors_truncated = 1;
    run->errors_room_bytes -= keep;
  }
  return PIPE_READ;
}

static void on_errors(struct run *run) {
  if (run->ended || run->errors_fd < 0) return;
  if (read_errors(run) == PIPE_ENDED) close_fd(&run->errors_fd); /* closed by the run; leaves epoll, too */
}

static void kill_run(struct run *run, enum end_reason reason) {
  if (run->ended || run->reason != END_BY_ITSELF) return;
  run->reason = reason;
  run->deadline = UINT64_MAX;
  kill(-run->pid, SIGKILL);
}

static void on_process_end(struct run *run) {
  struct rusage usage;
  int status;
  if (run->ended) return;
  uint64_t wall = now_nanoseconds() - run->started_at;
  /* What the process may have left behind, before its number is free for others. */
  kill(-run->pid, SIGKILL);
  pid_t reaped;
  while ((reaped = wait4(run->pid, &status, 0, &usage)) < 0 && errno == EINTR) continue;
  if (reaped < 0) die("wait4");
  for (int i = 0; i < MOST_LAST_READS && run->errors_fd >= 0 && read_errors(run) == PIPE_READ; i++) continue;
  if (run->cpu >= 0) spawner.cpu_load[run->cpu]--;
  close_fd(&run->pidfd);
  close_fd(&run->errors_fd);
  close_fd(&run->errors_file_fd);
  run->ended = 1;
  run->reply.ended = (struct ended_reply){
      .header = header_of(MESSAGE_ENDED, run->id),
      .wait_status = status,
      .reason = (uint32_t)run->reason,
      .wall_nanoseconds = wall,
      .cpu_nanoseconds = timeval_nanoseconds(usage.ru_utime) + timeval_nanoseconds(usage.ru_stime),
      .peak_resident_bytes = (uint64_t)usage.ru_maxrss * 1024u,
      .stderr_truncated = (uint32_t)run->errors_truncated,
  };
  run->reply_bytes = sizeof run->reply.ended;
}

/* ---- requests ------------------------------------------------------------------------------ */

static struct run *find_run(uint64_t id) {
  for (struct run *run = spawner.runs; run != NULL; run = run->next)
    if (run->id == id && !run->ended) return run;
  return NULL;
}

static struct run *new_run(uint64_t id) {
  struct run *run = calloc(1, sizeof *run);
  if (run == NULL) die("calloc");
  run->process = (struct source){SOURCE_PROCESS, run};
  run->errors = (struct source){SOURCE_STDERR, run};
  run->id = id;
  run->pidfd = run->errors_fd = run->errors_file_fd = run->cpu = -1;
  run->deadline = UINT64_MAX;
  run->next = spawner.runs;
  spawner.runs = run;
  return run;
}

static void handle_run(const struct run_request *request, size_t size, int *files, int file_count) {
  static char *argv[BULKHEAD_MAX_STRINGS + 1], *envp[BULKHEAD_MAX_STRINGS + 1];
  struct launch launch = {.limits = request, .argv = argv, .envp = envp, .file_count = file_count};
  struct run *run = new_run(request->header.run_id);
  int stage = 0;
  if (file_count < 3 || split_strings(request, size, argv, envp) != 0) {
    errno = EINVAL;
    stage = STAGE_REQUEST;
  } else {
    memcpy(launch.files, files, (size_t)file_count * sizeof files[0]);
    stage = start_process(run, &launch);
  }
  int saved = errno;
  for (int i = 0; i < file_count; i++)
    if (i != 2 || stage != 0) close_fd(&files[i]);
  if (stage != 0) {
    fail_run(run, (enum failure_stage)stage, saved);
    return;
  }
  run->errors_file_fd = files[2];
  run->errors_room_bytes = request->stderr_bytes;
  uint64_t wall = request->wall_nanoseconds;
  run->deadline = wall < UINT64_MAX - run->started_at ? run->started_at + wall : UINT64_MAX;
}

/* Takes the descriptors out of a message, and returns their number. */
static int take_files(struct msghdr *message, int *files) {
  int count = 0;
  for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    int here = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    for (int i = 0; i < here; i++) {
      int fd;
      memcpy(&fd, CMSG_DATA(c) + (size_t)i * sizeof fd, sizeof fd);
      if (count < BULKHEAD_MAX_FILES) files[count++] = fd;
      else close(fd);
    }
  }
  return count;
}

/* `lost` is 0, or the errno that says why a part of the message did not arrive. */
static void handle_request(const char *buffer, size_t size, int *files, int file_count, int lost) {
  const struct message_header *header = (const struct message_header *)buffer;
  if (size < sizeof *header || header->magic != BULKHEAD_PROTOCOL_MAGIC ||
      header->version != BULKHEAD_PROTOCOL_VERSION) {
    errno = EPROTO;
    die("the service speaks another protocol; reinstall Bulkhead");
  }
  struct run *run;
  if (header->type == MESSAGE_RUN && size >= sizeof(struct run_request) && !lost) {
    handle_run((const struct run_request *)buffer, size, files, file_count);
    return;
  }
  if (header->type == MESSAGE_RUN) fail_run(new_run(header->run_id), STAGE_REQUEST, lost ? lost : EPROTO);
  else if (header->type == MESSAGE_KILL && (run = find_run(header->run_id)) != NULL) kill_run(run, END_KILLED);
  for (int i = 0; i < file_count; i++) close(files[i]);
}

static void on_request(void) {
  static union {
    struct message_header align;
    char bytes[BULKHEAD_MAX_MESSAGE_BYTES];
  } buffer;
  char control[CMSG_SPACE(sizeof(int) * BULKHEAD_MAX_FILES)] __attribute__((aligned(8)));
  struct iovec part = {.iov_base = buffer.bytes, .iov_len = sizeof buffer.bytes};
  struct msghdr message = {
      .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  ssize_t size = recvmsg(CONTROL_FD, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (size <= 0) leave();
  int files[BULKHEAD_MAX_FILES];
  int count = take_files(&message, files);
  int lost = message.msg_flags & MSG_TRUNC ? E2BIG : 0;
  if (message.msg_flags & MSG_CTRUNC) lost = EMFILE; /* too many descriptors, or our table is full */
  handle_request(buffer.bytes, (size_t)size, files, count, lost);
}

/* ---- the loop ------------------------------------------------------------------------------ */

/* Milliseconds to the next deadline, rounded up: waking early would spin. -1: none. */
static int milliseconds_to_wait(void) {
  uint64_t next = UINT64_MAX;
  for (struct run *run = spawner.runs; run != NULL; run = run->next)
    if (!run->ended && run->deadline < next) next = run->deadline;
  if (next == UINT64_MAX) return -1;
  uint64_t now = now_nanoseconds();
  if (next <= now) return 0;
  uint64_t milliseconds = (next - now + 999999) / 1000000;
  return milliseconds < 3600000 ? (int)milliseconds : 3600000;
}

static void kill_overdue(void) {
  uint64_t now = now_nanoseconds();
  for (struct run *run = spawner.runs; run != NULL; run = run->next)
    if (!run->ended && run->deadline <= now) kill_run(run, END_WALL_TIME);
}

static void serve(void) {
  struct epoll_event events[EVENTS_PER_WAIT];
  int count = epoll_wait(spawner.epoll_fd, events, EVENTS_PER_WAIT, milliseconds_to_wait());
  if (count < 0 && errno != EINTR) die("epoll_wait");
  for (int i = 0; i < count; i++) {
    struct source *source = events[i].data.ptr;
    if (source->kind == SOURCE_PROCESS) on_process_end(source->run);
    else if (source->kind == SOURCE_STDERR) on_errors(source->run);
    else if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_request();
  }
  kill_overdue();
  send_replies();
  sweep_runs();
}

static void reset_signals(void) {
  /* Python ignores SIGPIPE and SIGXFSZ, and exec would pass that on to every run. */
  for (int number = 1; number < NSIG; number++)
    if (number != SIGKILL && number != SIGSTOP) signal(number, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  if (sigprocmask(SIG_SETMASK, &none, NULL) != 0) die("sigprocmask");
}

static void raise_open_files(void) {
  struct rlimit files;
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files); /* not more than the hard limit: it cannot fail for us */
}

static void prefer_as_oom_victim(void) {
  /* When memory is short, runs go before the service. The runs inherit it. */
  int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (fd < 0) return; /* no /proc: nothing to adjust */
  if (write(fd, "500", 3) != 3) errno = 0;
  close(fd);
}

/* Takes the numbers that a run's files get, so that no descriptor of ours ever has one of them and
 * the child can put the files there in any order. */
static void reserve_low_descriptors(void) {
  int fd;
  do {
    fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (fd < 0) die("/dev/null");
  } while (fd < BULKHEAD_MAX_FILES);
  close(fd);
}

#define PRINT_SIZE(type) printf("%s %zu\n", #type, sizeof(struct type))
#define PRINT_OFFSET(type, field) printf("%s.%s %zu\n", #type, #field, offsetof(struct type, field))

/* For the test that compares this end of the protocol with the other one. */
static int print_protocol(void) {
  printf("magic %u\nversion %d\n", BULKHEAD_PROTOCOL_MAGIC, BULKHEAD_PROTOCOL_VERSION);
  printf("types %d %d %d %d %d\n", MESSAGE_HELLO, MESSAGE_RUN, MESSAGE_KILL, MESSAGE_ENDED, MESSAGE_FAILED);
  printf("reasons %d %d %d\n", END_BY_ITSELF, END_WALL_TIME, END_KILLED);
  printf("stages %d %d %d %d\n", STAGE_REQUEST, STAGE_PREPARE, STAGE_CONFINE, STAGE_EXEC);
  printf("maximums %d %d %d\n", BULKHEAD_MAX_MESSAGE_BYTES, BULKHEAD_MAX_FILES, BULKHEAD_MAX_STRINGS);
  PRINT_SIZE(message_header);
  PRINT_OFFSET(message_header, magic);
  PRINT_OFFSET(message_header, version);
  PRINT_OFFSET(message_header, type);
  PRINT_OFFSET(message_header, run_id);
  PRINT_SIZE(run_request);
  PRINT_OFFSET(run_request, wall_nanoseconds);
  PRINT_OFFSET(run_request, cpu_nanoseconds);
  PRINT_OFFSET(run_request, data_bytes);
  PRINT_OFFSET(run_request, address_bytes);
  PRINT_OFFSET(run_request, file_bytes);
  PRINT_OFFSET(run_request, stderr_bytes);
  PRINT_OFFSET(run_request, open_files);
  PRINT_OFFSET(run_request, pin_cpu);
  PRINT_OFFSET(run_request, argument_count);
  PRINT_OFFSET(run_request, environment_count);
  PRINT_SIZE(ended_reply);
  PRINT_OFFSET(ended_reply, wait_status);
  PRINT_OFFSET(ended_reply, reason);
  PRINT_OFFSET(ended_reply, wall_nanoseconds);
  PRINT_OFFSET(ended_reply, cpu_nanoseconds);
  PRINT_OFFSET(ended_reply, peak_resident_bytes);
  PRINT_OFFSET(ended_reply, stderr_truncated);
  PRINT_OFFSET(ended_reply, reserved);
  PRINT_SIZE(failed_reply);
  PRINT_OFFSET(failed_reply, stage);
  PRINT_OFFSET(failed_reply, error);
  return 0;
}

int main(int argc, char **argv) {
  if (argc == 2 && strcmp(argv[1], "--protocol") == 0) return print_protocol();
  if (fcntl(CONTROL_FD, F_SETFD, FD_CLOEXEC) != 0) die("no control socket at descriptor 3");
  syscall(SYS_close_range, CONTROL_FD + 1u, ~0u, 0); /* what a library of the service's left open */
  reset_signals();
  prefer_as_oom_victim(); /* before the next line, which gives /proc/self to root */
  if (prctl(PR_SET_DUMPABLE, 0) != 0) die("prctl");
  if (chdir("/") != 0) die("chdir");
  raise_open_files();
  reserve_low_descriptors();
  find_cpus();
  if ((spawner.epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
  arm_control(EPOLLIN);
  struct message_header hello = header_of(MESSAGE_HELLO, 0);
  if (send(CONTROL_FD, &hello, sizeof hello, MSG_NOSIGNAL) != (ssize_t)sizeof hello) die("send");
  for (;;) serve();
}
