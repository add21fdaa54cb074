/*
 * Native code that is put where a guest's compiled code would be: what a module could do if wasmtime had
 * a bug that let it. Standard input says which attempt to make. One that succeeds says so and exits with
 * 0; one that is refused exits with 77; what the kernel does to the others is what the tests look at.
 *
 * It has no C library and no writable data, and may lie at any address. Never returns.
 */
#include <stddef.h>
#include <stdint.h>
#include <asm/unistd.h>

#define REFUSED 77

static long call(long number, long a, long b, long c, long d, long e, long f) {
  long result;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
}

#define CALL0(n) call(n, 0, 0, 0, 0, 0, 0)
#define CALL1(n, a) call(n, (long)(a), 0, 0, 0, 0, 0)
#define CALL2(n, a, b) call(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define CALL3(n, a, b, c) call(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define CALL4(n, a, b, c, d) call(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define CALL6(n, a, b, c, d, e, f) call(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define AT_CWD (-100)

static void *more_memory(size_t bytes) {
  long at = CALL6(__NR_mmap, 0, bytes, 3, 0x22, -1, 0);
  return at < 0 && at > -4096 ? NULL : (void *)at;
}

/* Files */
#define ATTEMPT(name) static long attempt_##name(void)
ATTEMPT(open_a_file) { return CALL4(__NR_openat, AT_CWD, "/etc/passwd", 0, 0); }
ATTEMPT(open_with_the_old_call) { return CALL3(__NR_open, "/etc/passwd", 0, 0); }
ATTEMPT(open_with_openat2) {
  uint64_t how[3] = {0, 0, 0};
  return CALL4(__NR_openat2, AT_CWD, "/", how, sizeof how);
}
ATTEMPT(make_a_file) { return CALL4(__NR_openat, AT_CWD, "/tmp/escaped", 0x41, 0600); }
ATTEMPT(open_the_memory_of_a_process) { return CALL4(__NR_openat, AT_CWD, "/proc/1/mem", 2, 0); }
ATTEMPT(open_its_own_memory) { return CALL4(__NR_openat, AT_CWD, "/proc/self/mem", 2, 0); }
ATTEMPT(open_by_handle) { return CALL3(__NR_open_by_handle_at, AT_CWD, "", 0); }
ATTEMPT(look_at_a_path) {
  char info[256];
  return CALL4(__NR_newfstatat, AT_CWD, "/etc", info, 0);
}
ATTEMPT(look_at_a_path_with_statx) {
  char info[256];
  return call(__NR_statx, AT_CWD, (long)"/etc", 0, 0x7ff, (long)info, 0);
}
ATTEMPT(look_into_the_root_directory) {
  char info[256];
  return CALL4(__NR_newfstatat, AT_CWD, "/proc", info, 0);
}
ATTEMPT(make_a_directory) { return CALL2(__NR_mkdir, "/escaped", 0700); }
ATTEMPT(remove_a_file) { return CALL1(__NR_unlink, "/tmp/escaped"); }
ATTEMPT(read_a_link) {
  char text[64];
  return CALL3(__NR_readlink, "/proc/self/exe", text, sizeof text);
}
ATTEMPT(change_directory) { return CALL1(__NR_chdir, "/"); }
ATTEMPT(change_root) { return CALL1(__NR_chroot, "."); }
ATTEMPT(pivot_root) { return CALL2(__NR_pivot_root, ".", "."); }
ATTEMPT(mount_something) { return call(__NR_mount, (long)"none", (long)"/", (long)"tmpfs", 0, 0, 0); }
ATTEMPT(unmount_something) { return CALL2(__NR_umount2, "/", 2); }
ATTEMPT(truncate_a_file) { return CALL2(__NR_truncate, "/etc/passwd", 0); }
ATTEMPT(watch_files) { return CALL1(__NR_inotify_init1, 0); }
ATTEMPT(make_a_memory_file) { return CALL2(__NR_memfd_create, "escaped", 0); }

