"""A file of reviews, or of plain objects that become reviews; JSON or YAML, one document or several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import msgspec
from msgspec import Raw

from bulkhead.service import admission, authentication, authorization, strictjson
from bulkhead.service.admission import Stage
from bulkhead.service.admission_answer import ADMISSION_REVIEW
from bulkhead.service.authentication import TOKEN_REVIEW
from bulkhead.service.authorization import SUBJECT_ACCESS_REVIEW
from bulkhead.service.errors import BadReview
from bulkhead.service.objectyaml import read_object_yaml
from bulkhead.service.plainobject import BadObject, Request, identity, review_of
from bulkhead.service.strictjson import Mismatch, NotStrict
from bulkhead.service.yamlfile import BadYaml

STANDARD_INPUT = Path("-")
MAX_BYTES = 64 << 20  # as much as the largest server.maxBodyBytes

_REVIEW_TYPES = (TOKEN_REVIEW, SUBJECT_ACCESS_REVIEW, ADMISSION_REVIEW)
_READERS = {
    TOKEN_REVIEW.kind: authentication.read_question,
    SUBJECT_ACCESS_REVIEW.kind: authorization.read_question,
    ADMISSION_REVIEW.kind: admission.read_question,
}
_STAGES = {"mutate": Stage.MUTATING, "validate": Stage.VALIDATING}


class BadReviewFile(ValueError):
    """The file holds nothing that can be answered. The text says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedReview:
    """One review of a file."""

    where: str
    """The file, and which part of it."""
    kind: str
    body: bytes
    stage: Stage | None = None
    """The one at which it was recorded; None if the file does not say."""
    module: str | None = None
    """The only module that it was recorded for."""
    guess: str = ""
    """What was guessed of it, if it was a plain object."""


class _Header(msgspec.Struct, rename="camel"):
    api_version: str | None = None
    kind: str | None = None
    items: Raw = msgspec.field(default_factory=Raw)  # empty: not there
    path: Raw = msgspec.field(default_factory=Raw)
    body: Raw = msgspec.field(default_factory=Raw)


@dataclass(frozen=True, slots=True)
class _Document:
    where: str
    data: bytes


def read_reviews(path: Path, request: Request | None = None, old: Path | None = None) -> list[SavedReview]:
    """Reads every review of a file; `-` is standard input.

    `request` says more about the requests for plain objects (None: nothing is known), `old` is a file of
    the same objects as they were before an UPDATE. Raises BadReviewFile.
    """
    documents = list(_documents(path))
    if not documents:
        raise BadReviewFile(f"{_name(path)}: expected a review or a Kubernetes object, got nothing")
    reviews = [_saved(document) for document in documents]
    if request is not None and all(review is not None for review in reviews):
        raise BadReviewFile(f"{_name(path)}: holds no plain object, for which the options of a request are")
    known = _OldObjects(old, request or Request())
    found = [
        review or _made(document, request or Request(), known)
        for document, review in zip(documents, reviews, strict=True)
    ]
    for review in found:
        try:
            _READERS[review.kind](review.body)
        except BadReview as error:
            raise BadReviewFile(f"{review.where}: {error}") from None
    return found


# Documents


def _name(path: Path) -> str:
    return "standard input" if path == STANDARD_INPUT else str(path)


def _documents(path: Path) -> Iterator[_Document]:
    """The documents of a file as strict JSON, lists taken apart."""
    parts = _parse(path, _read(path))
    for number, data in enumerate(parts, 1):
        where = _name(path) if len(parts) == 1 else f"{_name(path)}, document {number}"
        try:
            strictjson.check(data)
        except NotStrict as error:
            raise BadReviewFile(f"{where}: {error}") from None
        yield from _items(_Document(where, data))


