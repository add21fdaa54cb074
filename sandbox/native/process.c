/* Executing a program in a child that is confined first, and where runs are placed. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "spawner.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLONE_NEWCGROUP
#define CLONE_NEWCGROUP 0x02000000
#endif

/* ---- placement ----------------------------------------------------------------------------- */

static struct {
  unsigned cpus[CPU_SETSIZE];
  int load[CPU_SETSIZE], count;
} placement;

void find_cpus(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return; /* more CPUs than fit: runs stay unpinned */
  for (unsigned cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &set)) placement.cpus[placement.count++] = cpu;
}

/* One CPU for all threads of a run halves its cost. */
int choose_cpu(void) {
  if (placement.count < 2) return -1;
  int best = 0;
  for (int i = 0; i < placement.count; i++)
    if (placement.load[i] < placement.load[best]) best = i;
  return best;
}

void take_cpu(int index, int change) {
  if (index >= 0) placement.load[index] += change;
}

/* ---- the child, before exec ------------------------------------------------------------------ */

/* It may share the spawner's memory until exec: only system calls, and no return to the caller. */

static struct failure { /* in shared memory: the child of a clone has a copy of ours */
  int stage, error;
} *failure;

static void __attribute__((noreturn)) child_fails(enum failure_stage stage) {
  failure->error = errno;
  failure->stage = (int)stage;
  _exit(127);
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

static int confine(const struct launch *launch) {
  const char *step = NULL;
  struct confine_loading how = {
      .layers = launch->layers,
      .parent = launch->as_zygote && launch->in_namespaces ? 0 : launch->parent,
      .in_new_namespaces = launch->in_namespaces,
  };
  if (setpgid(0, 0) != 0) return -1; /* killed as a group */
  if (launch->cpu >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(placement.cpus[launch->cpu], &set);
    sched_setaffinity(0, sizeof set, &set); /* a CPU that was taken away meanwhile: run anywhere */
  }
  if (launch->limits != NULL && confine_limit(launch->limits) != 0) return -1;
  return confine_loading(&how, &step);
}

static void __attribute__((noreturn)) be_child(const struct launch *launch) {
  /* Files first: RLIMIT_NOFILE would refuse the dup2, and every limit set later binds only the run. */
  if (place_files(launch) != 0) child_fails(STAGE_CONFINE);
  if (confine(launch) != 0) child_fails(STAGE_CONFINE);
  execve(launch->argv[0], launch->argv, launch->envp);
  child_fails(STAGE_EXEC);
}

/* ---- the parent ------------------------------------------------------------------------------ */

/* Nothing is copied, and the exec that must follow is the point of it all. */
static pid_t __attribute__((noinline)) vfork_child(const struct launch *launch) {
  pid_t pid = vfork();
  if (pid == 0) be_child(launch);
  return pid;
}

/* Like vfork, in that it returns when the child has executed; but with a copy of our memory, as the
 * system call returns twice on one stack. */
static pid_t clone_child(const struct launch *launch, unsigned long namespaces) {
  pid_t pid = (pid_t)syscall(SYS_clone, namespaces | CLONE_VFORK | SIGCHLD, NULL, NULL, NULL, NULL);
  if (pid == 0) be_child(launch);
  return pid;
}

void kill_and_reap(pid_t pid) {
  kill(-pid, SIGKILL);
  kill(pid, SIGKILL);
  while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) continue;
}

int launch_process(struct launch *launch, pid_t *pid, int *pidfd) {
  unsigned long namespaces = confine_clone_flags(launch->layers);
  /* The kernel sends most signals to the first process of a PID namespace in vain, those of limits
   * among them: an executed run must not be one. */
  if (!launch->as_zygote) namespaces &= ~(unsigned long)CLONE_NEWPID;
  launch->in_namespaces = namespaces != 0;
  launch->parent = getpid();
  failure->stage = 0;
  *pid = namespaces != 0 ? clone_child(launch, namespaces) : vfork_child(launch);
  if (*pid < 0) return STAGE_PREPARE;
  if (failure->stage != 0) {
    kill_and_reap(*pid);
    errno = failure->error;
    return failure->stage;
  }
  if ((*pidfd = (int)syscall(SYS_pidfd_open, *pid, 0)) >= 0) return 0;
  int saved = errno;
  kill_and_reap(*pid);
  errno = saved;
  return STAGE_PREPARE;
}

void set_up_launching(void) {
  failure = mmap(NULL, sizeof *failure, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (failure == MAP_FAILED) die("mmap");
  find_cpus();
}
