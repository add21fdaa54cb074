/*
 * The spawner: starts one process for each run, bounds it, reaps it, and says how it ended.
 *
 * What it is: a single-threaded process, the child of the service. It exists because the service is
 * a large, threaded Python process, which must not fork (locks of other threads, and milliseconds of
 * copied page tables), and whose own resident size would otherwise be counted as its children's; and
 * because what is done in C here, is not done in Python for every run.
 * What it owns: the zygotes, the runs' processes and files. It parses nothing that a guest wrote. It
 * opens nothing but memory files after its start.
 * Who waits for it: its clients, on the other ends of their sockets (protocol.h).
 *
 * A run's standard input and output are files in memory. Standard error goes through a pipe that the
 * spawner empties, because a file would have to share RLIMIT_FSIZE with standard output: a run that
 * talks too much on standard error shall lose words, not its life.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "spawner.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x8 /* Linux 6.3: nobody can execute the file, ever; some hosts insist on it */
#endif

#define CONTROL_FD 3
#define EVENTS_PER_WAIT 64
#define LIBRARY_NAME "libbulkhead-zygote.so"

unsigned spawner_layers;
const char *spawner_library;
struct client *clients;

static struct {
  int epoll_fd;
  unsigned memfile_flags;
  uint64_t tend_at; /* when the zygotes are to be looked at */
  struct client *first;
} spawner;

/* ---- small things -------------------------------------------------------------------------- */

void die(const char *what) {
  int saved = errno;
  dprintf(STDERR_FILENO, "bulkhead-spawner: %s: %s\n", what, strerror(saved));
  _exit(70);
}

uint64_t now_nanoseconds(void) {
  struct timespec t;
  if (clock_gettime(CLOCK_MONOTONIC, &t) != 0) die("clock_gettime");
  return (uint64_t)t.tv_sec * NANOSECONDS_PER_SECOND + (uint64_t)t.tv_nsec;
}

void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

void wake_at(uint64_t when) {
  if (when < spawner.tend_at) spawner.tend_at = when;
}

struct message_header message_header(enum message_type type, uint64_t run_id) {
  return (struct message_header){BULKHEAD_PROTOCOL_MAGIC, BULKHEAD_PROTOCOL_VERSION, (uint16_t)type, run_id};
}

