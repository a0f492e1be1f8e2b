"""The site, the run report and JupyterLab, as a reader sees them: in Chromium.

`make test-browser` runs every notebook in JupyterLab; without it, two are enough.
"""

import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from test_notebooks import NOTEBOOKS, ROOT, SMALL

from fl_helpers.report import Evidence, Results, write_report

pytest.importorskip("sphinx", reason="pip install -r requirements-dev.txt")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install -r requirements-dev.txt"
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
BROWSER = os.environ.get("BROWSER_PATH") or next(
    filter(None, map(shutil.which, NAMES)), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--disable-dev-shm-usage"]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
EVERY = os.environ.get("BROWSER_NOTEBOOKS") == "all"
IN_LAB = [path for path in NOTEBOOKS if EVERY or path.stem[:2] == "01"]
by_name = dict(ids=lambda path: path.stem)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not BROWSER,
        reason=f"no browser: looked for {', '.join(NAMES)}; set BROWSER_PATH",
    ),
]


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page; at its end, nothing was asked of another host, and nothing went wrong."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    page.problems, foreign = [], []

    def asked(request):
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss"):
            if parts.hostname not in ("127.0.0.1", "localhost"):
                foreign.append(request.url)

    page.on("request", asked)
    page.on("websocket", asked)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "console", lambda m: page.problems.append(m.text) if m.type == "error" else None
    )
    yield page
    page.close()
    assert not foreign


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(r"-m (sphinx .*) build/site", (ROOT / "Makefile").read_text())
    done = subprocess.run(
        [sys.executable, "-m", *recipe.group(1).split(), folder],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url(site):
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def images_without_content(page):
    """Sources of images that a reader would not see; they load when scrolled to."""
    images = page.locator("main img, article img").all()
    for image in images:
        image.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(i => i.complete)")
    assert images, "no image at all"
    return page.eval_on_selector_all(
        "img", "all => all.filter(i => i.naturalWidth == 0).map(i => i.src)"
    )


def test_home_shows_the_figure_and_leads_to_every_notebook(page, url):
    page.goto(url)
    assert "Federated learning for hospitals" in page.locator("h1").inner_text()
    assert images_without_content(page) == []
    links = page.eval_on_selector_all(".sidebar-tree a", "all => all.map(a => a.href)")
    for path in NOTEBOOKS:
        assert f"{url}/notebooks/{path.stem}.html" in links
    for path in (ROOT / "docs").glob("*.md"):
        assert f"{url}/docs/{path.stem}.html" in links
    assert page.problems == []


def test_a_notebook_page_shows_its_figures_and_formulas(page, url):
    page.goto(f"{url}/notebooks/03_fedavg_from_scratch.html")
    assert images_without_content(page) == []
    assert page.locator("article img").count() >= 2
    assert page.locator("math mfrac").count() >= 1
    box = page.locator("math mfrac").first.bounding_box()
    assert box["height"] > 10
    assert page.problems == []


def test_search_finds_scaffold(page, url):
    page.goto(url)
    page.locator("input[name=q]:visible").fill("SCAFFOLD")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function("!document.querySelector('#search-progress')?.innerText")
    found = page.locator("#search-results li").all_inner_texts()
    assert any("When hospitals differ" in text for text in found), found
    page.locator("#search-results li a", has_text="When hospitals differ").first.click()
    page.wait_for_url("**/04_when_hospitals_differ.html*")
    assert page.locator("article .highlighted").count() > 0
    assert page.problems == []


def test_every_page_fits_a_telephone(page, url, site):
    page.set_viewport_size({"width": 390, "height": 844})
    pages = [path for path in site.rglob("*.html") if "source" not in path.parts]
    assert len(pages) > 15
    for path in pages:
        page.goto(f"{url}/{path.relative_to(site).as_posix()}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{path.name} is {width} px wide"
    assert page.problems == []


class Links(HTMLParser):
    """Everything that a page points to or loads."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id", ""))
        for name in ("href", "src", "data"):
            if attrs.get(name):
                (self.links if tag == "a" else self.loads).append(attrs[name])


def test_no_link_of_the_site_is_broken_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Links(path.read_text("utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.loads:
            assert urlsplit(link).scheme in ("", "data"), f"{path.name} loads {link}"
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (
                (path.parent / unquote(parts.path)).resolve() if parts.path else path
            )
            assert target.exists(), f"{path.name} leads to {link}"
            if target in pages and parts.fragment:
                assert unquote(parts.fragment) in pages[target].anchors, (
                    f"{path.name} leads to {link}"
                )


def test_a_report_is_readable_and_runs_nothing(page, tmp_path):
    def record(index):
        scores = {name: {"auroc": 0.5 + 0.1 * index} for name in ("A", EVIL)}
        return {"round": index, "silos": [*scores], "train": {}, "test": scores}

    path = write_report(
        [record(0), record(1)], tmp_path / "r.html", title=EVIL,
        results=Results("auroc", [{"silo": EVIL, "train": 10}]),
        evidence=Evidence(files=[__file__]),
    )  # fmt: skip
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    page.goto(path.as_uri())
    assert page.locator("h1").inner_text() == EVIL
    assert page.locator("figure img").bounding_box()["width"] > 500
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 680, "height": 900})  # A4 without its margins
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    assert page.problems == []


def with_parameters(source, parameters):
    """The source of a parameters cell with other values."""
    for name, value in parameters.items():
        source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", source)
        assert count == 1, name
    return source


def copy_notebooks(folder):
    """A copy of the notebooks with small parameters and no outputs; returns it."""
    for name in ("docs", "data", "fl_helpers"):
        (folder / name).symlink_to(ROOT / name)
    copy = folder / "notebooks"
    copy.mkdir()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = with_parameters(cell.source, SMALL[path.stem])
        nbformat.write(notebook, copy / path.name)
    return copy


def lab_flags(folder):
    """What `make lab` gives to JupyterLab, with another folder."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    flags = shlex.split(re.search(r"/jupyter lab (.*) \$\(ARGS\)", text).group(1))
    assert flags[0] == "--notebook-dir=notebooks" and len(flags) > 1
    return [f"--notebook-dir={folder}", *flags[1:]]


def answers(port, token):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", f"/api/status?token={token}")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab as `make lab` starts it, with settings of its own: (url, folder)."""
    folder = tmp_path_factory.mktemp("lab")
    notebooks, token = copy_notebooks(folder), secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JUPYTER_TOKEN": token, "HOME": str(folder)}
    for name in (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
    ):
        environment[name] = str(folder / name.lower())
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(folder / "workspaces")
    command = [sys.executable, "-m", "jupyterlab", *lab_flags(notebooks)]
    command += ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        command += ["--allow-root"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 90
        while not answers(port, token):
            text = (folder / "log").read_text()
            assert server.poll() is None and time.monotonic() < end, text[-3000:]
            time.sleep(0.2)
        yield (
            f"http://127.0.0.1:{port}/lab/workspaces/{{}}/tree/{{}}?token={token}",
            notebooks,
        )
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


OVER = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
  const failed = document.querySelector('[data-mime-type$="jupyter.error"]');
  return failed || /[0-9]/.test(prompts.at(-1).innerText);
}"""


@pytest.mark.parametrize("path", IN_LAB, **by_name)
def test_a_notebook_runs_in_jupyterlab(page, lab, path):
    url, folder = lab
    page.goto(url.format(path.stem, path.name))
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    kernel = page.locator(".jp-NotebookPanel:visible .jp-Toolbar-kernelName")
    playwright.expect(kernel).to_have_text("Python 3 (ipykernel)")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(OVER, timeout=240_000)
    page.keyboard.press("Control+s")
    saved = wait_for_saved(folder / path.name)
    outputs = [o for c in saved.cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    check_figures(page)
    check_outline(page, saved)


def wait_for_saved(path):
    """The notebook once all its code cells in the file have been executed."""
    end = time.monotonic() + 30
    while True:
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        if all(cell.execution_count for cell in code):
            return notebook
        assert time.monotonic() < end, json.dumps([c.execution_count for c in code])
        time.sleep(0.2)


def check_figures(page):
    figure = page.locator(".jp-OutputArea-output img").first
    figure.scroll_into_view_if_needed()
    assert figure.evaluate("image => image.naturalWidth") > 0


def check_outline(page, notebook):
    """The table of contents has the headings of the notebook, in their order."""
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    headings = re.findall(r"(?m)^##? (.+)$", text)
    page.get_by_role("tab", name="Table of Contents").click()
    items = page.locator(".jp-tocItem-content")
    items.first.wait_for()
    shown = [item.strip() for item in items.all_inner_texts()]
    assert [item for item in shown if item in headings] == headings
