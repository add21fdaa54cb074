/*
 * The zygote: a library preloaded into an unmodified wasmtime, which stops that when it has loaded a
 * module and is about to run it, and from then on forks one child for each run.
 *
 * The fork point is the first request for 32 random bytes: wasmtime seeds the store's generator with
 * them (seen with 48.0.2 and 49.0.4). So no run shares its randomness with another, and no byte of
 * guest code has run. What another version does at this point is found out by trying (probe.py);
 * where it does not fit, every run executes wasmtime anew.
 *
 * Only a process with one thread can be forked whole. Until the fork point threads are recorded
 * instead of started (pthread_create), and each child starts them.
 *
 * The event loop that wasmtime made by then (tokio: an epoll descriptor and an eventfd to wake it)
 * would be shared by all children, a channel from run to run. The zygote closes it, and each child
 * gets one of its own without descriptors: waiting is a futex, waking is a flag. A run's files need
 * no event loop, they are never slow. So a run has the descriptors 0, 1 and 2, and RLIMIT_NOFILE is
 * 3: it can have no other. The one exception is the sealed artifact, which wasmtime maps the
 * module's data from; it is closed before the guest begins.
 *
 * Without a control socket (ZYGOTE_FD_VARIABLE unset) the library forks nothing: the process that it
 * is in is the run, and is confined as a child would be.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "zygote_protocol.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

#define PUBLIC __attribute__((visibility("default")))
#define SEED_BYTES 32
#define MOST_THREADS 8
#define MOST_SOURCES 8
#define MOST_FILES 64 /* descriptors of a wasmtime that has loaded a module; seen: 12 */
/* Of a child that could not be confined. wasmtime never exits with it: what a guest asks for above
 * 125 becomes 1. */
#define NOT_CONFINED_EXIT 127

enum phase { PHASE_OFF, PHASE_LOADING, PHASE_FORKING, PHASE_RUNNING };

static struct {
  enum phase phase;
  int control_fd; /* -1: the process is a run itself */
  unsigned layers;
  pthread_t main_thread;
} self;

/* ---- threads ------------------------------------------------------------------------------- */

/* A thread that was asked for before the fork. Its placeholder is its number plus one: no pthread_t
 * is such a small pointer. */
struct thread {
  void *(*routine)(void *);
  void *argument;
  size_t stack_bytes;
  int detached;
  pthread_t real;
};

static struct {
  struct thread all[MOST_THREADS];
  unsigned count;
  int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
  int (*join)(pthread_t, void **);
  int (*detach)(pthread_t);
} threads;

static struct thread *recorded(pthread_t id) {
  uintptr_t number = (uintptr_t)id;
  return number >= 1 && number <= threads.count ? &threads.all[number - 1] : NULL;
}

PUBLIC int pthread_create(pthread_t *id, const pthread_attr_t *attributes, void *(*routine)(void *),
                          void *argument) {
  if (self.phase != PHASE_LOADING) return threads.create(id, attributes, routine, argument);
  if (threads.count == MOST_THREADS) return EAGAIN;
  struct thread *thread = &threads.all[threads.count++];
  thread->routine = routine;
  thread->argument = argument;
  if (attributes != NULL) {
    int state;
    pthread_attr_getstacksize(attributes, &thread->stack_bytes);
    thread->detached = pthread_attr_getdetachstate(attributes, &state) == 0 && state == PTHREAD_CREATE_DETACHED;
  }
  *id = (pthread_t)(uintptr_t)threads.count;
  return 0;
}

PUBLIC int pthread_join(pthread_t id, void **result) {
  struct thread *thread = recorded(id);
  return threads.join(thread != NULL ? thread->real : id, result);
}

PUBLIC int pthread_detach(pthread_t id) {
  struct thread *thread = recorded(id);
  if (thread == NULL) return threads.detach(id);
  thread->detached = 1;
  return self.phase == PHASE_RUNNING ? threads.detach(thread->real) : 0;
}

