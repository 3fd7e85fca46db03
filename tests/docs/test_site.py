"""The built site in headless Chromium: pages, search and the memory calculator.

`make docs` and this file are run by .ci/run. Skipped where no Chromium is on PATH.
"""

import functools
import http.server
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import natgalore_jax as natgalore
from benchmarks.memory import calculator
from natgalore_jax.planning import model_shapes


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs/_build/html"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
ARGS = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-sync"]
WIDTHS = {"desktop": (1300, 900), "phone": (390, 844)}
SETTINGS = 20


@pytest.fixture(scope="module")
def address():
    """The address of the site, built if it is not up to date and served on this machine."""
    if not CHROMIUM:
        pytest.skip("no Chromium")
    pytest.importorskip("playwright")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", "docs", str(SITE)]
    subprocess.run(command, cwd=ROOT, check=True)
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def browser(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser, address):
    """A page that fails the test on a console error, a failed request, or one to elsewhere."""
    width, height = WIDTHS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    faults = []
    page.on("console", lambda x: faults.append(x.text) if x.type == "error" else None)
    page.on("pageerror", lambda x: faults.append(str(x)))
    page.on("response", lambda x: faults.append(x.url) if x.status >= 400 else None)
    page.on(
        "request", lambda x: None if x.url.startswith((address, "data:")) else faults.append(x.url)
    )
    yield page
    page.close()
    assert faults == []


@pytest.mark.parametrize("name", ["index", "residual", "choosing", "api", "quickstart", "sharding"])
def test_pages_open(name, page, address):
    page.goto(f"{address}{name}.html")
    assert page.locator("h1").is_visible()
    # Wide tables and programs scroll inside the page, not with it.
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    sizes = page.evaluate("[...document.querySelectorAll('article img')].map(x => x.naturalWidth)")
    assert all(sizes)
    if name == "residual":
        assert page.locator("math").count() >= 2
        assert page.locator("math[display=block] mfrac").bounding_box()["height"] > 20


def test_search_finds_a_page_and_a_function(page, address):
    for words, target in (("transport", "transport.html"), ("explained_energy", "api.html")):
        page.goto(f"{address}search.html?q={words}")
        page.locator(f"#search-results a[href*='{target}']").first.wait_for()


def test_the_api_page_shows_every_public_name(page, address):
    page.goto(f"{address}api.html")
    for name in natgalore.__all__:
        assert page.locator(f"[id='natgalore_jax.{name}']").count() == 1, name


def test_the_calculator_shows_the_bytes_of_plan(browser, address):
    page = browser.new_page()
    page.goto(f"{address}memory-calculator.html")
    draw = random.Random(0)
    for _ in range(SETTINGS):
        size = draw.choice([*model_shapes.LLAMA])
        rank = model_shapes.LLAMA[size].hidden // draw.choice(calculator.FRACTIONS)
        dtype, bits = draw.choice(["bfloat16", "float32"]), draw.choice([8, 32])
        gradients = draw.choice(["cores", "full"])
        chosen = {"model": size, "rank": rank, "dtype": dtype, "bits": bits, "gradients": gradients}
        for name, value in chosen.items():
            page.select_option(f"select[name={name}]", str(value))
        row = page.locator(".calculator-row").last
        shown = row.locator("[data-bytes]").evaluate_all("x => x.map(x => +x.dataset.bytes)")
        planned = natgalore.plan(
            model_shapes.llama(size, dtype),
            rank=rank,
            bits=bits,
            low_rank_gradients=gradients == "cores",
        )
        assert shown == [planned.bytes[kind] for kind in ("weights", "gradients", "state")], chosen
        assert row.locator("strong").inner_text() == gigabytes(planned.total)
    # Each of eight devices holds an eighth of the divisible arrays, and the others whole.
    page.select_option("select[name=model]", "7b")
    page.select_option("select[name=devices]", "8")
    share = page.locator(".calculator-row").last.locator("[data-bytes]").first
    weights = natgalore.plan(model_shapes.llama("7b", dtype), rank=8).bytes["weights"]
    assert weights / 8 <= int(share.get_attribute("data-bytes")) < 1.001 * weights / 8
    page.close()


def gigabytes(n):
    return f"{n / 1e9:.{2 if n < 1e9 else 1}f} GB"
