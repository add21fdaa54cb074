"""Explanations, written for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from bulkhead.service.explanation import Decision, Explanation, ModuleExplanation
from bulkhead.service.reviewfile import SavedReview
from bulkhead.service.words import clean

if TYPE_CHECKING:
    from rich.console import Console

_MOST_LINES = 40  # of what one module wrote
_MOST_LINE_CHARACTERS = 4096
_TITLES = {
    Decision.ALLOWED: "ALLOWED",
    Decision.DENIED: "DENIED",
    Decision.AUTHENTICATED: "AUTHENTICATED as",
    Decision.NOT_AUTHENTICATED: "NOT AUTHENTICATED",
    Decision.NO_OPINION: "NO OPINION",
    Decision.FAILED: "FAILED",
}
_STYLES = {
    Decision.ALLOWED: "bold green",
    Decision.AUTHENTICATED: "bold green",
    Decision.NO_OPINION: "bold yellow",
    Decision.DENIED: "bold red",
    Decision.NOT_AUTHENTICATED: "bold red",
    Decision.FAILED: "bold magenta",
}
_DIFF_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def outcome(explanations: Sequence[Explanation]) -> Explanation:
    """The decision that counts: that of the last stage that was reached."""
    return [each for each in explanations if each.decision is not Decision.NOT_ASKED][-1]


# For people


def print_explanation(review: SavedReview, explanations: Sequence[Explanation]) -> None:
    """Prints how a review was answered: the decision first. Colours only on a terminal."""
    from rich.console import Console

    printer = _Printer(Console(highlight=False, soft_wrap=True, markup=False, emoji=False))
    printer.decision(outcome(explanations))
    printer.line(f"  {review.where}: {review.kind}, {explanations[0].asked_about}")
    if review.guess:
        printer.line(f"  made of a plain object; guessed: {review.guess}", "dim")
    for explanation in explanations:
        printer.stage(explanation)


def print_summary(decisions: Sequence[Decision]) -> None:
    """Prints how many reviews were decided in which way."""
    counts = ", ".join(
        f"{count} {each.value.replace('_', ' ')}" for each, count in Counter(decisions).items()
    )
    click.echo(f"{len(decisions)} reviews: {counts}")


class _Printer:
    """Writes lines. Whatever modules chose is one line without control characters."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def line(self, text: str = "", style: str | None = None) -> None:
        self._console.print(clean(text, _MOST_LINE_CHARACTERS), style=style)

    def decision(self, explanation: Explanation) -> None:
        title = _TITLES[explanation.decision]
        # "DENIED 403: …", "AUTHENTICATED as ann", but "FAILED: …".
        joint = " " if explanation.decision in (Decision.DENIED, Decision.AUTHENTICATED) else ": "
        message = f"{joint}{explanation.message}" if explanation.message else ""
        self.line(f"{title}{message}", _STYLES[explanation.decision])

    def stage(self, explanation: Explanation) -> None:
        self.line()
        self.line(f"{explanation.stage.value} modules" if explanation.stage else "modules", "bold")
        self._modules(explanation.modules)
        if explanation.fault is not None:
            self.line(f"  no reply: HTTP {explanation.fault.http_status.value}", "magenta")
        self._list("warnings", explanation.warnings)
        self._list("audit annotations", [f"{key}: {value}" for key, value in explanation.annotations.items()])
        if explanation.diff:
            self.line()
            for line in explanation.diff:
                self.line(line, _DIFF_STYLES.get(line[:1]))

    def _modules(self, modules: Sequence[ModuleExplanation]) -> None:
        if not modules:
            self.line("  none is configured", "dim")
            return
        width = max(6, *(len(module.name) for module in modules))
        self.line(f"  {'NAME':<{width}}  {'WALL':>9}  {'CPU':>9}  {'MEMORY':>8}  SAID", "dim")
        for module in modules:
            wall, cpu, memory = _numbers(module)
            style = "dim" if not module.asked else "magenta" if module.failure is not None else None
            self.line(f"  {module.name:<{width}}  {wall:>9}  {cpu:>9}  {memory:>8}  {module.said}", style)
            for key, text in module.words.items():
                self._words(key, text)

    def _words(self, key: str, text: str) -> None:
        lines = text.rstrip().splitlines() or [""]
        if len(lines) == 1:
            self.line(f"      {key}: {lines[0]}")
            return
        self.line(f"      {key}:")
        for line in lines[:_MOST_LINES]:
            self.line(f"        {line}")
        if len(lines) > _MOST_LINES:
            self.line(f"        … and {len(lines) - _MOST_LINES} more lines; --json has all", "dim")

    def _list(self, title: str, lines: Iterable[str]) -> None:
        lines = list(lines)
        if lines:
            self.line()
            self.line(title, "bold")
        for line in lines:
            self.line(f"  {line}")


def _numbers(module: ModuleExplanation) -> tuple[str, str, str]:
    if not module.asked:
        return "-", "-", "-"
    wall = f"{module.wall_seconds * 1e3:.1f}ms"
    if module.usage is None:
        return wall, "-", "-"
    return wall, f"{module.usage.cpu_seconds * 1e3:.1f}ms", f"{module.usage.peak_memory_bytes / 2**20:.1f}Mi"


# For programs


def document(explained: Sequence[tuple[SavedReview, Sequence[Explanation]]], exit_code: int) -> str:
    """One JSON document of every review."""
    reviews = [_review(review, explanations) for review, explanations in explained]
    return json.dumps({"exitCode": exit_code, "reviews": reviews}, indent=2, ensure_ascii=False)


def _review(review: SavedReview, explanations: Sequence[Explanation]) -> dict[str, Any]:
    decided = outcome(explanations)
    return {
        "source": review.where,
        "kind": review.kind,
        "guessed": review.guess or None,
        "decision": decided.decision.value,
        "message": decided.message,
        "stages": [_stage(each) for each in explanations],
    }


def _stage(explanation: Explanation) -> dict[str, Any]:
    fault = explanation.fault
    return {
        "stage": explanation.stage.value if explanation.stage else None,
        "decision": explanation.decision.value,
        "message": explanation.message,
        "askedAbout": explanation.asked_about,
        "modules": [_module(each) for each in explanation.modules],
        "warnings": list(explanation.warnings),
        "auditAnnotations": dict(explanation.annotations),
        "patch": json.loads(explanation.patch) if explanation.patch else None,
        "diff": "\n".join(explanation.diff),
        "reply": None if explanation.reply is None else json.loads(explanation.reply),
        "fault": None
        if fault is None
        else {"httpStatus": fault.http_status.value, "reason": fault.reason, "message": fault.message},
    }


def _module(module: ModuleExplanation) -> dict[str, Any]:
    usage = module.usage
    return {
        "name": module.name,
        "asked": module.asked,
        "said": module.said,
        "failure": module.failure,
        "wallSeconds": round(module.wall_seconds, 6) if module.asked else None,
        "cpuSeconds": None if usage is None else round(usage.cpu_seconds, 6),
        "peakMemoryBytes": None if usage is None else usage.peak_memory_bytes,
        **{key: module.words.get(key) for key in ("details", "diagnostics", "stderr")},
    }
