"""Every error that ritocco raises on purpose.

* RitoccoError
  + RequestError        (your input: a field, an option, an image, a URL)   CLI exit 2, HTTP 422
    - InputError        (the twelve fields and our options; lists every violation; in schema.py)
    - FetchError        (a URL that could not or may not be fetched)
  + CheckpointError     (a model folder or file: missing, damaged, not an inpainting model, not trusted)
  + BackendError        (a device, dtype or backend that this machine does not have)
    - DeviceLostError   (the device stopped computing; only another process gets it back)
  + NonFiniteError      (the network produced NaN or infinity; names the step)
  + BusyError           (a batcher has as many requests waiting as it takes)   HTTP 429
  + TimeLimitError      (a batcher's time limit for a request is over)
"""

from __future__ import annotations


class RitoccoError(Exception):
    """Base of every error that ritocco raises on purpose."""


class RequestError(RitoccoError, ValueError):
    """The request breaks a rule; nothing was computed.

    field: dotted name of the field at fault, as in `input.width`; empty where no single field is.
    The message names the field, the value and the rule.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class FetchError(RequestError):
    """A URL in the request could not, or may not, be fetched."""


class CheckpointError(RitoccoError, ValueError):
    """A model folder or file is missing, damaged, of the wrong kind, or of a format that can't be trusted."""


class BackendError(RitoccoError, RuntimeError):
    """This machine or installation can't run what was asked for; the message says what would."""


class DeviceLostError(BackendError):
    """The device stopped computing in the middle of something, and gives nothing to this process any more."""


class NonFiniteError(RitoccoError, ArithmeticError):
    """A network produced NaN or infinity.

    step: index of the first table row (0-based) whose result was not finite; -1 where a network before or
        after the loop gave it, and then the message names that one.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class BusyError(RitoccoError, RuntimeError):
    """A batcher has as many requests waiting as it takes; nothing was looked at.

    retry_after: seconds after which a place is likely to be free, over 0.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TimeLimitError(RitoccoError, RuntimeError):
    """A request was not done within the batcher's time limit."""
