"""Reports in a real browser: they open from a disk, hover, sort, and ask nothing of the network.

``make test-browser`` runs these with pages made here; with ``PAGES=DIR`` also those of a finished
run. They fail where there is no browser.
"""

import io
import json
import os
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from remix_bids.reports.group import write_group
from tests.pages import figures_of, open_browser, write_subject

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1000, 1200), (390, 844)
LARGEST = 1_000_000  # bytes, of a figure
N_ROWS = 2000


@pytest.fixture(scope="module")
def browser():
    session = open_browser()
    yield session
    session.quit()


@pytest.fixture(scope="module")
def made_here(tmp_path_factory):
    """An output folder with an odd name: two scans of one person, and a cohort of others."""
    out = tmp_path_factory.mktemp("my out & 100%")
    write_subject(out, "01", ["sub-01_ses-a_T1w.nii.gz", "sub-01_ses-b_run-2_T1w.nii.gz"])
    rng = np.random.default_rng(0)
    for i in range(N_ROWS - 2):
        name = f"sub-x{i:04d}_T1w"
        row = figures_of(name, rng, str(1 + i % 7))
        row["consistency_chi2_median"] += 5 * (i == 17)
        path = out / name[:-4] / "anat" / f"{name[:-4]}_desc-remix_qc.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(row))
    write_group(out)
    return out


def pages(made_here):
    """All reports: those made here, and those of the run that the environment names."""
    found = [made_here / "sub-01.html"]
    real = os.environ.get("REMIX_BIDS_TEST_PAGES")
    if real:
        found += sorted(Path(real).resolve().glob("sub-*.html"))
        assert len(found) > 1, f"no report in {real}"
    return found


def visit(browser, path, size=DESKTOP):
    """Open a page, wait until all of its figures have come."""
    browser.set_window_size(*size)
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    deadline = time.monotonic() + 60
    script = (
        "return document.readyState === 'complete' && "
        "[...document.querySelectorAll('object')].every(o => o.contentDocument !== undefined)"
    )
    while not browser.execute_script(script):
        assert time.monotonic() < deadline, f"{path} does not come to rest"
        time.sleep(0.1)


def assert_quiet(browser, what):
    """Nothing was asked of any machine, and the console is empty."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            assert urlsplit(url).scheme in ("file", "data", "about"), f"{what} asks for {url}"
    assert browser.get_log("browser") == [], what


def hover(browser, element):
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(element).perform()


def pixels(element):
    """A screenshot of an element, grey levels."""
    image = Image.open(io.BytesIO(element.screenshot_as_png)).convert("L")
    return np.asarray(image, dtype=np.float32)


def apart(one, other):
    """Mean difference of two screenshots in grey levels; browsers never draw twice the same."""
    return np.abs(one - other).mean() if one.shape == other.shape else np.inf


def becomes(element, condition):
    """Whether a screenshot of an element comes to fulfil a condition."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if condition(pixels(element)):
            return True
        time.sleep(0.2)
    return False


def test_reports_are_quiet_and_hover(browser, made_here):
    for page in pages(made_here):
        visit(browser, page)
        figures = browser.find_elements("css selector", "object")
        shown = [f for f in figures if "enhancement" in f.get_attribute("data")]
        assert shown, page
        heading = browser.find_element("css selector", "h1")
        for figure in shown:
            browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
            hover(browser, browser.find_element("css selector", "nav a"))
            time.sleep(1)
            before = pixels(figure)
            hover(browser, figure)
            changed = becomes(figure, lambda now, then=before: apart(now, then) > 1)
            assert changed, f"{page}: pointing at the figure changes nothing"
            hover(browser, browser.find_element("css selector", "nav a"))
            back = becomes(figure, lambda now, then=before: apart(now, then) < 0.5)
            assert back, f"{page}: it does not come back"
        assert heading.text.startswith("remix-bids report")
        assert_quiet(browser, page)


def test_every_link_leads_somewhere(browser, made_here):
    for page in pages(made_here):
        visit(browser, page)
        links = {a.get_attribute("href") for a in browser.find_elements("css selector", "a[href]")}
        assert links
        for link in sorted(links):
            parts = urlsplit(link)
            assert parts.scheme == "file", link
            target = Path(unquote(parts.path))
            assert target.is_file(), link
            browser.get(link)
            if parts.fragment:
                script = "return document.getElementById(arguments[0]) !== null"
                assert browser.execute_script(script, unquote(parts.fragment)), link
            assert_quiet(browser, link)


def test_figures_are_small(made_here):
    for page in pages(made_here):
        figures = list((page.with_suffix("") / "figures").iterdir())
        assert figures
        for figure in figures:
            assert figure.stat().st_size < LARGEST, figure
        assert page.stat().st_size < LARGEST


def test_reports_fit_a_phone(browser, made_here):
    for page in [*pages(made_here), made_here / "group_T1w.html"]:
        visit(browser, page, PHONE)
        wide, room = browser.execute_script(
            "return [document.documentElement.scrollWidth, window.innerWidth]"
        )
        assert wide <= room, f"{page} is {wide} pixels wide on a screen of {room}"


def rows_in_view(browser):
    script = "return [...document.querySelectorAll('tbody a')].map(a => a.textContent)"
    return browser.execute_script(script)


def test_group_page(browser, made_here):
    page = made_here / "group_T1w.html"
    visit(browser, page)
    assert f"{N_ROWS} scan(s), 1 flagged" in browser.find_element("id", "about").text
    circles = browser.find_elements("css selector", "#plot a[href] circle")
    assert len(circles) == N_ROWS
    assert rows_in_view(browser)[0] == "sub-01_ses-a_T1w"
    assert len(rows_in_view(browser)) < 100  # the others exist only when scrolled to

    heading = "#table th[data-column='consistency_chi2_median']"
    script = (
        "const t = performance.now(); document.querySelector(arguments[0]).click();"
        "document.body.offsetHeight; return performance.now() - t"
    )
    took = [browser.execute_script(script, heading) for _ in range(2)]
    assert rows_in_view(browser)[0] == "sub-x0017_T1w"  # downwards, the outlier comes first
    script_of_plot = (
        "const t = performance.now(); const s = document.getElementById('metric');"
        "s.selectedIndex = (s.selectedIndex + 1) % s.length; s.onchange();"
        "document.body.offsetHeight; return performance.now() - t"
    )
    drawn = browser.execute_script(script_of_plot)
    loaded = browser.execute_script(
        "const n = performance.getEntriesByType('navigation')[0];"
        "return n.loadEventEnd - n.startTime"
    )
    print(f"{N_ROWS} rows: open {loaded:.0f} ms, sort {took} ms, draw {drawn:.0f} ms")

    table = browser.find_element("id", "table")
    browser.execute_script("arguments[0].scrollTop = 1e9", table)
    time.sleep(0.3)
    last = rows_in_view(browser)[-1]
    assert last != "sub-x0017_T1w"

    browser.find_element("id", "only").click()
    assert browser.find_element("id", "count").text == f"1 of {N_ROWS} shown"
    assert "sub-x0017_T1w" in rows_in_view(browser)
    browser.find_element("id", "only").click()
    browser.find_element("id", "find").send_keys("ses-b")
    assert rows_in_view(browser) == ["sub-01_ses-b_run-2_T1w"]
    link = browser.find_element("css selector", "tbody a")
    link.click()
    assert urlsplit(browser.current_url).fragment == "sub-01_ses-b_run-2_T1w"
    assert browser.find_element("id", "sub-01_ses-b_run-2_T1w")
    assert_quiet(browser, page)