static int start_thread(struct thread *thread) {
  pthread_attr_t attributes;
  int error = pthread_attr_init(&attributes);
  if (error == 0 && thread->stack_bytes != 0) error = pthread_attr_setstacksize(&attributes, thread->stack_bytes);
  if (error == 0 && thread->detached)
    error = pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  if (error == 0) error = threads.create(&thread->real, &attributes, thread->routine, thread->argument);
  return error;
}

/* ---- the event loop without descriptors ----------------------------------------------------- */

/* What was registered with the loop before the fork. Only an eventfd can ever have something to say. */
struct source {
  int fd, wakes;
  epoll_data_t data;
  uint32_t events;
  uint32_t pending;
};

static struct {
  int fds[MOST_FILES]; /* the loop's descriptors: epoll, what it watches, what wakes it */
  int fd_count, epoll_count;
  struct source sources[MOST_SOURCES];
  int source_count;
  uint32_t wakeups; /* the futex */
} loop;

static int of_loop(int fd) {
  if (self.phase != PHASE_RUNNING) return 0;
  for (int i = 0; i < loop.fd_count; i++)
    if (loop.fds[i] == fd) return 1;
  return 0;
}

PUBLIC int epoll_create1(int flags) {
  if (self.phase == PHASE_LOADING) loop.epoll_count++;
  return (int)syscall(SYS_epoll_create1, flags);
}

PUBLIC int epoll_ctl(int epoll_fd, int operation, int fd, struct epoll_event *event) {
  if (of_loop(epoll_fd)) { /* a run's files cannot be watched, as the kernel would say of them */
    errno = EPERM;
    return operation == EPOLL_CTL_DEL ? 0 : -1;
  }
  int result = (int)syscall(SYS_epoll_ctl, epoll_fd, operation, fd, event);
  if (self.phase == PHASE_LOADING && result == 0 && operation == EPOLL_CTL_ADD) {
    if (loop.source_count < MOST_SOURCES)
      loop.sources[loop.source_count] =
          (struct source){.fd = fd, .data = event->data, .events = event->events & (EPOLLIN | EPOLLOUT)};
    loop.source_count++;
  }
  return result;
}

static int take_events(struct epoll_event *events, int room) {
  int count = 0;
  for (int i = 0; i < loop.source_count && count < room; i++)
    if (__atomic_exchange_n(&loop.sources[i].pending, 0, __ATOMIC_ACQ_REL) != 0)
      events[count++] = (struct epoll_event){.events = loop.sources[i].events, .data = loop.sources[i].data};
  return count;
}

PUBLIC int epoll_wait(int epoll_fd, struct epoll_event *events, int room, int timeout_milliseconds) {
  if (!of_loop(epoll_fd)) return (int)syscall(SYS_epoll_pwait, epoll_fd, events, room, timeout_milliseconds, NULL, 8);
  struct timespec pause = {timeout_milliseconds / 1000, timeout_milliseconds % 1000 * 1000000l};
  for (;;) {
    uint32_t seen = __atomic_load_n(&loop.wakeups, __ATOMIC_ACQUIRE);
    int count = take_events(events, room);
    if (count > 0 || timeout_milliseconds == 0) return count;
    if (syscall(SYS_futex, &loop.wakeups, FUTEX_WAIT_PRIVATE, seen, timeout_milliseconds > 0 ? &pause : NULL) == 0 ||
        errno == EAGAIN)
      continue;
    if (errno == ETIMEDOUT) return take_events(events, room);
    return -1; /* EINTR */
  }
}

static void wake(struct source *source) {
  __atomic_store_n(&source->pending, 1, __ATOMIC_RELEASE);
  __atomic_add_fetch(&loop.wakeups, 1, __ATOMIC_ACQ_REL);
  syscall(SYS_futex, &loop.wakeups, FUTEX_WAKE_PRIVATE, 1);
}