/* Descriptors */
ATTEMPT(find_another_descriptor) {
  for (int fd = 3; fd < 4096; fd++)
    if (CALL3(__NR_fcntl, fd, 1, 0) >= 0) return fd;
  return -9;
}
ATTEMPT(read_from_another_descriptor) {
  char text[16];
  for (int fd = 3; fd < 4096; fd++)
    if (CALL3(__NR_read, fd, text, sizeof text) >= 0) return fd;
  return -9;
}
ATTEMPT(copy_a_descriptor) { return CALL1(__NR_dup, 0); }
ATTEMPT(copy_a_descriptor_with_fcntl) { return CALL3(__NR_fcntl, 0, 1030, 3); }
ATTEMPT(make_a_pipe) {
  int ends[2];
  return CALL2(__NR_pipe2, ends, 0);
}
ATTEMPT(make_an_eventfd) { return CALL2(__NR_eventfd2, 0, 0); }
ATTEMPT(make_an_epoll) { return CALL1(__NR_epoll_create1, 0); }
ATTEMPT(own_a_descriptors_signals) { return CALL3(__NR_fcntl, 0, 8, 1); }
ATTEMPT(type_into_a_terminal) { return CALL3(__NR_ioctl, 0, 0x5412, "x"); }
ATTEMPT(receive_a_descriptor) {
  char message[64] = {0};
  return CALL3(__NR_recvmsg, 0, message, 0);
}
ATTEMPT(send_a_descriptor) {
  char message[64] = {0};
  return CALL3(__NR_sendmsg, 1, message, 0);
}

/* Network */
ATTEMPT(make_an_internet_socket) { return CALL3(__NR_socket, 2, 1, 0); }
ATTEMPT(make_a_unix_socket) { return CALL3(__NR_socket, 1, 1, 0); }
ATTEMPT(make_a_netlink_socket) { return CALL3(__NR_socket, 16, 3, 0); }
ATTEMPT(make_a_packet_socket) { return CALL3(__NR_socket, 17, 3, 0); }
ATTEMPT(make_a_vsock_socket) { return CALL3(__NR_socket, 40, 1, 0); }
ATTEMPT(make_a_socket_pair) {
  int ends[2];
  return CALL4(__NR_socketpair, 1, 1, 0, ends);
}
ATTEMPT(connect_a_descriptor) { return CALL3(__NR_connect, 0, "", 0); }

/* Processes */
ATTEMPT(execute_a_program) {
  char *arguments[] = {NULL};
  return CALL3(__NR_execve, "/bin/sh", arguments, arguments);
}
ATTEMPT(execute_a_descriptor) {
  char *arguments[] = {NULL};
  return call(__NR_execveat, 0, (long)"", (long)arguments, (long)arguments, 0x1000, 0);
}
ATTEMPT(fork_with_the_old_call) { return CALL0(__NR_fork); }
ATTEMPT(fork_with_vfork) { return CALL0(__NR_vfork); }
ATTEMPT(fork_with_clone) { return CALL2(__NR_clone, 17, 0); }
ATTEMPT(fork_as_the_zygote_does) { return CALL2(__NR_clone, 0x01200011, 0); }
ATTEMPT(fork_with_clone3) {
  uint64_t arguments[11] = {0, 0, 0, 0, 17};
  return CALL2(__NR_clone3, arguments, 88);
}
ATTEMPT(clone_into_a_user_namespace) { return CALL2(__NR_clone, 0x10000000 | 17, 0); }
ATTEMPT(clone_a_thread_into_a_namespace) { return CALL2(__NR_clone, 0x3d0f00 | 0x40000000, 0); }
ATTEMPT(unshare_namespaces) { return CALL1(__NR_unshare, 0x10000000); }
ATTEMPT(enter_a_namespace) { return CALL2(__NR_setns, 0, 0); }
ATTEMPT(leave_its_session) { return CALL0(__NR_setsid); }
ATTEMPT(leave_its_process_group) { return CALL2(__NR_setpgid, 0, 0); }
ATTEMPT(become_root) { return CALL1(__NR_setuid, 0); }
ATTEMPT(ask_for_its_parent) { return CALL0(__NR_getppid); }
ATTEMPT(wait_for_a_child) { return CALL4(__NR_wait4, -1, 0, 1, 0); }