int watch(int fd, struct source *source) {
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};
  return epoll_ctl(spawner.epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

int new_memfile(const char *name) { return memfd_create(name, spawner.memfile_flags); }

/* ---- clients ---------------------------------------------------------------------------------- */

static void arm(struct client *client, uint32_t events) {
  struct epoll_event event = {.events = events, .data.ptr = &client->source};
  if (epoll_ctl(spawner.epoll_fd, EPOLL_CTL_MOD, client->fd, &event) != 0) die("epoll_ctl on a client's socket");
}

int send_to_client(struct client *client, const void *message, size_t size) {
  if (client->fd < 0) return -1;
  if (client->blocked) return 0;
  if (send(client->fd, message, size, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return 1;
  if (errno != EAGAIN && errno != ENOBUFS && errno != EINTR && errno != ENOMEM) return -1;
  client->blocked = 1;
  arm(client, EPOLLOUT); /* while nobody reads our replies, take no new work */
  return 0;
}

static void __attribute__((noreturn)) leave(void) {
  for (struct run *run = runs; run != NULL; run = run->next)
    if (!run->ended && run->zygote == NULL) kill(-run->pid, SIGKILL);
  kill_all_zygotes();
  _exit(0);
}

static void drop_client(struct client *client) {
  if (client == spawner.first) leave();
  if (client->fd < 0) return;
  close_fd(&client->fd);
  orphan_runs(client);
  forget_all_programs(client);
}

static int add_client(int fd) {
  struct client *client = calloc(1, sizeof *client);
  if (client == NULL) die("calloc");
  client->source = (struct source){SOURCE_CLIENT, {.client = client}};
  client->fd = fd;
  if (watch(fd, &client->source) != 0) {
    free(client);
    return -1;
  }
  struct hello_message hello = {.header = message_header(MESSAGE_HELLO, 0), .layers = spawner_layers};
  client->next = clients;
  clients = client;
  if (spawner.first == NULL) spawner.first = client;
  send_to_client(client, &hello, sizeof hello);
  return 0;
}

/* Only between batches of events, which may point to them. */
static void sweep_clients(void) {
  for (struct client **at = &clients; *at != NULL;) {
    struct client *client = *at;
    if (client->fd >= 0) {
      at = &client->next;
      continue;
    }
    *at = client->next;
    free(client);
  }
}

/* ---- requests --------------------------------------------------------------------------------- */

#define MOST_MESSAGE_FILES BULKHEAD_MAX_FILES

/* Takes the descriptors out of a message, and returns their number. */
static int take_files(struct msghdr *message, int *files) {
  int count = 0;
  for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    int here = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    for (int i = 0; i < here; i++) {
      int fd;
      memcpy(&fd, CMSG_DATA(c) + (size_t)i * sizeof fd, sizeof fd);
      if (count < MOST_MESSAGE_FILES) files[count++] = fd;
      else close(fd);
    }
  }
  return count;
}

/* `lost` is 0, or the errno that says why a part of the message did not arrive. Takes the files. */
static void handle_request(struct client *client, const char *buffer, size_t size, int *files, int count, int lost) {
  const struct message_header *header = (const struct message_header *)buffer;
  if (size < sizeof *header || header->magic != BULKHEAD_PROTOCOL_MAGIC ||
      header->version != BULKHEAD_PROTOCOL_VERSION) {
    errno = EPROTO;
    if (client == spawner.first) die("the service speaks another protocol; reinstall Bulkhead");
    for (int i = 0; i < count; i++) close(files[i]);
    drop_client(client);
    return;
  }
  struct run *run;
  if (header->type == MESSAGE_RUN) {
    if (size < sizeof(struct run_message) && !lost) lost = EPROTO;
    begin_run(client, (const struct run_message *)buffer, size, files, count, lost);
    return;
  }
  if (header->type == MESSAGE_PROGRAM && size >= sizeof(struct program_message)) {
    /* What could not be registered shows when it is to be run. */
    client->lost = lost;
    if (!lost) {
      if (register_program(client, (const struct program_message *)buffer, size, files, count) != 0)
        client->lost = errno;
      return;
    }
  }
  if (header->type == MESSAGE_FORGET && size == sizeof(struct forget_message)) {
    forget_program(client, ((const struct forget_message *)buffer)->key);
  } else if (header->type == MESSAGE_KILL && (run = find_run(client, header->run_id)) != NULL) {
    kill_run(run, END_KILLED);
  } else if (header->type == MESSAGE_CLIENT && client == spawner.first && count == 1 && add_client(files[0]) == 0) {
    count = 0;
  }
  for (int i = 0; i < count; i++) close(files[i]);
}

static void on_client(struct client *client, uint32_t events) {
  static union {
    struct message_header align;
    char bytes[BULKHEAD_MAX_MESSAGE_BYTES];
  } buffer;
  char control[CMSG_SPACE(sizeof(int) * MOST_MESSAGE_FILES)] __attribute__((aligned(8)));
  struct iovec part = {.iov_base = buffer.bytes, .iov_len = sizeof buffer.bytes};
  struct msghdr message = {
      .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  if (client->fd < 0) return;
  if (client->blocked) {
    if (events & (EPOLLHUP | EPOLLERR)) {
      drop_client(client);
    } else {
      client->blocked = 0;
      arm(client, EPOLLIN);
    }
    return;
  }
  ssize_t size = recvmsg(client->fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (size <= 0) {
    drop_client(client);
    return;
  }
  int files[MOST_MESSAGE_FILES];
  int count = take_files(&message, files);
  int lost = message.msg_flags & MSG_TRUNC ? E2BIG : 0;
  if (message.msg_flags & MSG_CTRUNC) lost = EMFILE; /* too many descriptors, or our table is full */
  handle_request(client, buffer.bytes, (size_t)size, files, count, lost);
}

/* ---- the loop --------------------------------------------------------------------------------- */

/* Milliseconds to the next deadline, rounded up: waking early would spin. -1: none. */
static int milliseconds_to_wait(void) {
  uint64_t next = next_of_runs();
  if (spawner.tend_at < next) next = spawner.tend_at;
  if (next == UINT64_MAX) return -1;
  uint64_t now = now_nanoseconds();
  if (next <= now) return 0;
  uint64_t milliseconds = (next - now + 999999) / 1000000;
  return milliseconds < 3600000 ? (int)milliseconds : 3600000;
}

static void dispatch(const struct epoll_event *event) {
  struct source *source = event->data.ptr;
  switch (source->kind) {
    case SOURCE_CLIENT: on_client(source->of.client, event->events); break;
    case SOURCE_PROCESS: on_run_exit(source->of.run); break;
    case SOURCE_STDERR: on_run_errors(source->of.run); break;
    case SOURCE_ZYGOTE: on_zygote_message(source->of.zygote); break;
    case SOURCE_ZYGOTE_PROCESS: on_zygote_end(source->of.zygote); break;
  }
}

static void serve(void) {
  struct epoll_event events[EVENTS_PER_WAIT];
  int count = epoll_wait(spawner.epoll_fd, events, EVENTS_PER_WAIT, milliseconds_to_wait());
  if (count < 0 && errno != EINTR) die("epoll_wait");
  for (int i = 0; i < count; i++) dispatch(&events[i]);
  attend_runs();
  if (spawner.tend_at <= now_nanoseconds()) {
    spawner.tend_at = UINT64_MAX;
    tend_zygotes();
  }
  send_replies();
  sweep_runs();
  sweep_zygotes();
  sweep_clients();
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
  } while (fd <= BULKHEAD_MAX_FILES);
  close(fd);
}

#define PRINT_SIZE(type) printf("%s %zu\n", #type, sizeof(struct type))
#define PRINT_OFFSET(type, field) printf("%s.%s %zu\n", #type, #field, offsetof(struct type, field))

/* For the test that compares this end of the protocol with the other one. */
static int print_protocol(void) {
  printf("magic %u\nversion %d\n", BULKHEAD_PROTOCOL_MAGIC, BULKHEAD_PROTOCOL_VERSION);
  printf("types %d %d %d %d %d %d %d %d %d %d\n", MESSAGE_HELLO, MESSAGE_PROGRAM, MESSAGE_FORGET, MESSAGE_RUN,
         MESSAGE_KILL, MESSAGE_OUTPUT, MESSAGE_ENDED, MESSAGE_FAILED, MESSAGE_ZYGOTE, MESSAGE_CLIENT);
  printf("reasons %d %d %d\n", END_BY_ITSELF, END_WALL_TIME, END_KILLED);
  printf("ways %d %d\n", WAY_EXEC, WAY_ZYGOTE);
  printf("stages %d %d %d %d\n", STAGE_REQUEST, STAGE_PREPARE, STAGE_CONFINE, STAGE_EXEC);
  printf("states %d %d %d %d\n", ZYGOTE_STATE_READY, ZYGOTE_STATE_UNFIT, ZYGOTE_STATE_DIED, ZYGOTE_STATE_SHUNNED);
  printf("flags %d %d\n", PROGRAM_IS_WASMTIME, PROGRAM_HAS_ZYGOTE);
  printf("maximums %d %d %d %d\n", BULKHEAD_MAX_MESSAGE_BYTES, BULKHEAD_MAX_FILES, BULKHEAD_MAX_STRINGS,
         BULKHEAD_KEY_BYTES);
  PRINT_SIZE(message_header);
  PRINT_OFFSET(message_header, run_id);
  PRINT_SIZE(hello_message);
  PRINT_OFFSET(hello_message, layers);
  PRINT_SIZE(program_message);
  PRINT_OFFSET(program_message, key);
  PRINT_OFFSET(program_message, idle_nanoseconds);
  PRINT_OFFSET(program_message, flags);
  PRINT_OFFSET(program_message, layers);
  PRINT_OFFSET(program_message, argument_count);
  PRINT_OFFSET(program_message, environment_count);
  PRINT_SIZE(forget_message);
  PRINT_OFFSET(forget_message, key);
  PRINT_SIZE(run_message);
  PRINT_OFFSET(run_message, key);
  PRINT_OFFSET(run_message, limits);
  PRINT_OFFSET(run_message, limits.cpu_nanoseconds);
  PRINT_OFFSET(run_message, limits.data_bytes);
  PRINT_OFFSET(run_message, limits.address_bytes);
  PRINT_OFFSET(run_message, limits.file_bytes);
  PRINT_OFFSET(run_message, limits.open_files);
  PRINT_OFFSET(run_message, wall_nanoseconds);
  PRINT_OFFSET(run_message, stderr_bytes);
  PRINT_OFFSET(run_message, pin_cpu);
  PRINT_OFFSET(run_message, stdin_bytes);
  PRINT_SIZE(output_message);
  PRINT_OFFSET(output_message, stream);
  PRINT_OFFSET(output_message, bytes);
  PRINT_SIZE(ended_message);
  PRINT_OFFSET(ended_message, wait_status);
  PRINT_OFFSET(ended_message, reason);
  PRINT_OFFSET(ended_message, wall_nanoseconds);
  PRINT_OFFSET(ended_message, cpu_nanoseconds);
  PRINT_OFFSET(ended_message, peak_resident_bytes);
  PRINT_OFFSET(ended_message, touched_bytes);
  PRINT_OFFSET(ended_message, stdout_bytes);
  PRINT_OFFSET(ended_message, stderr_truncated);
  PRINT_OFFSET(ended_message, way);
  PRINT_OFFSET(ended_message, layers);
  PRINT_OFFSET(ended_message, stderr_here);
  PRINT_OFFSET(ended_message, stdout_here);
  PRINT_SIZE(failed_message);
  PRINT_OFFSET(failed_message, stage);
  PRINT_OFFSET(failed_message, error);
  PRINT_SIZE(zygote_message);
  PRINT_OFFSET(zygote_message, key);
  PRINT_OFFSET(zygote_message, state);
  PRINT_OFFSET(zygote_message, layers);
  PRINT_OFFSET(zygote_message, error);
  PRINT_OFFSET(zygote_message, step);
  return 0;
}

/* For `bulkhead doctor`: a line for each layer of isolation, with what stands in its way. */
static int print_isolation(void) {
  struct confine_finding findings[CONFINE_LAYER_COUNT];
  confine_detect(findings);
  for (int i = 0; i < CONFINE_LAYER_COUNT; i++) {
    const struct confine_finding *found = &findings[i];
    if (found->works) printf("%u yes\n", found->layer);
    else printf("%u no %s: %s\n", found->layer, found->step, strerror(found->error));
  }
  return 0;
}

static void find_library(void) {
  static char path[4096];
  ssize_t length = readlink("/proc/self/exe", path, sizeof path - sizeof LIBRARY_NAME);
  if (length <= 0) die("/proc/self/exe");
  path[length] = 0;
  char *slash = strrchr(path, '/');
  memcpy(slash + 1, LIBRARY_NAME, sizeof LIBRARY_NAME);
  spawner_library = path;
}

static void find_memfile_flags(void) {
  spawner.memfile_flags = MFD_CLOEXEC | MFD_NOEXEC_SEAL;
  int fd = new_memfile("probe");
  if (fd < 0) spawner.memfile_flags = MFD_CLOEXEC; /* the kernel does not know it; what else shows at its first use */
  close_fd(&fd);
}

int main(int argc, char **argv) {
  struct confine_finding findings[CONFINE_LAYER_COUNT];
  if (argc == 2 && strcmp(argv[1], "--protocol") == 0) return print_protocol();
  if (argc == 2 && strcmp(argv[1], "--isolation") == 0) return print_isolation();
  if (fcntl(CONTROL_FD, F_SETFD, FD_CLOEXEC) != 0) die("no control socket at descriptor 3");
  syscall(SYS_close_range, CONTROL_FD + 1u, ~0u, 0); /* what a library of the service's left open */
  reset_signals();
  find_library();
  set_up_launching();
  spawner_layers = confine_detect(findings);
  prefer_as_oom_victim(); /* before the next line, which gives /proc/self to root */
  if (prctl(PR_SET_DUMPABLE, 0) != 0) die("prctl");
  if (chdir("/") != 0) die("chdir");
  raise_open_files();
  reserve_low_descriptors();
  find_memfile_flags();
  spawner.tend_at = UINT64_MAX;
  if ((spawner.epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
  if (add_client(CONTROL_FD) != 0) die("epoll_ctl on the control socket");
  for (;;) serve();
}