PUBLIC ssize_t write(int fd, const void *bytes, size_t size) {
  if (fd > STDERR_FILENO && of_loop(fd))
    for (int i = 0; i < loop.source_count; i++)
      if (loop.sources[i].fd == fd && loop.sources[i].wakes) {
        wake(&loop.sources[i]);
        return (ssize_t)size;
      }
  return syscall(SYS_write, fd, bytes, size);
}

/* What the zygote has closed is closed again by its owner, in the child, who must not mind. */
PUBLIC int close(int fd) {
  int result = (int)syscall(SYS_close, fd);
  return result != 0 && errno == EBADF && self.phase == PHASE_RUNNING && fd > STDERR_FILENO ? 0 : result;
}

/* ---- descriptors ---------------------------------------------------------------------------- */

static int kept_fds[MOST_FILES]; /* the artifact's, in ascending order */
static int kept_count;

static void close_between(unsigned first, unsigned last) {
  if (first > last || syscall(SYS_close_range, first, last, 0) == 0) return;
  for (unsigned fd = first; fd <= last && fd < 4096; fd++) syscall(SYS_close, (int)fd); /* Linux before 5.9 */
}

static void close_all_but_kept(void) {
  unsigned from = STDERR_FILENO + 1;
  for (int i = 0; i < kept_count; i++) {
    if ((unsigned)kept_fds[i] > from) close_between(from, (unsigned)kept_fds[i] - 1);
    from = (unsigned)kept_fds[i] + 1;
  }
  close_between(from, ~0u);
}

/* wasmtime sets the main thread's alternative signal stack right before it enters the guest: all
 * that it maps from the artifact is mapped. */
PUBLIC int sigaltstack(const stack_t *new, stack_t *old) {
  if (new != NULL && kept_count > 0 && self.phase == PHASE_RUNNING && pthread_self() == self.main_thread) {
    kept_count = 0;
    close_between(STDERR_FILENO + 1, ~0u);
  }
  return (int)syscall(SYS_sigaltstack, new, old);
}

static int compare_fds(const void *left, const void *right) { return *(const int *)left - *(const int *)right; }

/* Sorts what wasmtime has open into what a run needs, the artifact, and what it must not have. */
static const char *sort_fd(int fd) {
  char link[32], target[64];
  struct stat info;
  if (fd <= STDERR_FILENO || fd == self.control_fd) return NULL;
  if (fstat(fd, &info) != 0) return "fstat";
  if (S_ISREG(info.st_mode)) {
    kept_fds[kept_count++] = fd;
    return NULL;
  }
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, target, sizeof target - 1);
  if (length < 0) return "readlink";
  target[length] = 0;
  for (int i = 0; i < loop.source_count; i++)
    if (loop.sources[i].fd == fd) loop.sources[i].wakes = strstr(target, "eventfd") != NULL;
  loop.fds[loop.fd_count++] = fd;
  return NULL;
}

/* NULL, or what does not fit. */
static const char *sort_fds(void) {
  int fds[MOST_FILES], count = 0;
  DIR *folder = opendir("/proc/self/fd");
  if (folder == NULL) return "/proc/self/fd";
  for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
    if (entry->d_name[0] == '.') continue;
    int fd = atoi(entry->d_name);
    if (fd == dirfd(folder)) continue;
    if (count == MOST_FILES) {
      closedir(folder);
      return "too many descriptors";
    }
    fds[count++] = fd;
  }
  closedir(folder);
  qsort(fds, (size_t)count, sizeof fds[0], compare_fds);
  for (int i = 0; i < count; i++) {
    const char *problem = sort_fd(fds[i]);
    if (problem != NULL) return problem;
  }
  for (int i = 0; i < loop.fd_count; i++) syscall(SYS_close, loop.fds[i]);
  return loop.epoll_count > 1 || loop.source_count > MOST_SOURCES ? "more than one event loop" : NULL;
}

static int has_one_thread(void) {
  int count = 0;
  DIR *folder = opendir("/proc/self/task");
  if (folder == NULL) return 0;
  for (struct dirent *entry; (entry = readdir(folder)) != NULL;) count += entry->d_name[0] != '.';
  closedir(folder);
  return count == 1;
}

