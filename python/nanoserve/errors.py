"""One exception per meaning. Messages name the field, the value and the limit."""

from __future__ import annotations


class RequestRefused(ValueError):
    """A request that can never be served: refused at the door, nothing was taken."""


class IllegalTransition(RuntimeError):
    """A request was moved between states that are not connected."""


class InvariantViolation(AssertionError):
    """Pages, tables and tree no longer agree: a bug in the engine, never a user's mistake."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or not what their config says."""
