"""The results page as HTML, and in a real browser where Chromium is installed."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from hcms_lab.cli import main
from made_runs import make_repository

pytestmark = pytest.mark.t0

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Reports, in the page's title, pictures that did not load and how far the page is wider than the window.
PROBE = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length;
  const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = `images ${document.images.length} broken ${broken} over ${over} width ${innerWidth}`;
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_repository(tmp_path_factory.mktemp("repository"))
    (root / "notebooks").mkdir()
    code = nbformat.v4.new_code_cell("x = '<wide>' * 200\nx")
    code.outputs = [
        nbformat.v4.new_output("stream", text="told " * 300),
        nbformat.v4.new_output(
            "display_data", {"image/png": base64.b64encode((root / "figures/fig3.png").read_bytes()).decode()}
        ),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A notebook"), code])
    nbformat.write(notebook, root / "notebooks" / "fig3.ipynb")
    assert main(["page", "--root", str(root)]) == 0
    return root / "site" / "index.html"


def test_everything_is_on_the_page(page: Path) -> None:
    html = BeautifulSoup(page.read_text(), "html.parser")
    assert html.html is not None
    assert html.html["lang"] == "en"
    text = html.get_text(" ")
    for expected in ("C8", "Figure 3", "Not run yet", "Cpu One", "Cpu Two", "side by side", "Table 2", "142.22 ms"):
        assert expected in text, expected
    ids = [str(tag["id"]) for tag in html.find_all(id=True)]
    assert len(ids) == len(set(ids))
    for link in html.find_all("a", href=True):
        target = str(link["href"])
        if target.startswith("#"):
            assert target[1:] in ids
        else:
            assert (page.parent / target).exists(), target


def test_pictures_are_inside_and_described(page: Path) -> None:
    images = BeautifulSoup(page.read_text(), "html.parser").find_all("img")
    assert len(images) == 3, "the figure, the comparison, the notebook's"
    for image in images:
        kind, _, data = str(image["src"]).partition("base64,")
        assert kind == "data:image/png;"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
        assert len(str(image["alt"])) > 15
    assert images[0]["alt"] == "A line that falls from 2 to 1."
    assert str(images[1]["alt"]).startswith("Speedup of HCMS over Ulysses in fig3")


def test_nothing_is_fetched(page: Path) -> None:
    html = page.read_text()
    assert not re.findall(r"""(?:src|srcset)=["']?https?:""", html)
    assert "<script" not in html
    assert "@import" not in html


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    probed = page.with_name("probed.html")
    # Opened, since what is folded away is to fit as well.
    probed.write_text(page.read_text().replace("<details", "<details open").replace("</body>", PROBE + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
    ]
    command += [f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--dump-dom", probed.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    match = re.search(r"<title>images (\d+) broken (\d+) over (-?\d+) width (\d+)</title>", shown)
    assert match, shown[:500]
    images, broken, over, actual = map(int, match.groups())
    assert (images, broken) == (3, 0)
    assert over <= 0, f"the page is {over} px wider than a window of {actual}"
    assert actual <= width
