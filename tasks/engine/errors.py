"""The errors a user meets, each one line: what is wrong, where, and how to mend it."""

import re

# of an address: all between // and the last @ before its path; a password may hold @, and / ? #
# where what stands behind the colon is no port
_USER = re.compile(
    r"(\b[a-z][a-z0-9+.-]*://)"
    r"(?:[^\s/?#\"']+@|[^\s/?#\"'@:]*:(?!\d*(?:[/?#]|$))[^\s\"']*@)",
    re.I,
)
# what a query calls a secret
_QUERY = re.compile(
    r"([?&;](?:[^=&\s]*(?:passw|pwd|token|secret|key|signature|credential)[^=&\s]*|sig)=)"
    r"[^&\s\"']+",
    re.I,
)


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