/* ---- the zygote ------------------------------------------------------------------------------ */

/* A child, or a reply that the socket has not taken yet. */
struct child {
  uint64_t run_id; /* 0: free */
  pid_t pid;       /* 0: reaped */
  int pidfd;       /* to be sent with STARTED; -1: sent */
  struct zygote_ended ended;
};

static struct {
  struct child children[ZYGOTE_MAX_RUNS];
  int used; /* no child at or behind this index */
  int blocked; /* the socket is full */
  pid_t pid;
  uint64_t page_bytes;
  struct sigaction child_action;
  sigset_t mask; /* wasmtime's own */
} zygote;

static struct zygote_header header_of(enum zygote_message_type type, uint64_t run_id) {
  return (struct zygote_header){ZYGOTE_PROTOCOL_MAGIC, ZYGOTE_PROTOCOL_VERSION, (uint16_t)type, run_id};
}

/* 1: sent. 0: the socket is full. When the spawner is gone, so are we. */
static int send_message(const void *message, size_t size, int fd) {
  char room[CMSG_SPACE(sizeof fd)] __attribute__((aligned(8)));
  struct iovec part = {.iov_base = (void *)(uintptr_t)message, .iov_len = size};
  struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
  if (fd >= 0) {
    memset(room, 0, sizeof room);
    header.msg_control = room;
    header.msg_controllen = sizeof room;
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(rights), &fd, sizeof fd);
  }
  for (;;) {
    if (sendmsg(self.control_fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return 1;
    if (errno == EAGAIN || errno == ENOBUFS || errno == ETOOMANYREFS || errno == ENOMEM) return 0;
    if (errno != EINTR) _exit(0);
  }
}

static struct zygote_failed failure(enum zygote_message_type type, uint64_t run_id, const char *step, int error) {
  struct zygote_failed message = {.header = header_of(type, run_id), .error = error};
  snprintf(message.step, sizeof message.step, "%s", step);
  return message;
}

static void __attribute__((noreturn)) unfit(const char *step) {
  struct zygote_failed message = failure(ZYGOTE_UNFIT, 0, step, errno);
  send_message(&message, sizeof message, -1);
  _exit(NOT_CONFINED_EXIT);
}

static void fail_run(uint64_t run_id, const char *step, int error) {
  /* Lost when the socket is full: then the spawner's deadline ends the run. It sends few requests
   * that fail, and not to a zygote that does not take its replies. */
  struct zygote_failed message = failure(ZYGOTE_FAILED, run_id, step, error);
  send_message(&message, sizeof message, -1);
}

/* Sends what is due, in order for each run. */
static void send_replies(void) {
  zygote.blocked = 0;
  for (int i = 0; i < zygote.used; i++) {
    struct child *child = &zygote.children[i];
    if (child->run_id == 0) continue;
    if (child->pidfd >= 0) {
      struct zygote_started started = {header_of(ZYGOTE_STARTED, child->run_id)};
      if (!send_message(&started, sizeof started, child->pidfd)) goto blocked;
      syscall(SYS_close, child->pidfd);
      child->pidfd = -1;
    }
    if (child->pid == 0) {
      if (!send_message(&child->ended, sizeof child->ended, -1)) goto blocked;
      child->run_id = 0;
    }
  }
  while (zygote.used > 0 && zygote.children[zygote.used - 1].run_id == 0) zygote.used--;
  return;
blocked:
  zygote.blocked = 1;
}

static uint64_t nanoseconds(struct timeval time) {
  return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_usec * 1000u;
}

static void reap(void) {
  struct rusage usage;
  int status;
  for (pid_t pid; (pid = wait4(-1, &status, WNOHANG, &usage)) > 0;)
    for (int i = 0; i < zygote.used; i++) {
      struct child *child = &zygote.children[i];
      if (child->pid != pid || child->run_id == 0) continue;
      child->pid = 0;
      child->ended = (struct zygote_ended){
          .header = header_of(ZYGOTE_ENDED, child->run_id),
          .wait_status = status,
          .cpu_nanoseconds = nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime),
          .peak_resident_bytes = (uint64_t)usage.ru_maxrss * 1024u,
          .touched_bytes = (uint64_t)usage.ru_minflt * zygote.page_bytes,
      };
      break;
    }
}

