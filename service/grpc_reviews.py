"""bulkhead.v1.ReviewService: the same answers as over HTTPS."""

from __future__ import annotations

import time

from bulkhead.service.errors import BadReview
from bulkhead.service.grpc_faults import Context, unary
from bulkhead.service.review import Reviewer, Stage
from bulkhead.v1 import reviews_pb2, reviews_pb2_grpc

_STAGES = {
    reviews_pb2.ADMISSION_STAGE_MUTATING: Stage.MUTATING,
    reviews_pb2.ADMISSION_STAGE_VALIDATING: Stage.VALIDATING,
}


def deadline_of(context: Context) -> float | None:
    """The call's deadline on time.monotonic(); None if it has none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


class ReviewServicer(reviews_pb2_grpc.ReviewServiceServicer):
    """Hands bytes to the review layer and back."""

    def __init__(self, reviewer: Reviewer) -> None:
        self._reviewer = reviewer

    @unary
    async def Authenticate(
        self, request: reviews_pb2.AuthenticateRequest, context: Context
    ) -> reviews_pb2.AuthenticateResponse:
        review = await self._reviewer.authenticate(request.review, deadline=deadline_of(context))
        return reviews_pb2.AuthenticateResponse(review=review)

    @unary
    async def Authorize(
        self, request: reviews_pb2.AuthorizeRequest, context: Context
    ) -> reviews_pb2.AuthorizeResponse:
        review = await self._reviewer.authorize(request.review, deadline=deadline_of(context))
        return reviews_pb2.AuthorizeResponse(review=review)

    @unary
    async def Admit(self, request: reviews_pb2.AdmitRequest, context: Context) -> reviews_pb2.AdmitResponse:
        stage = _STAGES.get(request.stage)
        if stage is None:
            names = " or ".join(reviews_pb2.AdmissionStage.Name(number) for number in _STAGES)
            raise BadReview(f"stage: expected {names}")
        review = await self._reviewer.admit(
            request.review, stage=stage, module=request.module or None, deadline=deadline_of(context)
        )
        return reviews_pb2.AdmitResponse(review=review)
