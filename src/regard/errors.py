"""The one error users meet: it names the argument, the value, and the way out."""


class RegardError(ValueError):
    """A wrong call, or a file that does not fit. The text says what was given and what to do instead."""


class RegardTypeError(RegardError, TypeError):
    """A wrong call whose fault is a type: an unknown keyword, an integer mask, a map of integers."""


def require(ok: bool, message: str, *values: object) -> None:
    """Raise `RegardError(message.format(*values))` unless `ok`.

    The values are formatted only on failure, so that a check costs nothing and traces under `torch.compile` with free sizes.
    """
    if not ok:
        raise RegardError(message.format(*values))


def require_type(ok: bool, message: str, *values: object) -> None:
    """As `require`, for a wrong kind of thing: raises `RegardTypeError`."""
    if not ok:
        raise RegardTypeError(message.format(*values))