/* Other processes */
ATTEMPT(kill_its_parent) { return CALL2(__NR_kill, 1, 9); }
ATTEMPT(kill_everybody) { return CALL2(__NR_kill, -1, 9); }
ATTEMPT(kill_its_group) { return CALL2(__NR_kill, 0, 9); }
ATTEMPT(kill_a_thread_of_another) { return CALL3(__NR_tgkill, 1, 1, 9); }
ATTEMPT(kill_a_thread_with_tkill) { return CALL2(__NR_tkill, 1, 9); }
ATTEMPT(queue_a_signal) {
  char info[128] = {0};
  return CALL3(__NR_rt_sigqueueinfo, 1, 9, info);
}
ATTEMPT(open_a_pidfd) { return CALL2(__NR_pidfd_open, 1, 0); }
ATTEMPT(take_a_descriptor_of_another) { return CALL3(__NR_pidfd_getfd, 0, 0, 0); }
ATTEMPT(signal_through_a_pidfd) { return CALL4(__NR_pidfd_send_signal, 0, 9, 0, 0); }
ATTEMPT(trace_another) { return CALL4(__NR_ptrace, 16, 1, 0, 0); }
ATTEMPT(be_traced) { return CALL4(__NR_ptrace, 0, 0, 0, 0); }
ATTEMPT(read_the_memory_of_another) {
  char text[16];
  uintptr_t ours[2] = {(uintptr_t)text, sizeof text}, theirs[2] = {4096, sizeof text};
  return CALL6(__NR_process_vm_readv, 1, ours, 1, theirs, 1, 0);
}
ATTEMPT(write_the_memory_of_another) {
  char text[16] = {0};
  uintptr_t ours[2] = {(uintptr_t)text, sizeof text}, theirs[2] = {4096, sizeof text};
  return CALL6(__NR_process_vm_writev, 1, ours, 1, theirs, 1, 0);
}
ATTEMPT(compare_with_another) { return call(__NR_kcmp, 1, 1, 0, 0, 0, 0); }
ATTEMPT(share_memory) { return CALL3(__NR_shmget, 0, 4096, 01600); }
ATTEMPT(make_a_message_queue) { return CALL2(__NR_msgget, 0, 01600); }
ATTEMPT(make_a_semaphore) { return CALL3(__NR_semget, 0, 1, 01600); }
ATTEMPT(open_a_posix_message_queue) { return CALL4(__NR_mq_open, "escaped", 0x42, 0600, 0); }

/* Its own limits */
ATTEMPT(raise_a_limit) {
  uint64_t limit[2] = {~0ull, ~0ull};
  return CALL4(__NR_prlimit64, 0, 0, limit, 0);
}
ATTEMPT(raise_a_limit_with_the_old_call) {
  uint64_t limit[2] = {~0ull, ~0ull};
  return CALL2(__NR_setrlimit, 7, limit);
}
ATTEMPT(stop_its_timer) {
  uint64_t none[4] = {0, 0, 0, 0};
  return CALL3(__NR_setitimer, 2, none, 0);
}
ATTEMPT(move_to_another_cpu) {
  uint64_t all = ~0ull;
  return CALL3(__NR_sched_setaffinity, 0, 8, &all);
}
ATTEMPT(become_a_realtime_process) {
  int priority = 50;
  return CALL3(__NR_sched_setscheduler, 0, 1, &priority);
}
ATTEMPT(raise_its_priority) { return CALL3(__NR_setpriority, 0, 0, -20); }
ATTEMPT(lock_memory) { return CALL1(__NR_mlockall, 3); }
ATTEMPT(outlive_its_parent) { return CALL2(__NR_prctl, 1, 0); }
ATTEMPT(be_dumpable) { return CALL2(__NR_prctl, 4, 1); }
ATTEMPT(raise_a_capability) { return call(__NR_prctl, 47, 2, 21, 0, 0, 0); }
ATTEMPT(set_capabilities) {
  uint32_t header[2] = {0x20080522, 0}, data[6] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
  return CALL2(__NR_capset, header, data);
}
ATTEMPT(add_a_filter) { return CALL3(__NR_seccomp, 1, 0, 0); }

/* Code */
ATTEMPT(map_executable_memory) { return CALL6(__NR_mmap, 0, 4096, 7, 0x22, -1, 0); }
ATTEMPT(make_memory_executable) {
  void *page = more_memory(4096);
  return CALL3(__NR_mprotect, page, 4096, 5);
}
ATTEMPT(make_memory_executable_with_a_key) {
  void *page = more_memory(4096);
  return CALL4(__NR_pkey_mprotect, page, 4096, 5, -1);
}
ATTEMPT(make_its_code_writable) {
  return CALL3(__NR_mprotect, (uintptr_t)&attempt_map_executable_memory & ~4095ul, 4096, 7);
}
ATTEMPT(change_its_personality) { return CALL1(__NR_personality, 0x0400000); }

