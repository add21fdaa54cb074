/* The kernel sandbox around a run. See confine.h. */
#define _GNU_SOURCE
#include "confine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/magic.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

/* Younger than the oldest headers that this is built with. */
#ifndef CLONE_NEWCGROUP
#define CLONE_NEWCGROUP 0x02000000
#endif
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_rseq
#if defined(__x86_64__)
#define SYS_rseq 334
#else
#define SYS_rseq 293
#endif
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#endif
#ifndef SECCOMP_RET_KILL_PROCESS
#define SECCOMP_RET_KILL_PROCESS 0x80000000u
#endif
#ifndef PR_CAP_AMBIENT
#define PR_CAP_AMBIENT 47
#define PR_CAP_AMBIENT_CLEAR_ALL 4
#endif

#define NANOSECONDS_PER_SECOND 1000000000ull
/* SIGKILL must not beat SIGPROF, which names the limit: RLIMIT_CPU counts whole seconds. */
#define CPU_BACKSTOP_SECONDS 2
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static int fail(const char **step, const char *what) {
  *step = what;
  return -1;
}

/* ---- limits -------------------------------------------------------------------------------- */

static int limit(int resource, uint64_t value) {
  /* Never above a hard limit that the service itself was given. */
  struct rlimit old, new;
  if (getrlimit((__rlimit_resource_t)resource, &old) != 0) return -1;
  new.rlim_max = old.rlim_max != RLIM_INFINITY && value > old.rlim_max ? old.rlim_max : value;
  new.rlim_cur = new.rlim_max;
  return setrlimit((__rlimit_resource_t)resource, &new);
}

static int limit_cpu(uint64_t nanoseconds) {
  uint64_t seconds = nanoseconds / NANOSECONDS_PER_SECOND + CPU_BACKSTOP_SECONDS;
  struct itimerval timer = {.it_value = {.tv_sec = (time_t)(nanoseconds / NANOSECONDS_PER_SECOND),
                                         .tv_usec = (suseconds_t)(nanoseconds % NANOSECONDS_PER_SECOND / 1000)}};
  if (timer.it_value.tv_sec == 0 && timer.it_value.tv_usec == 0) timer.it_value.tv_usec = 1;
  /* Unlike a limit that exec resets, an interval timer goes on counting across it. */
  return setitimer(ITIMER_PROF, &timer, NULL) != 0 || limit(RLIMIT_CPU, seconds) != 0 ? -1 : 0;
}

/* RLIMIT_NPROC is not among them: it counts all processes of a user, and does not bind root. What
 * bounds a run's threads is that each takes of its memory, and that seccomp lets it start no process. */
int confine_limit(const struct confine_limits *limits) {
  if (limit(RLIMIT_CORE, 0) != 0 || limit(RLIMIT_FSIZE, limits->file_bytes) != 0 ||
      limit(RLIMIT_NOFILE, limits->open_files) != 0 || limit(RLIMIT_MEMLOCK, 0) != 0 ||
      limit(RLIMIT_MSGQUEUE, 0) != 0 || limit(RLIMIT_DATA, limits->data_bytes) != 0 ||
      limit(RLIMIT_AS, limits->address_bytes) != 0)
    return -1;
  return limit_cpu(limits->cpu_nanoseconds);
}

/* ---- namespaces ------------------------------------------------------------------------------ */

static struct {
  uid_t uid;
  gid_t gid;
} outside; /* who the service is, as seen from outside of a new user namespace */

unsigned long confine_clone_flags(unsigned layers) {
  outside.uid = geteuid();
  outside.gid = getegid();
  if (!(layers & CONFINE_NAMESPACES)) return 0;
  return CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;
}

static int write_file(const char *path, const char *text, size_t size) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t wrote = write(fd, text, size);
  int saved = errno;
  close(fd);
  errno = saved;
  return wrote == (ssize_t)size ? 0 : -1;
}

/* "0 ID 1": root inside is the service's own user outside. Root is needed to make the root directory
 * empty, and given up after that. */
static int write_map(const char *path, unsigned id) {
  char text[32] = "0 ", digits[16];
  size_t size = 2, count = 0;
  do digits[count++] = (char)('0' + id % 10);
  while ((id /= 10) != 0);
  while (count > 0) text[size++] = digits[--count];
  memcpy(text + size, " 1", 2);
  return write_file(path, text, size + 2);
}

static int settle_in_namespaces(const char **step) {
  if (write_file("/proc/self/setgroups", "deny", 4) != 0) return fail(step, "/proc/self/setgroups");
  if (write_map("/proc/self/uid_map", outside.uid) != 0) return fail(step, "/proc/self/uid_map");
  if (write_map("/proc/self/gid_map", outside.gid) != 0) return fail(step, "/proc/self/gid_map");
  if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0) return fail(step, "mount private");
  return 0;
}

