/*
 * The floor under a launcher with zygotes: one zygote, as the spawner starts it, and run after run
 * forked from it. Everything that isolates a run is there, for it is the same zygote. Missing is what
 * a launcher adds: a deadline, files of a run's own, reading its output and errors, more than one run
 * at a time.
 *
 *   zygote_floor COUNT CPU LAYERS ARTIFACT LIBRARY INPUT PROGRAM ARGUMENTS...
 *
 * CPU: where all of this happens; -1: anywhere; -2: anywhere, but a run stays where it begins. LAYERS: of isolation, enum confine_layer. ARTIFACT: an open descriptor, which the
 * program finds at 3. Prints for each run its wall time and CPU time in nanoseconds, then a line with
 * the CPU time that this program and the zygote took themselves.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "spawner.h"

#define STAYS_WHERE_IT_BEGINS (-2)
#define WARM_UP_RUNS 10
#define ABOVE_ALL_PLACES 32
#define FIRST_ARGUMENT 7

/* What process.c needs of the spawner. */
const char *spawner_library;

void die(const char *what) {
  perror(what);
  exit(3);
}

static uint64_t nanoseconds(clockid_t clock) {
  struct timespec time;
  if (clock_gettime(clock, &time) != 0) die("clock_gettime");
  return (uint64_t)time.tv_sec * NANOSECONDS_PER_SECOND + (uint64_t)time.tv_nsec;
}

/* Out of the way of the descriptors that the child gets. */
static int moved_up(int fd) {
  int above = fcntl(fd, F_DUPFD_CLOEXEC, ABOVE_ALL_PLACES);
  if (fd < 0 || above < 0) die("open");
  return above;
}

static void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((size_t)cpu, &set);
  if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set) != 0) die("sched_setaffinity");
}

/* Returns its end of the control socket. */
static int start_zygote(unsigned layers, int artifact, char **argv, pid_t *pid) {
  int ends[2], null = moved_up(open("/dev/null", O_RDWR)), pidfd;
  char isolation[64], control[64], preload[4096];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) die("socketpair");
  snprintf(isolation, sizeof isolation, ZYGOTE_LAYERS_VARIABLE "=%u", layers);
  snprintf(control, sizeof control, ZYGOTE_FD_VARIABLE "=%d", 4);
  snprintf(preload, sizeof preload, "LD_PRELOAD=%s", spawner_library);
  char tokio[] = "TOKIO_WORKER_THREADS=1", arenas[] = "MALLOC_ARENA_MAX=1";
  char *environment[] = {tokio, arenas, isolation, control, preload, NULL};
  struct launch launch = {
      .argv = argv,
      .envp = environment,
      .files = {null, null, null, moved_up(artifact), moved_up(ends[1])},
      .file_count = 5,
      .layers = layers,
      .as_zygote = 1,
      .cpu = -1,
  };
  set_up_launching();
  if (launch_process(&launch, pid, &pidfd) != 0) die("launch_process");
  for (int i = 2; i < launch.file_count; i++) close(launch.files[i]);
  close(ends[1]);
  return ends[0];
}

