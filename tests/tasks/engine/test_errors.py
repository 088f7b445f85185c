"""What is masked in texts that are kept."""

from __future__ import annotations

import pytest

from tasks.engine.errors import InputError, masked, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:5000/api", "http://host:5000/api"),
        ("see http://me:pass@host:5000/x now", "see http://***@host:5000/x now"),
        ("http://token@host", "http://***@host"),
        ("http://me:p%40ss@host and http://you:w@other", "http://***@host and http://***@other"),
        ("'postgresql+psycopg2://me:pass@host/db'", "'postgresql+psycopg2://***@host/db'"),
        ("https://h/x?user=a&access_token=b&n=1", "https://h/x?user=a&access_token=***&n=1"),
        ("https://h/x?password=b", "https://h/x?password=***"),
        # an address in a path or a mail is none with a password
        ("http://host/a@b", "http://host/a@b"),
        ("write to me@host", "write to me@host"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_passwords_of_addresses_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_errors_are_said_masked() -> None:
    assert (
        one_line(InputError("no server at http://me:pass@host")) == "no server at http://***@host"
    )
    assert one_line(OSError("http://me:pass@host\n away")) == "OSError: http://***@host away"