static struct child *free_slot(void) {
  for (int i = 0; i < zygote.used; i++)
    if (zygote.children[i].run_id == 0) return &zygote.children[i];
  return zygote.used < ZYGOTE_MAX_RUNS ? &zygote.children[zygote.used++] : NULL;
}

/* To the CPU that the kernel has chosen for the child, as the idlest: to stay on one halves a run's cost. */
static void stay_on_this_cpu(void) {
  cpu_set_t set;
  int cpu = sched_getcpu();
  if (cpu < 0) return;
  CPU_ZERO(&set);
  CPU_SET((unsigned)cpu % CPU_SETSIZE, &set);
  sched_setaffinity(0, sizeof set, &set); /* if it was taken away meanwhile: run anywhere */
}

static void __attribute__((noreturn)) child_fails(const char *step, int error) {
  dprintf(STDERR_FILENO, "bulkhead: a run could not be confined: %s: %s\n", step, strerror(error));
  _exit(NOT_CONFINED_EXIT);
}

static void start_threads(void) {
  self.phase = PHASE_RUNNING;
  for (unsigned i = 0; i < threads.count; i++) {
    int error = start_thread(&threads.all[i]);
    if (error != 0) child_fails("pthread_create", error);
  }
}

/* In the child: the last that happens before wasmtime goes on. */
static void become_run(const struct zygote_run *request, const int *files) {
  const char *step = "dup2";
  if (request->pin_cpu) stay_on_this_cpu();
  for (int i = 0; i <= STDERR_FILENO; i++)
    if (dup2(files[i], i) < 0) child_fails(step, errno);
  close_all_but_kept();
  sigaction(SIGCHLD, &zygote.child_action, NULL);
  sigprocmask(SIG_SETMASK, &zygote.mask, NULL);
  if (confine_run(self.layers, &request->limits, zygote.pid, &step) != 0) child_fails(step, errno);
  start_threads();
}

/* Returns 1 in the child. */
static int start_run(const struct zygote_run *request, const int *files) {
  struct child *child = free_slot();
  if (child == NULL) {
    fail_run(request->header.run_id, "too many runs", EAGAIN);
    return 0;
  }
  pid_t pid = fork();
  if (pid == 0) {
    become_run(request, files);
    return 1;
  }
  int pidfd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
  if (pidfd < 0) {
    int error = errno;
    if (pid > 0) kill(pid, SIGKILL); /* reaped as a stranger */
    fail_run(request->header.run_id, pid > 0 ? "pidfd_open" : "fork", error);
    return 0;
  }
  *child = (struct child){.run_id = request->header.run_id, .pid = pid, .pidfd = pidfd};
  return 0;
}

#define ROOM_FOR_FILES 4 /* one more than a request has: alignment makes the room anyway */

/* The three descriptors of a request; fewer when they did not arrive. */
static int take_files(struct msghdr *message, int *files) {
  int count = 0;
  for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(files, CMSG_DATA(c), (size_t)count * sizeof(int));
  }
  return count;
}

