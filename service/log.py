"""Logs: one event a line on standard error, as text for people or JSON for programs."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal, TextIO

import structlog

Format = Literal["text", "json"]
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LEVELS = tuple(_LEVELS)


def configure_logging(level: str, format: Format | None = None, stream: TextIO = sys.stderr) -> None:
    """Sets up structlog for this process. `format` None: text on a terminal, JSON elsewhere."""
    chosen = format or ("text" if stream.isatty() else "json")
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if chosen == "json"
        else structlog.dev.ConsoleRenderer(colors=stream.isatty(), repr_native_str=True)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # JSON escapes control characters; the console's renderer shows strings by repr.
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    # Libraries that use the standard library's logging (grpc, aiohttp, asyncio).
    logging.basicConfig(
        stream=stream,
        level=max(_LEVELS[level], logging.WARNING),
        format="%(levelname)s %(name)s: %(message)s",
    )
