"""The error of modules that come from elsewhere."""

from __future__ import annotations


class NotFetched(Exception):
    """A module cannot be had from where the configuration says. The text is for the operator."""
