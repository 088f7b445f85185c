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
        ("https://u:p@ss@host/x", "https://***@host/x"),
        ("https://u:pa/ss@host", "https://***@host"),
        ("https://u:p#s@host", "https://***@host"),
        ("mysql://u:p?x@h/db", "mysql://***@h/db"),
        ("https://h/?sig=b&n=1", "https://h/?sig=***&n=1"),
        ("https://h/?n=1&Signature=b", "https://h/?n=1&Signature=***"),
        ("https://h/?X-Amz-Signature=b", "https://h/?X-Amz-Signature=***"),
        ("https://h/?X-Amz-Credential=a/b", "https://h/?X-Amz-Credential=***"),
        ("https://h/?credential=b", "https://h/?credential=***"),
        # no secret
        ("https://h/?design=b", "https://h/?design=b"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://host:5000 of me@host", "http://host:5000 of me@host"),
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
