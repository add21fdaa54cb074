"""`bulkhead serve`: makes generations, and keeps the workers alive that serve them.

A small process: it loads neither grpc nor an HTTP server, has no threads while workers start, and
answers nothing itself. It holds the socket that all HTTPS workers accept from, so that connections wait,
rather than fail, while none of them is there. When it dies, the workers do.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import structlog

from bulkhead.sandbox import Runtime, SandboxError, SpawnerHost
from bulkhead.service.balance import Balance
from bulkhead.service.chains import Key
from bulkhead.service.config import Address, Config, ConfigError
from bulkhead.service.generation import (
    Generation,
    Generations,
    ServeOptions,
    files_of,
    needs_restart,
    uses_network,
)
from bulkhead.service.listener import listen
from bulkhead.service.watch import FileWatch
from bulkhead.service.worker import Role, WorkerSettings
from bulkhead.service.worker_process import WorkerFailed, WorkerProcess

_log = structlog.get_logger()

_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.05, 5.0
# A worker that lived so long has not died from its start: begin with the short pause again.
_STABLE_SECONDS = 30.0
# Beyond the configured grace time, for a worker to kill its runs and leave.
_STOP_SLACK_SECONDS = 3.0
_LOOK_SECONDS = 1.0
# Where it is not the files that are to blame: after the first pause, twice as long each time.
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 1.0, 60.0


class ServedModule(NamedTuple):
    """A module of the generation that is served."""

    section: str
    name: str
    digest: str
    """Empty for one that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is being served, for whoever wants to be told."""

    https_address: str
    grpc_address: str
    options: ServeOptions
    runtime: Runtime
    generation: Generation

    @property
    def ca_certificate(self) -> Path | None:
        """The authority that Bulkhead has made for itself; None where certificates are configured."""
        https = self.generation.config.server.https
        made = https.certificate is None and not https.plaintext
        return self.options.state_dir / "tls" / "ca.crt" if made else None

    @property
    def modules(self) -> tuple[ServedModule, ...]:
        return tuple(ServedModule(*key, pin.digest) for key, pin in self.generation.pins.items())


class Supervisor:
    """Owns the listening socket, the workers, and what they serve."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._generations = Generations(options)
        self._workers: list[WorkerProcess] = []
        self._spawner = SpawnerHost()
        self._balance = Balance.of(options.workers)
        self._listener: socket.socket | None = None
        self._serving: Serving | None = None
        self._switching = asyncio.Lock()
        """Held while a worker starts, and while workers go from one generation to the next."""
        self._watch = FileWatch()
        self._watched = frozenset(options.files.paths)
        self._tried: dict[Path, str] = {}
        """The content of the watched files when a generation was last made, or tried to be."""
        self._fetches = False
        """Whether the configuration that was read last names modules of other machines."""
        self._retry_at = math.inf
        self._retry_pause_seconds = _FIRST_RETRY_SECONDS
        self._reload_asked = asyncio.Event()

    async def start(self) -> Serving:
        """Makes the first generation, starts the workers, and waits until all answer.

        Raises SandboxError, ConfigError or WorkerFailed; each text is for people.
        """
        options = self._options
        self._listener = listen(options.https, "--https-address")
        config = await self._load()
        generation, runtime = await self._generations.make(
            config, 1, tolerate=lambda _: options.allow_broken_modules
        )
        for warning in runtime.warnings:
            _log.warning("wasmtime", warning=warning)
        https_port = self._listener.getsockname()[1]
        https = [self._worker("https", options.https.host, https_port, n) for n in range(options.workers)]
        self._workers = [*https, self._worker("grpc", options.grpc.host, options.grpc.port)]
        *_, grpc_port = await asyncio.gather(*(each.start(generation) for each in self._workers))
        self._serving = Serving(
            https_address=str(Address(options.https.host, https_port)),
            grpc_address=str(Address(options.grpc.host, grpc_port)),
            options=options,
            runtime=runtime,
            generation=generation,
        )
        self._plan_retry(wanted=bool(generation.broken) and self._fetches)
        return self._serving

    def _worker(self, role: Role, host: str, port: int, index: int = 0) -> WorkerProcess:
        options = self._options
        assert self._listener is not None
        accepts = role == "https"
        share = options.workers if accepts else 1
        settings = WorkerSettings(
            role=role,
            name=f"{role}-{index + 1}" if share > 1 else role,
            share=share,
            index=index,
            state_dir=str(options.state_dir),
            wasmtime=str(options.wasmtime) if options.wasmtime else None,
            log_level=options.log_level,
            log_format=options.log_format,
            supervisor_pid=os.getpid(),
            control_fd=-1,
            host=host,
            port=port,
            listener_fd=self._listener.fileno() if accepts else -1,
            balance_fd=self._balance.fd if accepts else -1,
        )
        return WorkerProcess(settings, self._spawner)

    @property
    def _generation(self) -> Generation:
        assert self._serving is not None
        return self._serving.generation

    # Running

    async def run(
        self, stop: asyncio.Event, stop_now: asyncio.Event, announce: Callable[[Serving], None]
    ) -> None:
        """Keeps the workers alive and up to date until `stop`; then lets them finish, or not, on `stop_now`.

        `announce` is told what is served each time that it has changed.
        """
        running = [asyncio.create_task(self._keep_alive(worker)) for worker in self._workers]
        running.append(asyncio.create_task(self._keep_up_to_date(announce)))
        await stop.wait()
        assert self._listener is not None
        self._listener.close()  # the workers close theirs: connections are refused, and do not wait in vain
        for worker in self._workers:
            worker.terminate()
        hurry = asyncio.create_task(_wait(stop_now))
        ends = asyncio.create_task(self._wait_ended())
        grace = self._generation.config.server.grace_seconds + _STOP_SLACK_SECONDS
        await asyncio.wait({hurry, ends}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for worker in self._workers:
            worker.kill()
        hurry.cancel()
        await ends
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _keep_alive(self, worker: WorkerProcess) -> None:
        """Replaces the process whenever it dies, until it is told to stop."""
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            started_at = time.monotonic()
            await worker.ended.wait()
            if worker.stopping:
                return
            if worker.settings.role == "https":
                self._balance.retire(worker.settings.index)  # the others need not leave connections to it
            _log.error("worker_died", worker=worker.settings.name, status=worker.status)
            if time.monotonic() - started_at > _STABLE_SECONDS:
                backoff = _FIRST_BACKOFF_SECONDS
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _LONGEST_BACKOFF_SECONDS)
            async with self._switching:
                if worker.stopping:
                    return
                try:
                    await worker.start(self._generation)
                    _log.warning("worker_restarted", worker=worker.settings.name)
                except WorkerFailed as error:
                    _log.error("worker_not_restarted", worker=worker.settings.name, error=str(error))

    async def _wait_ended(self) -> None:
        for worker in self._workers:
            await worker.wait_ended()

    async def close(self) -> None:
        """Ends whatever still runs."""
        for worker in self._workers:
            worker.kill()
        await self._wait_ended()
        await self._spawner.close()
        self._balance.close()
        if self._listener is not None:
            self._listener.close()

    # Reloading

    def ask_reload(self) -> None:
        """Reads everything anew, whether or not it looks changed."""
        self._reload_asked.set()

    async def _keep_up_to_date(self, announce: Callable[[Serving], None]) -> None:
        """Reloads when it is asked to, when the content of a file has changed, and when a retry is due."""
        seen: dict[Path, str] = {}
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reload_asked.wait(), _LOOK_SECONDS)
            before, seen = seen, await self._look()
            # A file that is just being written is left alone until it stays the same for a while.
            changed = seen != self._tried and seen == before
            if self._reload_asked.is_set() or changed:
                self._reload_asked.clear()
                self._retry_pause_seconds = _FIRST_RETRY_SECONDS
                await self._reload(announce)
            elif time.monotonic() >= self._retry_at:
                await self._reload(announce, again=True)

    def _plan_retry(self, *, wanted: bool) -> None:
        """Whether the same files may do better later: a server is back, a worker does not die this time."""
        if not wanted:
            self._retry_at = math.inf
            return
        self._retry_at = time.monotonic() + self._retry_pause_seconds
        self._retry_pause_seconds = min(2 * self._retry_pause_seconds, _LONGEST_RETRY_SECONDS)

    async def _reload(self, announce: Callable[[Serving], None], *, again: bool = False) -> None:
        """Goes to a new generation if all of it is good, else stays with the one there is.

        `again`: the same files as before, for which there was no luck.
        """
        current = self._generation
        try:
            new = await self._next_generation(current)
            if again and replace(new, number=current.number) == current:
                self._plan_retry(wanted=True)
                return
            await self._switch(new)
        except (ConfigError, SandboxError, WorkerFailed) as error:
            _log.error("reload_refused", generation=current.number, problems=str(error).splitlines())
            self._plan_retry(wanted=not isinstance(error, ConfigError) or self._fetches)
            await self._renew_certificates(announce)
            return
        except Exception:
            _log.exception("reload_failed", generation=current.number)
            return
        self._plan_retry(wanted=bool(new.broken) and self._fetches)
        _log.info("reloaded", generation=new.number, modules=len(new.pins))
        if fixed := needs_restart(current.config, new.config):
            _log.warning("restart_needed", keys=fixed, why="what they say now holds from the next start")
        self._tell(announce)

    async def _next_generation(self, current: Generation) -> Generation:
        """Raises ConfigError, SandboxError."""

        def tolerate(key: Key) -> bool:
            # What has been broken from the start need not be repaired first.
            return self._options.allow_broken_modules and key in current.broken

        config = await self._load()
        new, _ = await self._generations.make(config, current.number + 1, tolerate=tolerate)
        return new

    async def _renew_certificates(self, announce: Callable[[Serving], None]) -> None:
        """Certificates run out: they do not wait until the rest is repaired."""
        current = self._generation
        try:
            new = await self._generations.with_fresh_certificates(current)
            if new is None:
                return
            await self._switch(new)
        except (ConfigError, SandboxError, WorkerFailed) as error:
            _log.error("certificates_refused", generation=current.number, problems=str(error).splitlines())
            if not isinstance(error, ConfigError):
                self._plan_retry(wanted=True)
            return
        _log.info("certificates_reloaded", generation=new.number)
        self._tell(announce)

    async def _load(self) -> Config:
        """Reads the configuration, and remembers what all that it names contains. Raises ConfigError."""
        # Looked at before it is read: what changes in between will look changed.
        self._tried = await self._look()
        config = self._options.files.load(insecure=self._options.insecure)
        for note in config.notes:
            _log.info("configuration_note", note=str(note))
        watched = {*self._options.files.paths, *files_of(config)}
        if self._serving is not None:
            watched |= files_of(self._generation.config)
        self._watched = frozenset(watched)
        self._fetches = uses_network(config)
        before = self._tried
        self._tried = {path: before.get(path, now) for path, now in (await self._look()).items()}
        return config

    async def _look(self) -> dict[Path, str]:
        return await asyncio.to_thread(self._watch.look, self._watched)

    async def _switch(self, new: Generation) -> None:
        """Has all workers serve it, or none. Raises WorkerFailed."""
        assert self._serving is not None
        async with self._switching:
            alive = [worker for worker in self._workers if not worker.ended.is_set()]
            for error in await _all(worker.prepare(new) for worker in alive):
                raise error
            # From here on there is no way back; one that fails now is replaced by one that serves it.
            self._serving = replace(self._serving, generation=new)
            for error in await _all(worker.commit() for worker in alive):
                _log.error("worker_not_switched", error=str(error))

    def _tell(self, announce: Callable[[Serving], None]) -> None:
        assert self._serving is not None
        announce(self._serving)


async def _all(asked: Iterable[Coroutine[None, None, None]]) -> list[WorkerFailed]:
    """Waits for all of them, as each worker can be asked only one thing at a time; returns what failed."""
    errors = await asyncio.gather(*asked, return_exceptions=True)
    for error in errors:
        if error is not None and not isinstance(error, WorkerFailed):
            raise error
    return [error for error in errors if isinstance(error, WorkerFailed)]


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