def _read(path: Path) -> bytes:
    try:
        if path == STANDARD_INPUT:
            data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadReviewFile(f"{_name(path)}: cannot read the file: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise BadReviewFile(f"{_name(path)}: the file has more than {MAX_BYTES} bytes")
    return data


def _parse(path: Path, data: bytes) -> list[bytes]:
    """JSON stays as it was written; YAML becomes JSON."""
    if data.lstrip().startswith(b"{"):
        try:
            strictjson.check(data)
            return [data]
        except NotStrict as error:
            if PurePath(path).suffix not in (".yaml", ".yml"):
                raise BadReviewFile(f"{_name(path)}: {error}") from None
    try:
        return read_object_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadReviewFile(f"{_name(path)}: expected UTF-8 text") from None
    except BadYaml as error:
        line = "" if error.line is None else f":{error.line}"
        raise BadReviewFile(f"{_name(path)}{line}: {error}") from None


def _items(document: _Document) -> Iterator[_Document]:
    """The members of a List; another document as it is."""
    header = _header(document)
    if not (header.kind or "").endswith("List") or not len(header.items):
        yield document
        return
    try:
        items = strictjson.read(header.items, list[Raw], "items")
    except Mismatch as error:
        raise BadReviewFile(f"{document.where}: {error}") from None
    for number, item in enumerate(items, 1):
        yield from _items(_Document(f"{document.where}, item {number}", bytes(item)))


def _header(document: _Document) -> _Header:
    try:
        return strictjson.read(document.data, _Header)
    except Mismatch as error:
        raise BadReviewFile(f"{document.where}: expected a review or a Kubernetes object: {error}") from None


# Reviews


def _saved(document: _Document) -> SavedReview | None:
    """The review that the document is, or holds together with the path that it was sent to."""
    header = _header(document)
    if header.kind is None and len(header.path) and len(header.body):
        review = _saved(_Document(document.where, bytes(header.body)))
        if review is None:
            raise BadReviewFile(f"{document.where}: body: expected a review")
        return _at_path(review, _path(document, header.path))
    group = (header.api_version or "").rpartition("/")[0]
    if all((header.kind, group) != (known.kind, known.group) for known in _REVIEW_TYPES):
        return None
    return SavedReview(where=document.where, kind=header.kind or "", body=document.data)


def _path(document: _Document, path: Raw) -> str:
    try:
        return strictjson.read(path, str, "path")
    except Mismatch as error:
        raise BadReviewFile(f"{document.where}: {error}") from None


def _at_path(review: SavedReview, path: str) -> SavedReview:
    """`/validate/NAME?timeout=10s` says the stage and the module."""
    base, _, module = path.partition("?")[0].strip("/").partition("/")
    if review.kind != ADMISSION_REVIEW.kind or base not in _STAGES:
        return review
    return replace(review, stage=_STAGES[base], module=module or None)


class _OldObjects:
    """The objects as they were before."""

    def __init__(self, path: Path | None, request: Request) -> None:
        """Raises BadReviewFile."""
        is_update = request.operation == "UPDATE"
        if is_update and path is None:
            raise BadReviewFile("--operation UPDATE: needs --old, a file with the object as it was before")
        if path is not None and not is_update:
            raise BadReviewFile("--old: is for --operation UPDATE")
        self._path = path
        self._objects = {}
        for document in () if path is None else _documents(path):
            try:
                self._objects[identity(document.data)] = document.data
            except BadObject as error:
                raise BadReviewFile(f"{document.where}: {error}") from None

    def of(self, document: bytes) -> bytes | None:
        """None: there is no need for one. Raises BadObject."""
        if self._path is None:
            return None
        version, kind, name = identity(document)
        if (version, kind, name) not in self._objects:
            raise BadObject(f"{_name(self._path)} has no {kind} {name!r} of {version}, as it was before")
        return self._objects[version, kind, name]


def _made(document: _Document, request: Request, old: _OldObjects) -> SavedReview:
    try:
        made = review_of(document.data, request, old.of(document.data))
    except BadObject as error:
        raise BadReviewFile(f"{document.where}: {error}") from None
    return SavedReview(where=document.where, kind=ADMISSION_REVIEW.kind, body=made.body, guess=made.guess)
