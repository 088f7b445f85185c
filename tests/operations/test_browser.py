"""What a person sees: MLflow's page of a run, the report, and Prefect's page, in a real browser.

``BLOCKQUANT_SCREENSHOTS=docs/screenshots`` keeps what was seen there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import skip_or_fail
from tests.models import DEMO_MODEL, make_text
from tests.operations.services import ROOT, Up

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600), pytest.mark.xdist_group("services")]

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LIMIT_S = 60
# over a recipe that ships: little text, of the test's own
OVERRIDES = (
    *("calib.name=text", "calib.path={text}", "calib.n_samples=8", "calib.seq_len=64"),
    *("eval.name=text", "eval.path={text}", "eval.windows=4", "eval.seq_len=64"),
    *("serving.smoke_test=false", "eval.sample_tokens=8"),
)
# what a page would fetch from elsewhere: nothing is, whatever the machine's network
ALONE = "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"


@dataclass(frozen=True)
class Ran:
    """One run, as the command line, MLflow and Prefect know it."""

    up: Up
    result: dict[str, Any]
    client: MlflowClient

    @property
    def id(self) -> str:
        """MLflow's id."""
        return str(self.result["mlflow"]["run"])

    @property
    def tracked(self) -> Any:
        """The run in MLflow."""
        return self.client.get_run(self.id)


@pytest.fixture(scope="module")
def ran(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A searched recipe on the demo model, through servers that ``make up`` starts."""
    if BROWSER is None or DRIVER is None:
        skip_or_fail("no Chromium here; make ops-packages installs Debian's")
    folder = tmp_path_factory.mktemp("seen")
    text = make_text(folder / "words.txt", words=3000)
    given = [word for each in OVERRIDES for word in ("--set", each.format(text=text))]
    named = ("awq_w4a16", "--model", DEMO_MODEL, "--output", folder / "demo-w4a16")
    done = up.run("quantize", *named, *given, "--json", module="flows.cli")
    assert done.returncode == 0, done.stderr
    return Ran(up, json.loads(done.stdout), MlflowClient(up.mlflow))


@pytest.fixture(scope="module")
def browser(ran: Ran, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-proxy-server",
        "--window-size=1280,1000",
        f"--host-resolver-rules={ALONE}",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    # the driver is on loopback
    kept = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    os.environ |= dict.fromkeys(kept, "127.0.0.1,localhost")
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def wait(browser: Chrome, look: Callable[[Chrome], Any], what: str) -> Any:
    return WebDriverWait(browser, LIMIT_S, 0.2).until(look, f"{what}; seen: {text(browser)[:2000]}")


def text(browser: Chrome) -> str:
    return str(browser.find_element(By.TAG_NAME, "body").text)


def says(browser: Chrome, *words: str) -> None:
    """Wait until a page says all of this."""
    for word in words:
        wait(browser, lambda b, w=word: w in text(b), f"the page does not say {word!r}")  # type: ignore[misc]


def widths(browser: Chrome) -> list[int]:
    """Widths of the images of a page as they lie in their files; 0 for one that is broken."""
    return browser.execute_script(
        "return [...document.images].map(i => i.complete ? i.naturalWidth : 0)"
    )


def keep(browser: Chrome, name: str) -> None:
    """Keep what is seen, where that is asked for."""
    if (folder := os.environ.get("BLOCKQUANT_SCREENSHOTS")) is not None:
        place = ROOT / folder
        place.mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(place / f"{name}.png"))


def test_the_page_of_the_run_in_mlflow(ran: Ran, browser: Chrome) -> None:
    tracked = ran.tracked
    page = f"{ran.up.mlflow}/#/experiments/{tracked.info.experiment_id}/runs/{ran.id}"
    browser.get(page)
    says(browser, "demo-model W4A16", "Finished", "eval.kl", "eval.nll")
    browser.get(f"{page}/artifacts/looks/errors.png")
    says(browser, "report.html", "looks", "errors.png")
    wait(browser, lambda b: any(w > 300 for w in widths(b)), "the heat map is not shown")
    keep(browser, "mlflow-errors")


def test_the_report(ran: Ran, browser: Chrome, tmp_path: Path) -> None:
    report = Path(ran.client.download_artifacts(ran.id, "report.html", str(tmp_path)))
    browser.set_window_size(1280, 1400)
    browser.get(report.as_uri())
    metrics = ran.result["metrics"]
    says(browser, "demo-model, W4A16", f"{metrics['kl']:.5f}", f"{metrics['nll']:.5f}")
    says(browser, "not served: serving.smoke_test is false", "scale-search.png", "method: Awq")
    drawn = [file.path for file in ran.client.list_artifacts(ran.id, "looks")]
    assert len(drawn) == 5
    found = widths(browser)
    assert len(found) == len(drawn) and min(found) > 300
    rows = browser.find_elements(By.CSS_SELECTOR, "#samples tr")
    assert len(rows) == 4
    assert all(cell.text for row in rows[1:] for cell in row.find_elements(By.TAG_NAME, "td"))
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert [name for name in asked if not name.startswith("data:")] == []
    keep(browser, "report")


def test_the_page_of_the_run_in_prefect(ran: Ran, browser: Chrome) -> None:
    flow_run = ran.tracked.data.tags["prefect.flow_run"]
    browser.set_window_size(1280, 1000)
    browser.get(f"{ran.up.prefect}/runs/flow-run/{flow_run}")
    says(browser, "Completed", "quantize with awq_w4a16")
    kept = ran.up.api(
        "POST", "artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [flow_run]}}}
    )
    found = {artifact["key"]: artifact for artifact in kept}
    assert {"blocks", "linear-errors", "model-card"} <= set(found)
    assert (found["blocks"]["data"], found["blocks"]["description"]) == (100.0, "3 of 3 blocks")
    keep(browser, "prefect-run")
    browser.get(f"{ran.up.prefect}/artifacts/artifact/{found['model-card']['id']}")
    says(browser, "KL to the source", f"{ran.result['metrics']['kl']:.5f}")
    browser.get(f"{ran.up.prefect}/artifacts/artifact/{found['linear-errors']['id']}")
    says(browser, "weight_error", "self_attn.q_proj")
