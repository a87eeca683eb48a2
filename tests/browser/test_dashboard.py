"""The dashboard of the demo in a real browser, as a person uses it: with a mouse, and with a keyboard only."""

from __future__ import annotations

import re
import shutil
import sys

import pytest

from tests.parts.demo import DEADLINE, end, free_ports, running, write_ini

CHROMIUM = shutil.which('chromium')

# Told on the console, where everything else is that must not be.
TELL_OF_VIOLATIONS = """
document.addEventListener('securitypolicyviolation', (event) => console.error('violates', event.violatedDirective));
"""


# The words of addresses in the table that are not in one line each.
BROKEN_WORDS = """
() => [...document.querySelectorAll('td.address')].flatMap((cell) => {
  const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const broken = [];
  while (walker.nextNode()) {
    for (const word of walker.currentNode.data.matchAll(/[^\\s@.,+_<>-]+/g)) {
      const range = document.createRange();
      range.setStart(walker.currentNode, word.index);
      range.setEnd(walker.currentNode, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
      if (lines.size > 1) broken.push(word[0]);
    }
  }
  return broken;
})
"""


@pytest.fixture
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='There is no playwright here: pip install playwright')
    if CHROMIUM is None:
        pytest.skip('There is no Chromium here: apt-get install chromium')
    with sync_api.sync_playwright() as playwright:
        options = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def demo(tmp_path):
    """The address of a demo that leaves its mail in the queue: nobody takes it up while a test looks at it."""
    ports = dict(zip(('http', 'smtp'), free_ports(2), strict=True))
    ini = write_ini(tmp_path, ports)
    text, number = re.subn(r'(?m)^mailqueue\.delivery = background$', 'mailqueue.delivery = queue', ini.read_text())
    assert number == 1
    ini.write_text(text)
    with running(sys.executable, '-m', 'demo', ini) as (process, said):
        yield said(r'running:  (\S+)').group(1)
        assert end(process) == 0


@pytest.fixture
def complaints():
    """What the browser had to complain of."""
    return []


@pytest.fixture
def page(browser, complaints):
    page = browser.new_page(viewport={'width': 1200, 'height': 900})
    page.set_default_timeout(DEADLINE * 1000)
    page.add_init_script(TELL_OF_VIOLATIONS)
    page.on('console', lambda said: complaints.append(said.text) if said.type in ('error', 'warning') else None)
    page.on('pageerror', lambda error: complaints.append(str(error)))
    return page


def press_by_keyboard(page, selector):
    """Go to something with the Tab key, see that it is marked, and press it."""
    target = page.locator(selector).first
    for _ in range(100):
        page.keyboard.press('Tab')
        if target.evaluate('element => element === document.activeElement'):
            assert target.evaluate('element => getComputedStyle(element).outlineStyle') != 'none'
            break
    else:
        pytest.fail(f'{selector} cannot be reached with a keyboard')
    with page.expect_navigation():
        page.keyboard.press('Enter')


def test_a_message_is_found_held_let_go_and_deleted(demo, page, complaints):
    page.goto(demo)
    page.click('#switch')
    page.wait_for_selector('#relay-state.off')
    page.fill('#name', 'Ada Lovelace')
    page.fill('#email', 'ada@example.org')
    page.click('button.primary')
    page.wait_for_selector('#count-waiting:text-is("1")')
    page.click('#dashboard')
    assert page.inner_text('h1') == 'Overview'
    assert page.inner_text('#count-waiting') == '1'

    press_by_keyboard(page, 'th a:text-is("waiting")')
    press_by_keyboard(page, 'a.id')
    assert page.inner_text('h1').startswith('Welcome, Ada Lovelace')
    assert 'you are on the list of the Demo Club' in page.inner_text('pre')
    press_by_keyboard(page, 'button:text-is("Hold")')
    assert page.inner_text('[role=status]') == 'The message is held.'
    assert page.inner_text('.state') == 'held'

    page.click('button:text-is("Unhold")')
    assert page.inner_text('.state') == 'waiting'

    page.click('nav >> text=Messages')
    page.check('input[name=id]')
    page.set_viewport_size({'width': 360, 'height': 740})
    assert page.evaluate('document.documentElement.scrollWidth') == 360
    page.click('button.danger')
    assert page.inner_text('h1') == 'Delete 1 message for good?'
    page.click('button:text-is("Delete for good")')
    assert page.inner_text('h2') == 'Done: 1 message'
    page.click('nav >> text=Overview')
    assert page.inner_text('#count-waiting') == '0'

    assert complaints == []


@pytest.mark.parametrize('width', [1280, 1024, 970, 360])
def test_addresses_are_broken_between_words_and_the_page_is_as_wide_as_the_window(demo, page, width):
    page.goto(demo)
    page.click('#switch')
    page.wait_for_selector('#relay-state.off')
    page.fill('#name', 'Ada Lovelace')
    page.fill('#email', 'customer.relations@newsletter.analytical-engines.example-company.co.uk')
    page.click('button.primary')
    page.wait_for_selector('#count-waiting:text-is("1")')
    page.click('#dashboard')
    page.set_viewport_size({'width': width, 'height': 900})

    page.click('nav >> text=Messages')

    assert page.locator('td.address').count() == 2
    assert page.evaluate(BROKEN_WORDS) == []
    assert page.evaluate('document.documentElement.scrollWidth') == width
