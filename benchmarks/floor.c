/*
 * The floor under any launcher: start a command again and again, and wait for it. Nothing is
 * bounded, nothing is read but the input file, nothing is checked but the status.
 *
 *   floor COUNT CPU INPUT PROGRAM ARGUMENTS...     CPU -1: not pinned
 *
 * Prints for each run its wall time and CPU time in nanoseconds, then a line with the CPU time of
 * this program itself.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static long long nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static long long cpu_nanoseconds(const struct rusage *u) {
  return (u->ru_utime.tv_sec + u->ru_stime.tv_sec) * 1000000000ll +
         (u->ru_utime.tv_usec + u->ru_stime.tv_usec) * 1000ll;
}

int main(int argc, char **argv) {
  if (argc < 5) return 2;
  int count = atoi(argv[1]), cpu = atoi(argv[2]);
  cpu_set_t set;
  CPU_ZERO(&set);
  if (cpu >= 0) {
    CPU_SET((size_t)cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0) return 3;
  }
  long long *wall = calloc((size_t)count, sizeof *wall), *used = calloc((size_t)count, sizeof *used);
  if (wall == NULL || used == NULL) return 3;
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 0, argv[3], O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, 1, "/dev/null", O_WRONLY, 0);
  for (int i = 0; i < count; i++) {
    pid_t pid;
    int status;
    struct rusage usage;
    long long start = nanoseconds();
    if (posix_spawn(&pid, argv[4], &files, NULL, argv + 4, environ) != 0) return 4;
    if (wait4(pid, &status, 0, &usage) != pid || status != 0) return 5;
    wall[i] = nanoseconds() - start;
    used[i] = cpu_nanoseconds(&usage);
  }
  for (int i = 0; i < count; i++) printf("%lld %lld\n", wall[i], used[i]);
  struct rusage self;
  getrusage(RUSAGE_SELF, &self);
  printf("self %lld\n", cpu_nanoseconds(&self));
  return 0;
}
