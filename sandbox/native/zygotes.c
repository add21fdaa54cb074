/* The processes that fork runs: started when a program is registered, replaced when they die, wear
 * out or look attacked, stopped when nobody needs them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "spawner.h"

#define MOST_STARTING 4
#define START_NANOSECONDS (10 * NANOSECONDS_PER_SECOND)
/* All runs of a zygote have the same addresses: a secret that a hostile guest could learn bit by bit. */
#define MOST_RUNS_SERVED 20000
#define MOST_AGE_NANOSECONDS (3600 * NANOSECONDS_PER_SECOND)
#define FIRST_PAUSE_NANOSECONDS (NANOSECONDS_PER_SECOND / 20)
#define LONGEST_PAUSE_NANOSECONDS (10 * NANOSECONDS_PER_SECOND)
/* One that lived so long did not die of its start. */
#define STABLE_NANOSECONDS (10 * NANOSECONDS_PER_SECOND)
/* So many crashes of runs within such a time, and the program gets no zygote for as long. */
#define CRASHES_TO_SHUN 3
#define SHUN_NANOSECONDS (60 * NANOSECONDS_PER_SECOND)
#define ON_DEMAND UINT64_MAX
#define MOST_ENVIRONMENT (BULKHEAD_MAX_STRINGS + 8)

static struct zygote *zygotes;
static int starting_count;

static struct zygote_message message_about(const struct program *program, enum zygote_state state, unsigned layers) {
  struct zygote_message message = {
      .header = message_header(MESSAGE_ZYGOTE, 0), .state = (uint32_t)state, .layers = layers};
  memcpy(message.key, program->key, sizeof message.key);
  return message;
}

void tell_zygote_state(struct client *client, const struct program *program) {
  struct zygote_message message;
  if (program->zygote != NULL) message = message_about(program, ZYGOTE_STATE_READY, program->zygote->layers);
  else if (program->unfit) message = message_about(program, ZYGOTE_STATE_UNFIT, 0);
  else return;
  send_to_client(client, &message, sizeof message);
}

static void report(const struct program *program, enum zygote_state state, unsigned layers, int error, const char *step) {
  struct zygote_message message = message_about(program, state, layers);
  message.error = error;
  snprintf(message.step, sizeof message.step, "%s", step);
  for (struct client *client = clients; client != NULL; client = client->next)
    for (struct reference *reference = client->programs; reference != NULL; reference = reference->next)
      if (reference->program == program) {
        send_to_client(client, &message, sizeof message); /* advice: lost when the socket is full */
        break;
      }
}

/* ---- start ------------------------------------------------------------------------------------ */

static int launch_zygote(struct zygote *zygote, int control_fd) {
  struct program *program = zygote->program;
  char *environment[MOST_ENVIRONMENT], variable[64];
  int count = 0, null = open("/dev/null", O_RDWR | O_CLOEXEC);
  if (null < 0) return -1;
  while (program->envp[count] != NULL && count < MOST_ENVIRONMENT - 2) {
    environment[count] = program->envp[count];
    count++;
  }
  snprintf(variable, sizeof variable, ZYGOTE_FD_VARIABLE "=%d", program->file_count);
  environment[count++] = variable;
  environment[count] = NULL;
  struct launch launch = {
      .argv = program->argv,
      .envp = environment,
      .file_count = program->file_count + 1,
      .layers = program->layers,
      .as_zygote = 1,
      .cpu = -1,
  };
  memcpy(launch.files, program->files, sizeof program->files);
  for (int i = 0; i < 3; i++) launch.files[i] = null;
  launch.files[program->file_count] = control_fd;
  int stage = launch_process(&launch, &zygote->pid, &zygote->pidfd);
  close_fd(&null);
  return stage == 0 ? 0 : -1;
}

static void free_zygote(struct zygote *zygote) {
  close_fd(&zygote->control_fd);
  close_fd(&zygote->pidfd);
  free(zygote);
}