/* Directories that loading does not need; one of them is there for certain. */
static const char *const spare_places[] = {"/sys", "/tmp", "/mnt", "/dev"};

/* Mounts an empty directory that cannot be written. Landlock allows no mounting: this comes before it,
 * and the change to that root after it. */
static int prepare_empty_root(const char **step) {
  const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
  for (size_t i = 0; i < COUNT(spare_places); i++) {
    if (mount("none", spare_places[i], "tmpfs", flags, "size=4k,nr_inodes=2,mode=0555") != 0) continue;
    if (mount(NULL, spare_places[i], NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, NULL) != 0)
      return fail(step, "mount read-only");
    return 0;
  }
  return fail(step, "mount tmpfs");
}

/* There is no way out of it: no descriptor of a directory, and soon no capability. After exec the
 * library does not know which place it was: it is the one that is empty and cannot be written. */
static int empty_root(const char **step) {
  for (size_t i = 0; i < COUNT(spare_places); i++) {
    struct statfs info;
    if (statfs(spare_places[i], &info) != 0 || info.f_type != TMPFS_MAGIC || info.f_files != 2) continue;
    if (chroot(spare_places[i]) != 0) return fail(step, "chroot");
    return chdir("/") == 0 ? 0 : fail(step, "chdir");
  }
  errno = ENOENT;
  return fail(step, "the empty directory");
}

/* ---- capabilities ------------------------------------------------------------------------------ */

static int drop_capabilities(const char **step) {
  struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  struct __user_cap_data_struct none[2], held[2];
  memset(none, 0, sizeof none);
  if (syscall(SYS_capget, &header, held) != 0) return fail(step, "capget");
  if (held[CAP_SETPCAP / 32].effective & (1u << (CAP_SETPCAP % 32)))
    for (int capability = 0; capability < 64; capability++)
      if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 && errno != EINVAL) return fail(step, "PR_CAPBSET_DROP");
  prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); /* Linux before 4.3 has none to clear */
  if (syscall(SYS_capset, &header, none) != 0) return fail(step, "capset");
  return 0;
}

/* ---- Landlock ------------------------------------------------------------------------------------ */

/* Of linux/landlock.h, which old headers lack. */
struct landlock_ruleset {
  uint64_t handled_access_fs, handled_access_net, scoped;
};
struct landlock_path_rule {
  uint64_t allowed_access;
  int32_t parent_fd;
} __attribute__((packed));

#define LANDLOCK_EXECUTE (1ull << 0)
#define LANDLOCK_READ_FILE (1ull << 2)
#define LANDLOCK_READ_DIR (1ull << 3)
#define LANDLOCK_VERSION_FLAG 1u
#define LANDLOCK_PATH_BENEATH 1

static long landlock_abi(void) { return syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_VERSION_FLAG); }

/* Forbids everything that this kernel's Landlock can forbid, but `allowed` beneath the root directory. */
static int landlock(uint64_t allowed, const char **step) {
  long abi = landlock_abi();
  if (abi < 1) return fail(step, "landlock_create_ruleset");
  struct landlock_ruleset rules = {.handled_access_fs = (1ull << 13) - 1};
  size_t size = sizeof rules.handled_access_fs;
  if (abi >= 2) rules.handled_access_fs |= 1ull << 13; /* renaming and linking across directories */
  if (abi >= 3) rules.handled_access_fs |= 1ull << 14; /* truncating */
  if (abi >= 5) rules.handled_access_fs |= 1ull << 15; /* ioctl on devices */
  if (abi >= 4) {
    rules.handled_access_net = 3; /* binding and connecting TCP */
    size = offsetof(struct landlock_ruleset, scoped);
  }
  if (abi >= 6) {
    rules.scoped = 3; /* abstract UNIX sockets and signals of others */
    size = sizeof rules;
  }
  int ruleset = (int)syscall(SYS_landlock_create_ruleset, &rules, size, 0);
  if (ruleset < 0) return fail(step, "landlock_create_ruleset");
  int result = 0;
  if (allowed != 0) {
    struct landlock_path_rule rule = {.allowed_access = allowed};
    rule.parent_fd = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (rule.parent_fd < 0 || syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_PATH_BENEATH, &rule, 0) != 0)
      result = fail(step, "landlock_add_rule");
    if (rule.parent_fd >= 0) close(rule.parent_fd);
  }
  if (result == 0 && syscall(SYS_landlock_restrict_self, ruleset, 0) != 0) result = fail(step, "landlock_restrict_self");
  int saved = errno;
  close(ruleset);
  errno = saved;
  return result;
}

