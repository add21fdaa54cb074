"""What can keep a review from being answered. Everything else is an answer.

The front ends translate these, once, into HTTP and gRPC statuses. Their texts may go to the client.
"""

from __future__ import annotations


class BadReview(ValueError):
    """The body is not a review that we answer. Fault of the client; says what was expected."""


class Undecided(Exception):
    """Nobody could decide, through a fault of ours, and the review has no way to say so.

    The client should decide by its own failure policy, and cache nothing.
    """


class ModuleFailed(Exception):
    """A module failed whose `failurePolicy` is `Error`: the cluster's own policy shall decide."""
