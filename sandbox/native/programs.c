/* What can be run: registered once, by as many clients as want to, and run many times. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "spawner.h"

struct program *programs;

struct program *find_program(const uint8_t *key) {
  for (struct program *program = programs; program != NULL; program = program->next)
    if (program->wanted > 0 && memcmp(program->key, key, BULKHEAD_KEY_BYTES) == 0) return program;
  return NULL;
}

/* What the preloaded library wants to know. */
static int add_variables(struct program *program, uint32_t count) {
  if (!(program->flags & PROGRAM_IS_WASMTIME)) return 0;
  if (asprintf(&program->envp[count], "LD_PRELOAD=%s", spawner_library) < 0) return -1;
  program->variables[0] = program->envp[count];
  if (asprintf(&program->envp[count + 1], ZYGOTE_LAYERS_VARIABLE "=%u", program->layers) < 0) return -1;
  program->variables[1] = program->envp[count + 1];
  return 0;
}

/* Splits the strings behind the message into argv and envp, in memory of the program's own. */
static int copy_strings(struct program *program, const struct program_message *message, size_t size) {
  size_t bytes = size - sizeof *message;
  uint64_t count = (uint64_t)message->argument_count + message->environment_count;
  if (message->argument_count == 0 || count > BULKHEAD_MAX_STRINGS || bytes == 0) goto invalid;
  program->strings = malloc(bytes);
  program->argv = calloc((size_t)count + 2 + MORE_VARIABLES, sizeof(char *));
  if (program->strings == NULL || program->argv == NULL) return -1;
  program->envp = program->argv + message->argument_count + 1;
  memcpy(program->strings, message + 1, bytes);
  char *at = program->strings, *end = at + bytes;
  for (uint64_t i = 0; i < count; i++) {
    char *stop = at < end ? memchr(at, 0, (size_t)(end - at)) : NULL;
    if (stop == NULL) goto invalid;
    if (i < message->argument_count) program->argv[i] = at;
    else program->envp[i - message->argument_count] = at;
    at = stop + 1;
  }
  if (at == end) return add_variables(program, message->environment_count);
invalid:
  errno = EINVAL;
  return -1;
}

static void free_program(struct program *program) {
  for (int i = 3; i < program->file_count; i++) close_fd(&program->files[i]);
  for (int i = 0; i < MORE_VARIABLES; i++) free(program->variables[i]);
  free(program->strings);
  free(program->argv);
  free(program);
}

static struct program *new_program(const struct program_message *message, size_t size) {
  struct program *program = calloc(1, sizeof *program);
  if (program == NULL) return NULL;
  memcpy(program->key, message->key, BULKHEAD_KEY_BYTES);
  program->flags = message->flags;
  program->layers = message->layers & spawner_layers;
  program->idle_nanoseconds = message->idle_nanoseconds;
  program->used_at = now_nanoseconds();
  program->file_count = 3;
  if (copy_strings(program, message, size) == 0) return program;
  int saved = errno;
  free_program(program);
  errno = saved;
  return NULL;
}

int register_program(struct client *client, const struct program_message *message, size_t size, int *files, int count) {
  struct program *program = find_program(message->key);
  struct reference *reference = calloc(1, sizeof *reference);
  int known = program != NULL;
  if (!known && reference != NULL && count <= BULKHEAD_MAX_FILES - 3) program = new_program(message, size);
  if (program == NULL || reference == NULL) {
    int saved = count > BULKHEAD_MAX_FILES - 3 ? EINVAL : errno;
    for (int i = 0; i < count; i++) close(files[i]);
    free(reference);
    errno = saved;
    return -1;
  }
  for (int i = 0; i < count; i++) {
    if (known) close(files[i]);
    else program->files[program->file_count++] = files[i];
  }
  if (!known) {
    program->next = programs;
    programs = program;
  }
  program->uses++;
  program->wanted++;
  reference->program = program;
  reference->next = client->programs;
  client->programs = reference;
  tell_zygote_state(client, program);
  wake_at(0);
  return 0;
}

static void drop_reference(struct reference **at) {
  struct reference *reference = *at;
  struct program *program = reference->program;
  *at = reference->next;
  free(reference);
  if (--program->wanted == 0) retire_zygotes(program);
  release_program(program);
}

void forget_program(struct client *client, const uint8_t *key) {
  for (struct reference **at = &client->programs; *at != NULL; at = &(*at)->next)
    if (memcmp((*at)->program->key, key, BULKHEAD_KEY_BYTES) == 0) {
      drop_reference(at);
      return;
    }
}

void forget_all_programs(struct client *client) {
  while (client->programs != NULL) drop_reference(&client->programs);
}

void release_program(struct program *program) {
  if (--program->uses > 0) return;
  struct program **at = &programs;
  while (*at != program) at = &(*at)->next;
  *at = program->next;
  free_program(program);
}