/* ---- seccomp --------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define THIS_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define THIS_ARCH AUDIT_ARCH_AARCH64
#else
#error "no system call filter for this architecture yet"
#endif

/* What a run may call, each for a reason. Whatever is not here kills it (SIGSYS). All of these work
 * on its own memory, its own threads, its three files or the clock. */
static const int run_calls[] = {
    /* The guest's input and output: its standard files, the only ones there are. */
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_lseek,
    /* What wasmtime asks about them: whether they are files, pipes or terminals. */
    SYS_fstat, SYS_statx,
#ifdef SYS_newfstatat
    SYS_newfstatat, /* fstat of newer C libraries; a path leads nowhere: empty root, Landlock */
#endif
    /* The event loop's and the artifact's descriptors, which are closed already or about to be. */
    SYS_close, SYS_close_range,
    /* Linear memory, stacks, heap. Making memory executable is looked at below. */
    SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk,
    /* Threads: waiting for one another, and their ends. Starting one is looked at below. */
    SYS_futex, SYS_set_robust_list, SYS_rseq, SYS_set_tid_address, SYS_sched_yield, SYS_sched_getaffinity,
    SYS_gettid, SYS_getpid, SYS_exit, SYS_exit_group, SYS_membarrier,
    /* Traps are signals that wasmtime handles, on stacks of their own. */
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack,
    /* Clocks and sleep; the vDSO answers most of it. */
    SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday, SYS_restart_syscall,
    /* poll_oneoff on standard files. */
    SYS_ppoll,
#ifdef SYS_poll
    SYS_poll,
#endif
    /* The seed of the guest's random numbers. */
    SYS_getrandom,
};

/* What the zygote calls besides, to fork runs, tell of them, and confine them. */
static const int zygote_calls[] = {
    SYS_recvmsg, SYS_sendmsg,                                   /* the spawner's requests and its answers */
    SYS_wait4, SYS_pidfd_open, SYS_kill,                        /* its children; others are in other namespaces */
    SYS_dup3,                                                   /* a run's files */
#ifdef SYS_dup2
    SYS_dup2,
#endif
    SYS_getppid, SYS_sched_setaffinity, SYS_getcpu,             /* where a run is placed; not every vDSO has getcpu */
    SYS_prctl, SYS_seccomp, SYS_prlimit64, SYS_setitimer,       /* a run's confinement */
#ifdef SYS_setrlimit
    SYS_setrlimit, SYS_getrlimit,
#endif
};

/* glibc's pthread_create, and nothing else that clone could do. */
#define THREAD_FLAGS                                                                                         \
  (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS |          \
   CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
/* glibc's fork. */
#define FORK_FLAGS (CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD)

#define MOST_INSTRUCTIONS 256

struct filter {
  struct sock_filter code[MOST_INSTRUCTIONS];
  unsigned short count;
};

static void emit(struct filter *filter, uint16_t code, uint8_t yes, uint8_t no, uint32_t value) {
  filter->code[filter->count++] = (struct sock_filter){code, yes, no, value};
}

static void load(struct filter *filter, size_t offset) {
  emit(filter, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)offset);
}

static void load_argument(struct filter *filter, size_t index) { /* its lower half; both are little-endian */
  load(filter, offsetof(struct seccomp_data, args) + index * sizeof(uint64_t));
}

static void answer(struct filter *filter, uint32_t verdict) { emit(filter, BPF_RET | BPF_K, 0, 0, verdict); }

/* The next `size` instructions are for this call; it is never looked at again after them. */
static void on_call(struct filter *filter, int call, uint8_t size) {
  emit(filter, BPF_JMP | BPF_JEQ | BPF_K, 0, size, (uint32_t)call);
}

static void allow(struct filter *filter, const int *calls, size_t count) {
  for (size_t i = 0; i < count; i++) {
    on_call(filter, calls[i], 1);
    answer(filter, SECCOMP_RET_ALLOW);
  }
}

/* Allows a call where an argument is `value`. */
static void allow_equal(struct filter *filter, int call, size_t argument, uint32_t value, uint32_t otherwise) {
  on_call(filter, call, 4);
  load_argument(filter, argument);
  emit(filter, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, value);
  answer(filter, SECCOMP_RET_ALLOW);
  answer(filter, otherwise);
}

static void allow_without(struct filter *filter, int call, size_t argument, uint32_t bits) {
  on_call(filter, call, 4);
  load_argument(filter, argument);
  emit(filter, BPF_JMP | BPF_JSET | BPF_K, 1, 0, bits);
  answer(filter, SECCOMP_RET_ALLOW);
  answer(filter, SECCOMP_RET_KILL_PROCESS);
}