static void start_zygote(struct program *program) {
  int ends[2] = {-1, -1};
  struct zygote *zygote = calloc(1, sizeof *zygote);
  if (zygote == NULL) die("calloc");
  zygote->source = (struct source){SOURCE_ZYGOTE, {.zygote = zygote}};
  zygote->process = (struct source){SOURCE_ZYGOTE_PROCESS, {.zygote = zygote}};
  zygote->program = program;
  zygote->pidfd = zygote->control_fd = -1;
  zygote->started_at = now_nanoseconds();
  zygote->deadline = zygote->started_at + START_NANOSECONDS;
  int launched = 0;
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0) {
    zygote->control_fd = ends[0];
    launched = launch_zygote(zygote, ends[1]) == 0;
  }
  int error = errno;
  close_fd(&ends[1]);
  if (launched && (watch(zygote->control_fd, &zygote->source) != 0 || watch(zygote->pidfd, &zygote->process) != 0)) {
    error = errno;
    kill_and_reap(zygote->pid);
    launched = 0;
  }
  if (!launched) {
    free_zygote(zygote);
    program->start_at = now_nanoseconds() + LONGEST_PAUSE_NANOSECONDS;
    report(program, ZYGOTE_STATE_DIED, 0, error, "starting it");
    return;
  }
  zygote->next = zygotes;
  zygotes = zygote;
  program->uses++;
  program->successor = zygote;
  starting_count++;
  wake_at(zygote->deadline);
}

/* ---- end -------------------------------------------------------------------------------------- */

void kill_zygote(struct zygote *zygote) {
  if (zygote->state == ZYGOTE_IS_DEAD) return;
  kill(-zygote->pid, SIGKILL);
  kill(zygote->pid, SIGKILL);
}

/* It gets no new runs, and ends with its last one. */
static void retire(struct zygote *zygote) {
  struct program *program = zygote->program;
  if (zygote->state == ZYGOTE_IS_DEAD) return;
  if (zygote->state == ZYGOTE_IS_STARTING) starting_count--;
  if (program->zygote == zygote) program->zygote = NULL;
  if (program->successor == zygote) program->successor = NULL;
  zygote->state = ZYGOTE_IS_RETIRING;
  if (zygote->active == 0) kill_zygote(zygote);
}

void retire_zygotes(struct program *program) {
  if (program->zygote != NULL) retire(program->zygote);
  if (program->successor != NULL) retire(program->successor);
}

/* The process is over, and with it all its runs. */
void on_zygote_end(struct zygote *zygote) {
  struct program *program = zygote->program;
  int status = 0, was_starting = zygote->state == ZYGOTE_IS_STARTING;
  if (zygote->state == ZYGOTE_IS_DEAD) return;
  while (waitpid(zygote->pid, &status, 0) < 0 && errno == EINTR) continue;
  for (struct run *run = runs; run != NULL; run = run->next)
    if (run->zygote == zygote && !run->ended) end_run(run, SIGKILL, 0, 0, 0);
  if (zygote->state != ZYGOTE_IS_RETIRING) {
    uint64_t now = now_nanoseconds();
    int stable = now - zygote->started_at > STABLE_NANOSECONDS;
    uint64_t pause = stable || program->pause_nanoseconds == 0 ? FIRST_PAUSE_NANOSECONDS : program->pause_nanoseconds * 2;
    program->pause_nanoseconds = pause < LONGEST_PAUSE_NANOSECONDS ? pause : LONGEST_PAUSE_NANOSECONDS;
    program->start_at = now + (was_starting ? LONGEST_PAUSE_NANOSECONDS : program->pause_nanoseconds);
    if (!program->unfit) report(program, ZYGOTE_STATE_DIED, 0, status, was_starting ? "before it was ready" : "");
    wake_at(program->start_at);
  }
  retire(zygote); /* takes it out of its program */
  zygote->state = ZYGOTE_IS_DEAD;
}

void sweep_zygotes(void) {
  for (struct zygote **at = &zygotes; *at != NULL;) {
    struct zygote *zygote = *at;
    if (zygote->state != ZYGOTE_IS_DEAD) {
      at = &zygote->next;
      continue;
    }
    *at = zygote->next;
    release_program(zygote->program);
    free_zygote(zygote);
  }
}

