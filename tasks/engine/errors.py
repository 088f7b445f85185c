"""The errors a user meets, each one line: what is wrong, where, and how to mend it."""

import re

# of an address: the user and password before its host, and what a query calls a secret
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#\"'@]+@", re.I)
_QUERY = re.compile(r"([?&][^=&\s]*(?:password|token|secret|key)[^=&\s]*=)[^&\s\"']+", re.I)


class InputError(ValueError):
    """The input cannot be worked with; found before any work (exit status 2)."""


class RunError(RuntimeError):
    """The run cannot go on; found while working (exit status 1)."""


class NonFiniteWeightError(RunError):
    """A source tensor holds NaN or Inf."""


class VerificationError(RunError):
    """What was reopened from disk is not what was quantized."""


def masked(text: str) -> str:
    """Return a text whose addresses bear no passwords: those must not reach a log or a record."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))


def one_line(error: BaseException) -> str:
    """Say an error in one line; one that is not ours with the name of its class."""
    text = masked(" ".join(str(error).split())) or "no reason given"
    known = type(error).__module__.startswith(("tasks.", "configs.", "quantizers."))
    return text if known else f"{type(error).__name__}: {text}"