static void refuse(struct filter *filter, int call, int error) {
  on_call(filter, call, 1);
  answer(filter, SECCOMP_RET_ERRNO | (uint32_t)error);
}

static void begin_filter(struct filter *filter) {
  filter->count = 0;
  load(filter, offsetof(struct seccomp_data, arch));
  emit(filter, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, THIS_ARCH);
  answer(filter, SECCOMP_RET_KILL_PROCESS);
  load(filter, offsetof(struct seccomp_data, nr)); /* x32 calls have other numbers: none of them is allowed */
}

/* Calls of a run that depend on what is asked. */
static void allow_some(struct filter *filter, pid_t pid) {
  /* No new code: what a guest writes is never executed. */
  allow_without(filter, SYS_mmap, 2, PROT_EXEC);
  allow_without(filter, SYS_mprotect, 2, PROT_EXEC);
  /* The arguments of clone3 are in memory, where a filter cannot see them; the C library then uses clone. */
  refuse(filter, SYS_clone3, ENOSYS);
  /* abort() signals its own thread. */
  if (pid != 0) allow_equal(filter, SYS_tgkill, 0, (uint32_t)pid, SECCOMP_RET_KILL_PROCESS);
  /* "Is this a terminal?" No. */
  refuse(filter, SYS_ioctl, ENOTTY);
  /* Whether a descriptor is open, and how; another cannot be made: RLIMIT_NOFILE. */
  on_call(filter, SYS_fcntl, 6);
  load_argument(filter, 1);
  emit(filter, BPF_JMP | BPF_JEQ | BPF_K, 2, 0, F_GETFD);
  emit(filter, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, F_GETFL);
  emit(filter, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, F_DUPFD_CLOEXEC);
  answer(filter, SECCOMP_RET_ALLOW);
  answer(filter, SECCOMP_RET_ERRNO | EINVAL);
}

static int install(struct filter *filter, const char **step) {
  answer(filter, SECCOMP_RET_KILL_PROCESS);
  struct sock_fprog program = {.len = filter->count, .filter = filter->code};
  if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0) return 0;
  return fail(step, "seccomp");
}

static int filter_run(const char **step) {
  struct filter filter;
  begin_filter(&filter);
  allow(&filter, run_calls, COUNT(run_calls));
  allow_equal(&filter, SYS_clone, 0, THREAD_FLAGS, SECCOMP_RET_KILL_PROCESS);
  /* A thread's name; and of memory, which the allocator of newer C libraries names. */
  on_call(&filter, SYS_prctl, 5);
  load_argument(&filter, 0);
  emit(&filter, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, PR_SET_NAME);
  emit(&filter, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, PR_SET_VMA);
  answer(&filter, SECCOMP_RET_ALLOW);
  answer(&filter, SECCOMP_RET_KILL_PROCESS);
  allow_some(&filter, getpid());
  return install(&filter, step);
}

static int filter_zygote(const char **step) {
  struct filter filter;
  begin_filter(&filter);
  allow(&filter, zygote_calls, COUNT(zygote_calls));
  allow(&filter, run_calls, COUNT(run_calls));
  on_call(&filter, SYS_clone, 5);
  load_argument(&filter, 0);
  emit(&filter, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, FORK_FLAGS);
  emit(&filter, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, THREAD_FLAGS);
  answer(&filter, SECCOMP_RET_ALLOW);
  answer(&filter, SECCOMP_RET_KILL_PROCESS);
  on_call(&filter, SYS_tgkill, 1); /* a run's own filter knows the number of its process */
  answer(&filter, SECCOMP_RET_ALLOW);
  allow_some(&filter, 0);
  return install(&filter, step);
}

/* ---- the places ------------------------------------------------------------------------------------ */

int confine_loading(const struct confine_loading *how, const char **step) {
  if (how->in_new_namespaces && settle_in_namespaces(step) != 0) return -1;
  if ((how->layers & CONFINE_EMPTY_ROOT) && prepare_empty_root(step) != 0) return -1;
  /* After that: to become somebody else clears it. */
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return fail(step, "PR_SET_PDEATHSIG");
  if (how->parent != 0 && getppid() != how->parent) { /* the parent died before the line above */
    errno = ESRCH;
    return fail(step, "getppid");
  }
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return fail(step, "PR_SET_NO_NEW_PRIVS");
  /* Loading reads and executes. Memory files, the artifact's for one, are not subject to it. */
  if ((how->layers & CONFINE_LANDLOCK) && landlock(LANDLOCK_EXECUTE | LANDLOCK_READ_FILE | LANDLOCK_READ_DIR, step) != 0)
    return -1;
  return 0;
}