void kill_all_zygotes(void) {
  for (struct zygote *zygote = zygotes; zygote != NULL; zygote = zygote->next) kill_zygote(zygote);
}

/* ---- runs -------------------------------------------------------------------------------------- */

/* 0, or -1: it does not take it now. */
static int send_request(struct zygote *zygote, const struct zygote_run *request, const int *files) {
  char room[CMSG_SPACE(3 * sizeof(int))] __attribute__((aligned(8))) = {0};
  struct iovec part = {.iov_base = (void *)(uintptr_t)request, .iov_len = sizeof *request};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
  struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(3 * sizeof(int));
  memcpy(CMSG_DATA(rights), files, 3 * sizeof(int));
  return sendmsg(zygote->control_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -1 : 0;
}

int run_in_zygote(struct run *run, const int *files) {
  struct program *program = run->program;
  struct zygote *zygote = program->zygote;
  if (zygote == NULL && program->start_at == ON_DEMAND) {
    program->start_at = 0;
    wake_at(0);
  }
  if (zygote == NULL || zygote->active >= ZYGOTE_MAX_RUNS) return -1;
  struct zygote_run request = {
      .header = {ZYGOTE_PROTOCOL_MAGIC, ZYGOTE_PROTOCOL_VERSION, ZYGOTE_RUN, run->number},
      .limits = run->limits,
      .pin_cpu = run->pinned,
  };
  request.limits.open_files = 3; /* those that it has */
  if (send_request(zygote, &request, files) != 0) return -1;
  run->zygote = zygote;
  zygote->active++;
  if (++zygote->served == MOST_RUNS_SERVED) wake_at(0);
  return 0;
}

static int is_crash(int wait_status) {
  if (!WIFSIGNALED(wait_status)) return 0;
  int number = WTERMSIG(wait_status);
  return number == SIGSEGV || number == SIGILL || number == SIGBUS || number == SIGABRT || number == SIGSYS;
}

/* Somebody may be guessing addresses: the next runs get others, and after some crashes each its own. */
static void on_crash(struct program *program) {
  uint64_t now = now_nanoseconds();
  if (now - program->crashed_at > SHUN_NANOSECONDS) program->crashes = 0;
  program->crashed_at = now;
  program->start_at = now;
  if (++program->crashes == CRASHES_TO_SHUN) report(program, ZYGOTE_STATE_SHUNNED, 0, 0, "runs crashed");
  if (program->crashes >= CRASHES_TO_SHUN) program->start_at = now + SHUN_NANOSECONDS;
  retire_zygotes(program);
  wake_at(program->start_at);
}

static void zygote_run_ended(struct zygote *zygote, int wait_status) {
  zygote->active--;
  if (is_crash(wait_status) && zygote->program->wanted > 0) on_crash(zygote->program);
  if (zygote->state == ZYGOTE_IS_RETIRING && zygote->active == 0) kill_zygote(zygote);
}

/* ---- messages ---------------------------------------------------------------------------------- */

static void on_ready(struct zygote *zygote, unsigned layers) {
  struct program *program = zygote->program;
  if (zygote->state != ZYGOTE_IS_STARTING) return;
  struct zygote *old = program->zygote;
  starting_count--;
  zygote->state = ZYGOTE_IS_READY;
  zygote->layers = layers;
  zygote->deadline = UINT64_MAX;
  program->successor = NULL;
  program->zygote = zygote;
  if (old != NULL) retire(old);
  report(program, ZYGOTE_STATE_READY, layers, 0, "");
  wake_at(0);
}

static void on_unfit(struct zygote *zygote, const struct zygote_failed *message) {
  char step[sizeof message->step];
  memcpy(step, message->step, sizeof step);
  step[sizeof step - 1] = 0;
  zygote->program->unfit = 1;
  report(zygote->program, ZYGOTE_STATE_UNFIT, 0, message->error, step);
}

union zygote_reply {
  struct zygote_header header;
  struct zygote_ready ready;
  struct zygote_ended ended;
  struct zygote_failed failed;
};

/* The size that a reply of this type has; 0: there is no such type. */
static size_t reply_size(uint16_t type) {
  switch (type) {
    case ZYGOTE_READY: return sizeof(struct zygote_ready);
    case ZYGOTE_STARTED: return sizeof(struct zygote_started);
    case ZYGOTE_ENDED: return sizeof(struct zygote_ended);
    case ZYGOTE_UNFIT:
    case ZYGOTE_FAILED: return sizeof(struct zygote_failed);
    default: return 0;
  }
}

/* Takes the descriptor, if there is one. */
static void on_reply(struct zygote *zygote, const union zygote_reply *reply, int fd) {
  struct run *run = find_run_by_number(reply->header.run_id);
  if (run != NULL && run->zygote != zygote) run = NULL;
  if (reply->header.type == ZYGOTE_READY) {
    on_ready(zygote, reply->ready.layers);
  } else if (reply->header.type == ZYGOTE_UNFIT) {
    on_unfit(zygote, &reply->failed);
  } else if (run == NULL) {
    /* not one of ours, or over: nobody waits for it */
  } else if (reply->header.type == ZYGOTE_STARTED) {
    on_run_started(run, fd);
    fd = -1;
  } else if (reply->header.type == ZYGOTE_ENDED) {
    end_run(run, reply->ended.wait_status, reply->ended.cpu_nanoseconds, reply->ended.peak_resident_bytes,
            reply->ended.touched_bytes);
    zygote_run_ended(zygote, reply->ended.wait_status);
  } else {
    fail_run(run, STAGE_PREPARE, reply->failed.error);
    zygote_run_ended(zygote, 0);
  }
  close_fd(&fd);
}

static void take_message(struct zygote *zygote) {
  union zygote_reply reply;
  int fd = -1;
  char room[CMSG_SPACE(sizeof fd)] __attribute__((aligned(8)));
  struct iovec part = {.iov_base = &reply, .iov_len = sizeof reply};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
  ssize_t size = recvmsg(zygote->control_fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
  struct cmsghdr *rights = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
  if (rights != NULL && rights->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(rights), sizeof fd);
  if (size < (ssize_t)sizeof reply.header || reply.header.magic != ZYGOTE_PROTOCOL_MAGIC ||
      reply.header.version != ZYGOTE_PROTOCOL_VERSION || (size_t)size != reply_size(reply.header.type)) {
    close_fd(&fd);
    close_fd(&zygote->control_fd); /* it has ended, or talks nonsense; its runs end with it */
    kill_zygote(zygote);
    return;
  }
  on_reply(zygote, &reply, fd);
}

void on_zygote_message(struct zygote *zygote) {
  if (zygote->control_fd >= 0) take_message(zygote); /* if there are more, epoll says so at once */
}

/* ---- time -------------------------------------------------------------------------------------- */

static void tend(struct program *program, uint64_t now) {
  struct zygote *zygote = program->zygote;
  if (zygote != NULL && program->idle_nanoseconds != 0) {
    uint64_t idle_at = program->used_at + program->idle_nanoseconds;
    if (now >= idle_at && zygote->active == 0) {
      retire_zygotes(program);
      program->start_at = ON_DEMAND;
      return;
    }
    wake_at(now >= idle_at ? now + program->idle_nanoseconds : idle_at); /* one with a run is not idle */
  }
  int worn = zygote != NULL &&
             (zygote->served >= MOST_RUNS_SERVED || now - zygote->started_at > MOST_AGE_NANOSECONDS);
  if ((zygote != NULL && !worn) || program->successor != NULL || program->start_at == ON_DEMAND) return;
  if (now < program->start_at) wake_at(program->start_at);
  else if (starting_count < MOST_STARTING) start_zygote(program);
}

void tend_zygotes(void) {
  uint64_t now = now_nanoseconds();
  for (struct program *program = programs; program != NULL; program = program->next)
    if ((program->flags & PROGRAM_HAS_ZYGOTE) && program->wanted > 0 && !program->unfit) tend(program, now);
  for (struct zygote *zygote = zygotes; zygote != NULL; zygote = zygote->next) {
    if (zygote->state != ZYGOTE_IS_STARTING) continue;
    if (now >= zygote->deadline) kill_zygote(zygote);
    else wake_at(zygote->deadline);
  }
}