/* Takes the next message, and closes the descriptor that may come with it. */
static void receive(int control, enum zygote_message_type type, void *into, size_t size) {
  union {
    struct zygote_header header;
    struct zygote_failed failed;
    struct zygote_ended ended;
  } message;
  char room[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
  struct iovec part = {.iov_base = &message, .iov_len = sizeof message};
  struct msghdr how = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
  ssize_t got = recvmsg(control, &how, MSG_CMSG_CLOEXEC);
  if (got < (ssize_t)sizeof message.header) die("the zygote ended");
  if (message.header.type == ZYGOTE_UNFIT || message.header.type == ZYGOTE_FAILED) {
    errno = message.failed.error;
    die(message.failed.step);
  }
  if (message.header.type != type || (size_t)got < size) die("unexpected message");
  memcpy(into, &message, size);
  for (struct cmsghdr *c = CMSG_FIRSTHDR(&how); c != NULL; c = CMSG_NXTHDR(&how, c)) {
    int fd;
    memcpy(&fd, CMSG_DATA(c), sizeof fd);
    close(fd);
  }
}

static void request_run(int control, uint64_t id, int stays, const int *files) {
  struct zygote_run request = {
      .header = {ZYGOTE_PROTOCOL_MAGIC, ZYGOTE_PROTOCOL_VERSION, ZYGOTE_RUN, id},
      .limits = {.cpu_nanoseconds = 10 * NANOSECONDS_PER_SECOND,
                 .data_bytes = 256u << 20,
                 .address_bytes = 128ull << 30,
                 .file_bytes = 8u << 20,
                 .open_files = 3},
      .pin_cpu = (uint32_t)stays,
  };
  char room[CMSG_SPACE(3 * sizeof(int))] __attribute__((aligned(8))) = {0};
  struct iovec part = {.iov_base = &request, .iov_len = sizeof request};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
  struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(3 * sizeof(int));
  memcpy(CMSG_DATA(rights), files, 3 * sizeof(int));
  if (sendmsg(control, &message, MSG_NOSIGNAL) < 0) die("sendmsg");
}

/* One run; returns the CPU time of its process. */
static uint64_t run(int control, uint64_t id, int stays, const int *files) {
  struct zygote_started started;
  struct zygote_ended ended;
  struct stat output;
  if (lseek(files[0], 0, SEEK_SET) != 0 || lseek(files[1], 0, SEEK_SET) != 0 || ftruncate(files[1], 0) != 0)
    die("lseek");
  request_run(control, id, stays, files);
  receive(control, ZYGOTE_STARTED, &started, sizeof started);
  receive(control, ZYGOTE_ENDED, &ended, sizeof ended);
  if (fstat(files[1], &output) != 0 || ended.wait_status != 0 || output.st_size == 0) {
    fprintf(stderr, "a run ended with status %#x and %lld bytes\n", (unsigned)ended.wait_status, (long long)output.st_size);
    exit(4);
  }
  return ended.cpu_nanoseconds;
}

int main(int argc, char **argv) {
  if (argc <= FIRST_ARGUMENT) return 2;
  int count = atoi(argv[1]), cpu = atoi(argv[2]), stays = cpu == STAYS_WHERE_IT_BEGINS;
  pid_t pid;
  clockid_t zygote;
  struct zygote_ready ready;
  spawner_library = argv[5];
  pin(cpu);
  int control = start_zygote((unsigned)atoi(argv[3]), atoi(argv[4]), argv + FIRST_ARGUMENT, &pid);
  receive(control, ZYGOTE_READY, &ready, sizeof ready);
  if (ready.layers != (unsigned)atoi(argv[3])) {
    fprintf(stderr, "the zygote is isolated by %u, not by %s\n", ready.layers, argv[3]);
    return 4;
  }
  if (clock_getcpuclockid(pid, &zygote) != 0) die("clock_getcpuclockid");
  int files[] = {open(argv[6], O_RDONLY), memfd_create("output", 0), memfd_create("errors", 0)};
  uint64_t *wall = calloc((size_t)count, sizeof *wall), *used = calloc((size_t)count, sizeof *used), id = 0;
  if (files[0] < 0 || files[1] < 0 || files[2] < 0 || wall == NULL || used == NULL) die("open");
  while (id < WARM_UP_RUNS) run(control, ++id, stays, files);
  uint64_t own = nanoseconds(CLOCK_PROCESS_CPUTIME_ID) + nanoseconds(zygote);
  for (int i = 0; i < count; i++) {
    uint64_t start = nanoseconds(CLOCK_MONOTONIC);
    used[i] = run(control, ++id, stays, files);
    wall[i] = nanoseconds(CLOCK_MONOTONIC) - start;
  }
  own = nanoseconds(CLOCK_PROCESS_CPUTIME_ID) + nanoseconds(zygote) - own;
  for (int i = 0; i < count; i++) printf("%llu %llu\n", (unsigned long long)wall[i], (unsigned long long)used[i]);
  printf("self %llu\n", (unsigned long long)own);
  kill_and_reap(pid);
  return 0;
}
