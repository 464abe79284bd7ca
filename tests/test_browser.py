"""The page in a browser: it shows, it switches, it explains, and nothing in it runs that a document brought along."""

import importlib.util
import os
import shutil

import pytest
from pages import FEW, HOSTILE, hostile, with_tokens
from synthetic import make

from loopdiag.report import page

CHROMIUM, CHROMEDRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
NEEDED = {"chromium": CHROMIUM, "chromedriver": CHROMEDRIVER, "selenium": importlib.util.find_spec("selenium")}
if missing := [name for name, found in NEEDED.items() if not found]:
    if os.environ.get("LOOPDIAG_REQUIRE_BROWSER"):
        raise RuntimeError(f"LOOPDIAG_REQUIRE_BROWSER is set, and there is no {' and no '.join(missing)} here.")
    pytest.skip(f"pages are not seen in a browser: no {' and no '.join(missing)} here", allow_module_level=True)
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,1100"),
)
NARROW, WIDE = 360, 1200  # CSS pixels
READABLE = 7.0  # WCAG's enhanced contrast of text
# NLLs at loop 2 that a third digit would put on the other side of a tenth of a nat from 6, and what is told of them.
CLOSE = {5.904: "(−0.10 nats, helped)", 6.0949: "(+0.09 nats, unchanged)", 6.0951: "(+0.10 nats, harmed)"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser without a window, a profile or a network of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of one model, one of two, and one whose every text is hostile."""
    folder = tmp_path_factory.mktemp("pages")
    longer = [["for ", "name ", "in ", "names", ":\n", "    "] * 20, ["x", " = ", "1", "\n", "y", " = "] * 5]
    one = with_tokens(make(4, groups=FEW), longer, ["names.py", "a/" * 40 + "long.py"], top=" self")
    one.data["token_nll"][1, 2, 3:6] = list(CLOSE)
    other = with_tokens(make(6, trained=4, groups=FEW, model="another", seed=1))
    texts = {"one": page([one]), "two": page([one, other]), "hostile": page([hostile()])}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def show(browser, pages):
    """Opens a page at a width, in light or dark, on a screen or in print."""

    def opened(name, width=WIDE, scheme="light", media="screen"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == NARROW}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        browser.get((pages / f"{name}.html").as_uri())
        return browser

    return opened


def style(browser, element, name):
    return browser.execute_script("return getComputedStyle(arguments[0])[arguments[1]]", element, name)


def luminance(colour):
    """Relative luminance, as WCAG has it, of rgb(...) or rgba(...)."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def point(browser, element):
    """Move the pointer to an element, which is brought into sight first."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser).move_to_element(element).perform()


def tokens_of(browser, document=0):
    return browser.find_elements(By.CSS_SELECTOR, f".d{document} .text > span")


def choose(browser, kind, value):
    """Click a switch as a person does: on its label."""
    browser.find_element(By.CSS_SELECTOR, f".switch label:has(input.{kind}{value})").click()


def test_the_contrast_is_that_of_wcag():
    """Its own examples: black on white is 21, a colour on itself 1, #767676 on white just passes 4.5."""
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(9, 9, 9)", "rgba(9, 9, 9, 1)") == 1
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("name", ["one", "two", "hostile"])
def test_nothing_is_complained_of(show, name):
    """No error, no warning, no blocked request: also of a page of hostile texts."""
    assert show(name).get_log("browser") == []


def test_every_figure_shows(show):
    """With a size, and something drawn in it."""
    browser = show("two")
    figures = browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    assert len(figures) > 4
    for figure in figures:
        assert figure.is_displayed()
        assert min(figure.size.values()) > 100
        assert browser.execute_script("return arguments[0].getBBox().width", figure) > 100


def test_the_loop_switch_changes_what_is_marked(show):
    """Planted: loop 2 harmed token 4, loop 3 helped it, loop 4 left it; colour and line both say so."""
    browser = show("one")
    token = tokens_of(browser)[4]
    looks = {}
    for loop in (2, 3, 4):
        choose(browser, "loop", loop)
        looks[loop] = tuple(style(browser, token, name) for name in ("backgroundColor", "borderBottomStyle"))
        (share,) = [each for each in browser.find_elements(By.CSS_SELECTOR, ".d0 .share") if each.is_displayed()]
        assert share.text.startswith(f"Loop {loop} helps")
    assert len(set(looks.values())) == 3
    assert [looks[loop][1] for loop in (2, 3, 4)] == ["dashed", "double", "none"]
    assert looks[4][0] == "rgba(0, 0, 0, 0)"


def test_the_document_switch_shows_one_document(show):
    browser = show("one")
    assert [each.is_displayed() for each in browser.find_elements(By.CSS_SELECTOR, ".document")] == [True, False]
    choose(browser, "doc", 1)
    assert [each.is_displayed() for each in browser.find_elements(By.CSS_SELECTOR, ".document")] == [False, True]


def test_a_token_tells_its_numbers(show):
    """On hover, on tap and by the arrow keys; and again when the loop changes. Planted: 6 nats and 2 more."""
    browser = show("one")
    inspector = browser.find_element(By.CSS_SELECTOR, ".inspector")
    assert not inspector.is_displayed()
    tokens = tokens_of(browser)
    point(browser, tokens[4])
    assert ":⏎ loop 2: NLL 6.00 → 8.00 (+2.00 nats, harmed)" in inspector.text
    assert "likeliest there:  self →  self" in inspector.text
    choose(browser, "loop", 3)
    assert "loop 3: NLL 8.00 → 6.00 (−2.00 nats, helped)" in inspector.text
    tokens[2].click()
    assert "in  loop 3: NLL 5.50 → 6.00 (+0.50 nats, harmed)" in inspector.text
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert "name  loop 3: NLL 1.00 → 6.00 (+5.00 nats, harmed)" in inspector.text
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert "The first token is given." in inspector.text
    choose(browser, "doc", 1)
    assert not inspector.is_displayed()


def test_the_word_is_that_of_the_colour(show):
    """Also of changes near the least that is told, where one more digit would say otherwise."""
    browser = show("one")
    choose(browser, "doc", 1)
    tokens = tokens_of(browser, 1)
    inspector = browser.find_element(By.CSS_SELECTOR, ".inspector")
    for token, said, line in zip(tokens[3:6], CLOSE.values(), ("solid", "none", "dotted"), strict=True):
        point(browser, token)
        assert said in inspector.text
        assert style(browser, token, "borderBottomStyle") == line


@pytest.mark.parametrize("width", [NARROW, 768, 1440])
def test_figures_use_the_width(show, width):
    """A figure of several panels spans the page, and no table stands beside a figure where it would be cut."""
    browser = show("one", width)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    room = browser.find_element(By.CSS_SELECTOR, ".lens").size["width"]
    for figure in browser.find_elements(By.CSS_SELECTOR, ".plot.wide"):
        assert figure.size["width"] == pytest.approx(room, abs=1)
    for table in browser.find_elements(By.CSS_SELECTOR, ".plots > * > .scroll:has(.numbers)"):
        cut = browser.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", table)
        assert cut <= 1 or table.size["width"] == pytest.approx(room, abs=1)


def test_definitions_are_reached_by_pointer_and_by_keys(show):
    """Hidden at first, shown on hover and on focus (so by tapping), inside the window; Escape hides them."""
    browser = show("one", NARROW)
    term = browser.find_element(By.CSS_SELECTOR, "#gain-cost .term")
    tip = term.find_element(By.CSS_SELECTOR, ".tip")
    assert not tip.is_displayed()
    term.click()
    assert browser.switch_to.active_element == term
    assert tip.is_displayed()
    assert tip.text.startswith("gain (nats per token; of N(Y)): NLL that loop r takes off the tokens it helps")
    box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", tip)
    assert 0 <= box["left"] < box["right"] <= NARROW
    point(browser, browser.find_element(By.CSS_SELECTOR, "#gain-cost h2"))
    assert tip.is_displayed()  # it has the focus
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()
    point(browser, term)
    assert tip.is_displayed()


@pytest.mark.parametrize("name", ["one", "two", "hostile"])
def test_no_page_scrolls_sideways_on_a_phone(show, name):
    """Also with everything opened; wide tables and figures scroll within themselves."""
    browser = show(name, NARROW)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    for loop in (1, 2):
        choose(browser, "loop", loop)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= NARROW
    assert browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].some((each) => each.scrollWidth > each.clientWidth)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(show, scheme):
    """Against the ground it stands on, and marked tokens against their marks."""
    browser = show("one", scheme=scheme)
    body = browser.find_element(By.TAG_NAME, "body")
    ground, ink = (style(browser, body, name) for name in ("backgroundColor", "color"))
    assert (luminance(ground) > luminance(ink)) == (scheme == "light")
    assert contrast(ground, ink) > READABLE
    card = browser.find_element(By.CSS_SELECTOR, ".tokens")
    assert contrast(style(browser, card, "backgroundColor"), style(browser, card, "color")) > READABLE
    small = browser.find_element(By.CSS_SELECTOR, ".note")
    assert contrast(ground, style(browser, small, "color")) > 4.5
    for token in tokens_of(browser)[1:5]:
        assert contrast(style(browser, token, "backgroundColor"), style(browser, token, "color")) > 4.5
    figure = browser.find_element(By.CSS_SELECTOR, "svg[role=img]")
    assert ("invert" in style(browser, figure, "filter")) == (scheme == "dark")