/* The kernel */
ATTEMPT(load_a_bpf_program) { return CALL3(__NR_bpf, 5, 0, 0); }
ATTEMPT(make_an_io_uring) {
  char parameters[256] = {0};
  return CALL2(__NR_io_uring_setup, 8, parameters);
}
ATTEMPT(make_an_aio_context) {
  uint64_t context = 0;
  return CALL2(__NR_io_setup, 8, &context);
}
ATTEMPT(handle_page_faults) { return CALL1(__NR_userfaultfd, 0); }
ATTEMPT(count_performance) { return call(__NR_perf_event_open, (long)"", 0, -1, -1, 0, 0); }
ATTEMPT(add_a_key) { return call(__NR_add_key, (long)"user", (long)"x", (long)"x", 1, -3, 0); }
ATTEMPT(use_a_keyring) { return CALL3(__NR_keyctl, 0, -3, 1); }
ATTEMPT(load_a_kernel_module) { return CALL3(__NR_init_module, "", 0, ""); }
ATTEMPT(reboot) { return CALL4(__NR_reboot, 0xfee1dead, 672274793, 0x89abcdef, 0); }
ATTEMPT(read_the_kernels_log) {
  char text[64];
  return CALL3(__NR_syslog, 3, text, sizeof text);
}
ATTEMPT(set_the_clock) {
  uint64_t time[2] = {0, 0};
  return CALL2(__NR_settimeofday, time, 0);
}
ATTEMPT(name_the_host) { return CALL2(__NR_sethostname, "escaped", 7); }
ATTEMPT(ask_the_hosts_name) {
  char text[512];
  return CALL1(__NR_uname, text);
}
ATTEMPT(use_ports) { return CALL1(__NR_iopl, 3); }
ATTEMPT(change_descriptors_tables) { return CALL3(__NR_modify_ldt, 0, 0, 0); }
ATTEMPT(call_with_another_numbering) { return CALL4(0x40000000 | 257, AT_CWD, "/etc/passwd", 0, 0); }
ATTEMPT(call_as_a_32_bit_program) {
  long result;
  __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
  return result;
}
ATTEMPT(call_what_does_not_exist) { return CALL0(1000); }

/* Limits: these go on until something ends them. */
ATTEMPT(use_cpu_time_for_ever) {
  for (volatile unsigned long i = 0;; i++) continue;
}
ATTEMPT(use_cpu_time_with_all_signals_blocked) {
  uint64_t all = ~0ull;
  CALL4(__NR_rt_sigprocmask, 0, &all, 0, 8);
  for (volatile unsigned long i = 0;; i++) continue;
}
ATTEMPT(sleep_for_ever) {
  uint64_t hour[2] = {3600, 0};
  for (;;) CALL2(__NR_nanosleep, hour, 0);
}
ATTEMPT(write_without_end) {
  char *words = more_memory(65536);
  for (;;)
    if (CALL3(__NR_write, 1, words, 65536) < 0) return -27;
}
ATTEMPT(take_memory_without_end) {
  for (;;) {
    volatile char *block = more_memory(1 << 20);
    if (block == NULL) return -12;
    for (size_t at = 0; at < 1 << 20; at += 4096) block[at] = 1;
  }
}
ATTEMPT(start_threads_without_end) {
  for (;;) {
    char *stack = more_memory(65536);
    uint64_t hour[2] = {3600, 0};
    if (stack == NULL) return -12;
    long thread = call(__NR_clone, 0x3d0f00, (long)(stack + 65536 - 64), (long)stack, (long)stack, 0, 0);
    if (thread == 0)
      for (;;) CALL2(__NR_nanosleep, hour, 0);
    if (thread < 0) return thread;
  }
}

/* ---- */

static long attempt(unsigned number) {
  switch (number) {
#include "dispatch.h"
    default: return -22;
  }
}

__attribute__((section(".entry"), used, noreturn)) void entry(void) {
  char digits[16];
  unsigned number = 0;
  long size = CALL3(__NR_read, 0, digits, sizeof digits);
  for (long i = 0; i < size && digits[i] >= '0' && digits[i] <= '9'; i++) number = number * 10 + (unsigned)(digits[i] - '0');
  long result = attempt(number);
  if (result >= 0 || result < -4095) {
    static const char words[] = "escaped\n";
    CALL3(__NR_write, 1, words, sizeof words - 1);
    CALL1(__NR_exit_group, 0);
  }
  CALL1(__NR_exit_group, REFUSED);
  __builtin_unreachable();
}
