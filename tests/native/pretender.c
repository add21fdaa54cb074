/*
 * A program that behaves as wasmtime does, as far as the zygote library can see: it starts a thread,
 * makes an event loop, asks for the seed, and then copies its input to its output. Linked with the
 * library's own sources, so that sanitizers see all of them.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

static int epoll_fd, wake_fd;

/* Waits to be woken, as tokio's worker does. */
static void *work(void *argument) {
  struct epoll_event event;
  int count = epoll_wait(epoll_fd, &event, 1, 60000);
  return count == 1 && event.data.u64 == 42 ? argument : NULL;
}

int main(void) {
  char seed[32], buffer[4096];
  pthread_t worker;
  void *result = NULL;
  struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = 42};
  const unsigned long long one = 1;
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_fd < 0 || wake_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, wake_fd, &event) != 0) return 90;
  if (pthread_create(&worker, NULL, work, seed) != 0) return 91;
  if (getrandom(seed, sizeof seed, 0) != (ssize_t)sizeof seed) return 92; /* the fork point */
  for (ssize_t got; (got = read(STDIN_FILENO, buffer, sizeof buffer)) > 0;)
    if (write(STDOUT_FILENO, buffer, (size_t)got) != got) return 93;
  if (write(wake_fd, &one, sizeof one) != (ssize_t)sizeof one) return 94;
  if (pthread_join(worker, &result) != 0 || result != seed) return 95;
  if (close(epoll_fd) != 0 || close(wake_fd) != 0) return 96;
  return 0;
}