def test_print_shows_the_chosen_loop(show):
    """In light, whatever the screen; without what only a screen can do."""
    browser = show("one", scheme="dark", media="print")
    body = browser.find_element(By.TAG_NAME, "body")
    assert style(browser, body, "backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
    marked = tokens_of(browser)[4]
    assert style(browser, marked, "borderBottomStyle") == "dashed"
    assert style(browser, marked, "printColorAdjust") == "exact"
    figure = browser.find_element(By.CSS_SELECTOR, "svg[role=img]")
    assert style(browser, figure, "filter") == "none"


def test_what_a_document_brings_does_nothing(show):
    """It shows as text, on the page and beside it, and what it would run has not run."""
    browser = show("hostile")
    tokens = tokens_of(browser)
    assert browser.execute_script("return arguments[0].textContent", tokens[0]) == HOSTILE
    tokens[2].click()
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    told = browser.find_element(By.CSS_SELECTOR, ".inspector")
    assert HOSTILE in browser.execute_script("return arguments[0].textContent", told)
    assert browser.execute_script("return window.hit") is None
    assert browser.find_elements(By.TAG_NAME, "img") == []


def test_the_policy_holds(show):
    """Even if markup got in, nothing of it would run or load: put in by hand, it is blocked, and said to be."""
    browser = show("one")
    browser.get_log("browser")
    browser.execute_async_script(
        "const done = arguments[0];"
        'const markup = \'<img src=x onerror="window.hit = 1"><p style="margin: 9px">\';'
        "document.body.insertAdjacentHTML('beforeend', markup);"
        "const script = document.createElement('script'); script.textContent = 'window.hit = 2';"
        "document.body.append(script); setTimeout(done, 100);"
    )
    assert browser.execute_script("return window.hit") is None
    said = [entry["message"] for entry in browser.get_log("browser")]
    for directive in ("img-src", "style-src", "script-src"):
        assert any("Content Security Policy" in line and directive in line for line in said), directive
