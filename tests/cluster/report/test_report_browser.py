"""The report in a real browser: its own script runs, a caption's does not, and a phone need not scroll sideways."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.report.make import ReportRequest, make_report
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
#: What would show that something of it ran, or loaded.
CAPTIONS = (
    "<script>document.title = 'broken in'</script> a dog",
    "<img src=x onerror=\"document.title = 'broken in'\"> a cat",
    "A dog and a cat on a table.",
)
#: Asked of the page once it stands, in a frame as wide as a phone.
FRAME = """<!doctype html><iframe src="report.html" width="390" height="800"></iframe><script>
addEventListener("load", () => setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  document.title = JSON.stringify([page.title, root.scrollWidth <= root.clientWidth,
    page.querySelectorAll("dialog").length, page.querySelectorAll(".filter button").length]).replaceAll('"', "'");
}, 300));</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_the_page_stands_in_a_browser(tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path, CAPTIONS), null_spec())
    make_report(ReportRequest(out=str(tmp_path / "report.html"), data=str(tmp_path / "data")))
    (tmp_path / "frame.html").write_text(FRAME)
    done = subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    said = re.search(r"<title>(.*?)</title>", done.stdout)
    assert said, done.stderr[-2000:]
    assert said[1] == "['From captions to pictures',true,1,4]"
