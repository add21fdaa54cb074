"""`bulkhead review`: saved reviews, answered from the shell, and why they are answered so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from bulkhead.sandbox import Sandbox, SandboxError
from bulkhead.service.admission import Stage, replace_object
from bulkhead.service.admission_answer import ADMISSION_REVIEW
from bulkhead.service.authentication import TOKEN_REVIEW
from bulkhead.service.cli import EXIT_FAILED, EXIT_USAGE
from bulkhead.service.config import Config, ConfigError
from bulkhead.service.configfiles import ConfigFiles
from bulkhead.service.configured import sandbox_options
from bulkhead.service.explaining import document, outcome, print_explanation, print_summary
from bulkhead.service.explanation import (
    Decision,
    Explanation,
    explain_access,
    explain_admission,
    explain_not_asked,
    explain_token,
)
from bulkhead.service.log import configure_logging
from bulkhead.service.plainobject import Request
from bulkhead.service.review import Reviewer
from bulkhead.service.reviewfile import BadReviewFile, SavedReview, read_reviews
from bulkhead.service.state import state_dir as find_state_dir

EXIT_DENIED, EXIT_NO_OPINION = 3, 4
EXIT_CODES = {
    Decision.FAILED: EXIT_FAILED,
    Decision.DENIED: EXIT_DENIED,
    Decision.NOT_AUTHENTICATED: EXIT_DENIED,
    Decision.NO_OPINION: EXIT_NO_OPINION,
    Decision.ALLOWED: 0,
    Decision.AUTHENTICATED: 0,
}
_WORST_FIRST = (EXIT_FAILED, EXIT_DENIED, EXIT_NO_OPINION, 0)

_STAGES = {
    "mutate": (Stage.MUTATING,),
    "validate": (Stage.VALIDATING,),
    "both": (Stage.MUTATING, Stage.VALIDATING),
}

_Explained = list[tuple[SavedReview, list[Explanation]]]


class WrongUsage(ValueError):
    """The command cannot be carried out as it was given. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which admission modules are asked; None: as the file says, or all."""

    stage: str | None
    module: str | None


def review(
    file: Path,
    files: ConfigFiles,
    stage: str | None,
    module: str | None,
    as_json: bool,
    only_reply: bool,
    old: Path | None,
    state_dir: Path | None,
    wasmtime: Path | None,
    **request: Any,
) -> int:
    """Answers every review of the file, and prints why; returns the exit code.

    `request` are the fields of a Request; what is None or empty was not given.
    """
    configure_logging("error")  # what modules do is told below
    try:
        if as_json and only_reply:
            raise WrongUsage("--json and --reply: choose one of them")
        loaded = files.load()
        given = {key: value for key, value in request.items() if value}
        reviews = read_reviews(file, Request(**given) if given or old else None, old)
        _require_size(reviews, loaded)
        explained = asyncio.run(
            _explain(
                loaded,
                find_state_dir(state_dir or loaded.server.state_dir),
                wasmtime,
                reviews,
                Choice(stage=stage, module=module),
            )
        )
    except ConfigError as error:
        click.echo(str(error), err=True)
        click.echo("bulkhead: the configuration cannot be served; see above", err=True)
        return EXIT_USAGE
    except (BadReviewFile, WrongUsage) as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_USAGE
    except SandboxError as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        click.echo("bulkhead: interrupted", err=True)
        return EXIT_FAILED
    exit_code = _exit_code(explained)
    if as_json:
        click.echo(document(explained, exit_code))
    elif only_reply:
        _print_replies(explained)
    else:
        _print_all(explained)
    return exit_code


def _require_size(reviews: Sequence[SavedReview], config: Config) -> None:
    most = config.server.max_body_bytes
    for each in reviews:
        if len(each.body) > most:
            raise WrongUsage(
                f"{each.where}: too large: at most {most} bytes (server.maxBodyBytes) would be read"
            )


async def _explain(
    config: Config, state_dir: Path, wasmtime: Path | None, reviews: Sequence[SavedReview], choice: Choice
) -> _Explained:
    # Each module is run once: a zygote would not be worth its start.
    options = replace(sandbox_options(config, state_dir, wasmtime), zygotes=False)
    async with await Sandbox.open(options) as sandbox:
        reviewer = await Reviewer.open(config, sandbox)
        stages = [_stages(reviewer, each, choice) for each in reviews]  # all mistakes before any run
        return [
            (each, await _explain_one(reviewer, each, chosen, choice.module or each.module))
            for each, chosen in zip(reviews, stages, strict=True)
        ]


def _stages(reviewer: Reviewer, review: SavedReview, choice: Choice) -> tuple[Stage, ...]:
    """The stages at which the modules are asked. Raises WrongUsage."""
    if review.kind != ADMISSION_REVIEW.kind:
        for option, value in (("--stage", choice.stage), ("--module", choice.module)):
            if value is not None:
                raise WrongUsage(f"{option}: is for AdmissionReviews; {review.where} is a {review.kind}")
        return ()
    recorded = None if review.stage is None else (review.stage,)
    stages = _STAGES[choice.stage] if choice.stage else recorded or _STAGES["both"]
    only = choice.module or review.module
    if only is None:
        return stages
    chosen = tuple(stage for stage in stages if only in reviewer.chains.admission.names(stage))
    if not chosen:
        known = [name for stage in stages for name in reviewer.chains.admission.names(stage)]
        kinds = " or ".join(stage.value for stage in stages)
        raise WrongUsage(
            f"no {kinds} module {only!r} is configured; expected one of {', '.join(known) or 'none'}"
        )
    return chosen


async def _explain_one(
    reviewer: Reviewer, review: SavedReview, stages: Sequence[Stage], only: str | None
) -> list[Explanation]:
    chains, sandbox = reviewer.chains, reviewer.sandbox
    if review.kind == ADMISSION_REVIEW.kind:
        return await _explain_admission(reviewer, review, stages, only)
    if review.kind == TOKEN_REVIEW.kind:
        token = await chains.authentication.decide(sandbox, review.body, deadline=None)
        return [explain_token(chains.authentication.modules, token)]
    access = await chains.authorization.decide(sandbox, review.body, deadline=None)
    return [explain_access(chains.authorization.modules, access)]


async def _explain_admission(
    reviewer: Reviewer, review: SavedReview, stages: Sequence[Stage], only: str | None
) -> list[Explanation]:
    """As a cluster does: the validating modules see the object as the mutating ones left it."""
    admission, body = reviewer.chains.admission, review.body
    explanations: list[Explanation] = []
    for stage in stages:
        if explanations and explanations[-1].decision is not Decision.ALLOWED:
            explanations.append(explain_not_asked(admission, stage))
            break
        decision = await admission.decide(reviewer.sandbox, body, stage=stage, only=only, deadline=None)
        explanations.append(explain_admission(admission, decision, stage, only))
        if decision.changes:
            body = replace_object(body, decision.final)
    return explanations


def _exit_code(explained: _Explained) -> int:
    """That of the worst review."""
    codes = {EXIT_CODES[outcome(explanations).decision] for _, explanations in explained}
    return next(code for code in _WORST_FIRST if code in codes)


def _print_all(explained: _Explained) -> None:
    for each, explanations in explained:
        print_explanation(each, explanations)
        if len(explained) > 1:
            click.echo()
    if len(explained) > 1:
        print_summary([outcome(explanations).decision for _, explanations in explained])


def _print_replies(explained: _Explained) -> None:
    """What kube-apiserver would get, one line for each time that it asks."""
    for each, explanations in explained:
        for explanation in explanations:
            if explanation.reply is not None:
                click.echo(explanation.reply.decode())
            elif explanation.fault is not None:
                status = explanation.fault.http_status.value
                click.echo(
                    f"bulkhead: {each.where}: no reply: HTTP {status}: {explanation.fault.message}", err=True
                )
