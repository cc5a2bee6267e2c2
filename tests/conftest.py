"""What all tests share: threads, and a real browser."""

import gc
import os
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, settings

from helpers.waiting import DEADLOCK

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side, one on a core; read by torch when it is imported, and by the programs that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_finish():
    """Excludes the thousands of collected tests from garbage collection, which Lightning runs after each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def freeze_earlier_objects():
    """Excludes what earlier modules imported from garbage collections; Trainers run one after each training."""
    gc.collect()
    gc.freeze()


QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


def find_chromium():
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def install_chromium():
    """Debian's package, where this process may install it; what went wrong otherwise."""
    if shutil.which("apt-get") is None:
        return "no Chromium, and no apt-get to install it with"
    if os.geteuid() != 0:
        return "no Chromium, and only root may install it: apt-get install chromium"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": DEADLOCK, "check": False}
    subprocess.run(["apt-get", "update"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"], **quiet)
    return "no Chromium, and apt-get could not install it"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; closed with the module, since it keeps an event loop running in this thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    reason = None if find_chromium() else install_chromium()
    if (path := find_chromium()) is None:
        pytest.skip(reason or "no Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=list(QUIET), timeout=1000 * DEADLOCK)
        yield chromium
        chromium.close()


ACTION_SECONDS = 120
"""Seconds after which an action on a page fails, for example a click on a button that does not exist."""


@pytest.fixture
def open_page(browser):
    """Opens HTML files in new browser contexts; fails afterward on console messages, errors, dialogs and requests.

    ``data_urls`` allows the page to load images that it holds as data URLs.
    """
    contexts, problems = [], []

    def visit(path, *, width=1180, scheme="light", data_urls=False):
        address = path.as_uri()
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(1000 * ACTION_SECONDS)
        view = context.new_page()

        def check_request(request):
            allowed = request.url.split("#")[0] in (address, "data:,")
            if not (allowed or (data_urls and request.url.startswith("data:"))):
                problems.append(f"request: {request.url}")

        view.on("console", lambda message: problems.append(f"console: {message.text}"))
        view.on("pageerror", lambda error: problems.append(f"error: {error}"))
        view.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        view.on("request", check_request)
        view.goto(address)
        return view

    yield visit
    for context in contexts:
        context.close()
    assert problems == []
