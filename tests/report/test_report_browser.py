"""The page in a real browser: our script runs, nobody else's does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from report_runs import word, write_run

from m3po_jax.report import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
]


def chromium(profile: Path, page: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--no-first-run", "--enable-logging=stderr", "--hide-scrollbars",
        f"--user-data-dir={profile}", *args, page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(profile)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)


def console(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_hostile_run_in_a_browser(tmp_path):
    run = write_run(tmp_path / "run", hostile=True, arms=("</script><script>document.title='owned'<",), steps=20)
    result = chromium(tmp_path / "profile", build_report(run, word), "--dump-dom")
    assert console(result) == []
    title = re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL)
    assert title and title.group(1) != "owned" and "M3PO report" in title.group(1)
    assert result.stdout.count('data-status="pair"') == 40
    assert "64 of 64 shown" in result.stdout  # our script ran: it counts the items and shows the controls
    assert re.search(r'<div class="controls">', result.stdout)
    assert 'tabindex="0"' in result.stdout.split('id="curve-loss"')[1].split("</svg>")[0]
    assert result.stdout.count("<script") == 2


def test_the_policy_stops_and_the_console_shows_what_escaping_would_miss(tmp_path):
    page = build_report(write_run(tmp_path / "run", rounds=1, steps=5), word)
    source = page.read_text(encoding="utf-8")
    page.write_text(source.replace("<main", "<script>document.title='owned'</script><main"), encoding="utf-8")
    result = chromium(tmp_path / "profile", page, "--dump-dom")
    assert "<title>owned</title>" not in result.stdout
    assert any("Content Security Policy" in line for line in console(result))


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_screenshots_follow_the_theme(tmp_path, scheme):
    page = build_report(write_run(tmp_path / "run", rounds=1, steps=20), word)
    shot = tmp_path / "page.png"
    chromium(
        tmp_path / "profile", page, f"--screenshot={shot}", "--window-size=1100,900",
        f"--blink-settings=preferredColorScheme={scheme}",
    )  # fmt: skip
    with Image.open(shot) as image:
        assert image.size == (1100, 900)
        corner = image.convert("L").getpixel((5, 850))
    assert corner < 60 if scheme == 0 else corner > 200


@pytest.mark.parametrize("width", [1100, 360])
def test_nothing_overflows_sideways(tmp_path, width):
    page = build_report(write_run(tmp_path / "run", hostile=True, rounds=1, steps=20), word)
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe id=f src='{page.as_uri()}' style='width:{width}px;height:900px;border:0'></iframe><script>"
        "f.onload=()=>document.title=f.contentDocument.documentElement.scrollWidth"
        "</script>"
    )
    result = chromium(tmp_path / "profile", probe, "--dump-dom", "--allow-file-access-from-files")
    title = re.search(r"<title>(\d+)</title>", result.stdout)
    assert title and int(title.group(1)) <= width


def test_search_and_filters_hide_items(tmp_path):
    page = build_report(write_run(tmp_path / "run", rounds=2, steps=5), word)
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe id=f src='{page.as_uri()}'></iframe><script>f.onload=()=>{{"
        "const page=f.contentDocument, found=[];"
        "const set=(id,value)=>{const e=page.getElementById(id);e.value=value;"
        "e.dispatchEvent(new f.contentWindow.Event('input'));"
        "const shown=[...page.querySelectorAll('.item')].filter(i=>!i.hidden);"
        "found.push(shown.length,new Set(shown.map(i=>i.dataset.status+i.dataset.round)).size)};"
        "set('search','SCENE-0002 picture');set('search','no such words');set('search','');"
        "set('status','pair');set('round','2');"
        "page.getElementById('toggle').click();found.push(page.querySelectorAll('.item[open]').length);"
        "document.title=found.join(' ')}</script>"
    )
    result = chromium(tmp_path / "profile", probe, "--dump-dom", "--allow-file-access-from-files")
    title = re.search(r"<title>([\d ]+)</title>", result.stdout)
    # A pair of that id in both rounds; then nothing, everything, all pairs, those of one round.
    assert title and title.group(1) == "2 2 0 0 64 6 40 2 20 1 20"
