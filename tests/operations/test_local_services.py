"""What `make up` starts: who may ask it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.operations.services import Up

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600), pytest.mark.xdist_group("services")]


def test_no_page_but_prefect_s_own_may_ask_its_api(up: Up) -> None:
    def allowed(origin: str) -> str | None:
        return preflight(up.prefect, origin).headers.get("access-control-allow-origin")

    port = httpx.URL(up.prefect).port
    for own in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        assert allowed(own) == own
    for other in ("http://example.org", "http://127.0.0.1:1", "null"):
        assert allowed(other) is None
    # what needs no preflight is not read as JSON
    plain = {"Origin": "http://example.org", "Content-Type": "text/plain"}
    answer = httpx.post(f"{up.prefect}/api/flows/", headers=plain, content='{"name": "other"}')
    assert answer.status_code == 422


def preflight(server: str, origin: str) -> httpx.Response:
    asked: dict[str, Any] = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return httpx.options(f"{server}/api/flow_runs/filter", headers=asked)