/* What only loading needed. */
static int close_up(unsigned layers, const char **step) {
  if ((layers & CONFINE_EMPTY_ROOT) && empty_root(step) != 0) return -1;
  if ((layers & CONFINE_CAPABILITIES) && drop_capabilities(step) != 0) return -1;
  if ((layers & CONFINE_LANDLOCK) && landlock(0, step) != 0) return -1;
  if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) return fail(step, "PR_SET_DUMPABLE");
  return 0;
}

int confine_zygote(unsigned layers, const char **step) {
  if (close_up(layers, step) != 0) return -1;
  if ((layers & CONFINE_SECCOMP) && filter_zygote(step) != 0) return -1;
  return (int)layers;
}

int confine_run(unsigned layers, const struct confine_limits *limits, pid_t parent, const char **step) {
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return fail(step, "PR_SET_PDEATHSIG"); /* fork clears it */
  if (getppid() != parent) {
    errno = ESRCH;
    return fail(step, "getppid");
  }
  if (confine_limit(limits) != 0) return fail(step, "setrlimit");
  return (layers & CONFINE_SECCOMP) ? filter_run(step) : 0;
}

int confine_exec_run(unsigned layers, const char **step) {
  if (close_up(layers, step) != 0) return -1;
  if (limit(RLIMIT_NOFILE, STDERR_FILENO + 1) != 0) return fail(step, "setrlimit");
  if ((layers & CONFINE_SECCOMP) && filter_run(step) != 0) return -1;
  return (int)layers;
}

/* ---- what works here --------------------------------------------------------------------------------- */

/* The child's word, through a pipe: the step that failed, which is a constant of this program, and errno. */
struct word {
  const char *step;
  int error;
};

static int try_layer(unsigned layer, const char **step) {
  struct confine_limits limits = {NANOSECONDS_PER_SECOND, 1ull << 40, 1ull << 46, 1 << 20, 64};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return fail(step, "PR_SET_NO_NEW_PRIVS");
  switch (layer) {
    case CONFINE_LIMITS: return confine_limit(&limits) == 0 ? 0 : fail(step, "setrlimit");
    case CONFINE_NO_NEW_PRIVS: return 0;
    case CONFINE_NAMESPACES: return settle_in_namespaces(step);
    case CONFINE_EMPTY_ROOT: 
      return settle_in_namespaces(step) != 0 || prepare_empty_root(step) != 0 ? -1 : empty_root(step);
    case CONFINE_CAPABILITIES: return drop_capabilities(step);
    case CONFINE_LANDLOCK: return landlock(0, step);
    default: return filter_zygote(step);
  }
}

static void try_in_child(struct confine_finding *finding, unsigned long namespaces) {
  int ends[2];
  finding->error = 0;
  finding->step = "pipe";
  if (pipe(ends) != 0) {
    finding->error = errno;
    return;
  }
  pid_t pid = (pid_t)syscall(SYS_clone, namespaces | SIGCHLD, NULL, NULL, NULL, NULL);
  if (pid == 0) {
    struct word word = {NULL, 0};
    if (try_layer(finding->layer, &word.step) != 0) word.error = errno != 0 ? errno : EINVAL;
    syscall(SYS_write, ends[1], &word, sizeof word);
    syscall(SYS_exit_group, 0);
  }
  finding->step = namespaces != 0 ? "clone with new namespaces" : "clone";
  finding->error = errno;
  close(ends[1]);
  if (pid > 0) {
    struct word word;
    if (read(ends[0], &word, sizeof word) != (ssize_t)sizeof word)
      word = (struct word){"killed while it was tried", EINVAL}; /* by this filter, or by one around the service */
    finding->error = word.error;
    finding->step = word.step;
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) continue;
  }
  finding->works = pid > 0 && finding->error == 0;
  close(ends[0]);
}

unsigned confine_detect(struct confine_finding *findings) {
  unsigned works = 0;
  for (unsigned i = 0; i < CONFINE_LAYER_COUNT; i++) {
    struct confine_finding *finding = &findings[i];
    *finding = (struct confine_finding){.layer = 1u << i};
    int in_namespaces = finding->layer == CONFINE_NAMESPACES || finding->layer == CONFINE_EMPTY_ROOT;
    unsigned long flags = confine_clone_flags(CONFINE_NAMESPACES);
    try_in_child(finding, in_namespaces ? flags : 0);
    if (finding->works) works |= finding->layer;
  }
  return works;
}