/* Returns 1 in the child. */
static int on_request(void) {
  struct zygote_run request;
  char room[CMSG_SPACE(ROOM_FOR_FILES * sizeof(int))] __attribute__((aligned(8)));
  struct iovec part = {.iov_base = &request, .iov_len = sizeof request};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
  ssize_t size = recvmsg(self.control_fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
  if (size <= 0) _exit(0); /* the spawner is gone, or done with us */
  int files[ROOM_FOR_FILES], count = take_files(&message, files), is_child = 0;
  if (size != (ssize_t)sizeof request || (message.msg_flags & MSG_TRUNC) || request.header.magic != ZYGOTE_PROTOCOL_MAGIC ||
      request.header.version != ZYGOTE_PROTOCOL_VERSION || request.header.type != ZYGOTE_RUN ||
      request.header.run_id == 0)
    _exit(NOT_CONFINED_EXIT); /* not the spawner that this library was built with */
  if (count != 3 || (message.msg_flags & MSG_CTRUNC))
    fail_run(request.header.run_id, "receiving its files", EMFILE);
  else
    is_child = start_run(&request, files);
  if (!is_child)
    for (int i = 0; i < count; i++) syscall(SYS_close, files[i]);
  return is_child;
}

static void on_child(int number) { (void)number; }

/* Returns in a child only. */
static void serve(void) {
  struct sigaction action = {.sa_handler = on_child};
  sigset_t blocked, waiting;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGCHLD);
  sigprocmask(SIG_BLOCK, &blocked, &zygote.mask);
  sigaction(SIGCHLD, &action, &zygote.child_action);
  waiting = zygote.mask;
  sigdelset(&waiting, SIGCHLD);
  zygote.pid = getpid();
  zygote.page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
  for (;;) {
    struct pollfd control = {.fd = self.control_fd, .events = zygote.blocked ? POLLOUT : POLLIN};
    int ready = ppoll(&control, 1, NULL, &waiting);
    if (ready > 0 && (control.revents & (POLLIN | POLLHUP | POLLERR)) && on_request()) return;
    reap();
    send_replies();
  }
}

/* ---- the fork point -------------------------------------------------------------------------- */

static void reach_fork_point(void) {
  const char *step = NULL;
  self.phase = PHASE_FORKING;
  self.main_thread = pthread_self();
  if (!has_one_thread()) {
    errno = EBUSY;
    unfit("more than one thread");
  }
  if ((step = sort_fds()) != NULL) unfit(step);
  int layers = confine_zygote(self.layers, &step);
  if (layers < 0) unfit(step);
  struct zygote_ready ready = {.header = header_of(ZYGOTE_READY, 0), .layers = (uint32_t)layers};
  send_message(&ready, sizeof ready, -1);
  serve();
}

/* The process is the run: no zygote, no fork. */
static void confine_self(void) {
  const char *step = NULL;
  self.phase = PHASE_FORKING;
  self.main_thread = pthread_self();
  if ((step = sort_fds()) != NULL) child_fails(step, errno);
  if (confine_exec_run(self.layers, &step) < 0) child_fails(step, errno);
  if (getenv(ZYGOTE_ANNOUNCE_VARIABLE) != NULL) dprintf(STDERR_FILENO, "%s\n", ZYGOTE_ANNOUNCEMENT);
  start_threads();
}

PUBLIC ssize_t getrandom(void *bytes, size_t size, unsigned flags) {
  if (size == SEED_BYTES && self.phase == PHASE_LOADING) {
    if (self.control_fd >= 0) reach_fork_point();
    else confine_self();
  }
  return syscall(SYS_getrandom, bytes, size, flags);
}

static void *next_symbol(const char *name) {
  void *symbol = dlsym(RTLD_NEXT, name);
  if (symbol == NULL) _exit(NOT_CONFINED_EXIT);
  return symbol;
}

/* dlsym returns a data pointer; ISO C has no cast from that to a function. */
#define FIND(target, name)                      \
  do {                                          \
    void *found = next_symbol(name);            \
    memcpy(&(target), &found, sizeof(target));  \
  } while (0)

static __attribute__((constructor)) void start(void) {
  FIND(threads.create, "pthread_create");
  FIND(threads.join, "pthread_join");
  FIND(threads.detach, "pthread_detach");
  const char *layers = getenv(ZYGOTE_LAYERS_VARIABLE), *control = getenv(ZYGOTE_FD_VARIABLE);
  if (layers == NULL) return;
  self.layers = (unsigned)strtoul(layers, NULL, 10);
  self.control_fd = control != NULL ? atoi(control) : -1;
  self.phase = PHASE_LOADING;
}
