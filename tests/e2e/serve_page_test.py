"""The web page in real Chromium: chat with streaming, stop, retry, the cluster's picture, phone width, and no foreign script.

serve_page_test.py [--screenshots FOLDER]
"""
import pathlib
import signal
import sys

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import harness
import serve_harness

SCREENSHOTS = None
if '--screenshots' in sys.argv:
    at = sys.argv.index('--screenshots')
    SCREENSHOTS = pathlib.Path(sys.argv[at + 1])
    del sys.argv[at:at + 2]

HOSTILE = ('<img src=x onerror="window.hacked=1"><script>window.hacked=2</script> [x](javascript:window.hacked=3) **bold** `code`\n\n'
           '```js\nlet a = "<b>";\n```\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |')


class PageTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = serve_harness.Server('--parallel', 4)
        cls.addClassCleanup(cls.server.kill)
        options = webdriver.ChromeOptions()
        for flag in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--window-size=1280,860'):
            options.add_argument(flag)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        service = webdriver.ChromeService() if hasattr(webdriver, 'ChromeService') else None
        cls.browser = webdriver.Chrome(options=options, **({'service': service} if service else {}))
        cls.addClassCleanup(cls.browser.quit)

    def setUp(self):
        super().setUp()
        self.browser.set_window_size(1280, 860)
        self.browser.get(f'http://127.0.0.1:{self.server.port}/')
        self.wait(lambda: self.find('#state').text == 'ready', 'the page to know the cluster')

    def tearDown(self):
        severe = [e for e in self.browser.get_log('browser') if e['level'] == 'SEVERE']
        self.assertEqual(severe, [])

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition, what, timeout=60):
        return harness.wait_until(condition, timeout, what)

    def shot(self, name):
        if SCREENSHOTS:
            self.browser.save_screenshot(str(SCREENSHOTS / f'{name}.png'))

    def ask(self, text):
        self.find('#input').send_keys(text, Keys.ENTER)

    def finished(self):
        return self.find('#send').is_displayed() and self.all('.turn.assistant .meta button')

    def test_chat_then_retry(self):
        self.ask('Tell me a story.')
        self.wait(self.finished, 'an answer')
        self.assertEqual(len(self.all('.turn.user')), 1)
        self.assertTrue(self.find('.turn.assistant .body').text)
        self.assertIn('tokens', self.find('.turn.assistant .meta').text)
        self.shot('desktop')
        self.find('.turn.assistant .meta button').click()
        self.wait(lambda: len(self.all('.turn.assistant')) == 1 and self.finished(), 'another answer')

    def test_stop(self):
        self.browser.execute_script('''const real = window.fetch; window.fetch = (u, o) => {
            if (o?.body) o.body = JSON.stringify({...JSON.parse(o.body), ignore_eos: true});
            return real(u, o); }''')
        # The page itself presses the button at the first words: a driver may come when the short answer is complete.
        self.browser.execute_script('''new MutationObserver((_, observer) => {
            if (!document.querySelector('.turn.assistant .body')?.textContent) return;
            observer.disconnect();
            document.querySelector('#stop').click(); }).observe(document.body, {subtree: true, childList: true, characterData: true})''')
        self.ask('Count the fish.')
        self.wait(self.finished, 'the stop')
        self.assertIn('stopped', self.find('.turn.assistant .meta').text)
        self.wait(lambda: self.server.status()['unfinished'] == 0, 'the server to notice')

    ENDLESS = '''const real = window.fetch; window.fetch = (u, o) => {
        if (o?.body) o.body = JSON.stringify({...JSON.parse(o.body), ignore_eos: true, max_tokens: 400});
        return real(u, o); }'''

    # What stood below the answer, also between two looks of the driver.
    REMEMBER = '''window.told = []; new MutationObserver(() => {
        const meta = document.querySelector('.turn.assistant .meta')?.textContent;
        if (meta && meta !== told.at(-1)) told.push(meta);
        }).observe(document.body, {subtree: true, childList: true, characterData: true})'''

    def test_an_engine_that_is_lost_is_told(self):
        self.browser.execute_script(self.ENDLESS)
        self.browser.execute_script(self.REMEMBER)
        # The whole answer takes some hundredths of a second: where it is complete before the ranks stop, it is asked for again.
        for _ in range(20):
            self.find('#new').click()
            self.ask('Tell me a story.')
            self.wait(lambda: self.find('.turn.assistant .body').text, 'the first words')
            self.shot('streaming')
            for rank in self.server.ranks():
                harness.kill(rank, signal.SIGSTOP)
            # One that hangs is noticed after some seconds: long enough to be told.
            self.wait(lambda: self.told('waiting for the next word') or self.finished(), 'the page to say that it waits')
            if self.told('waiting for the next word'):
                break
            for rank in self.server.ranks():
                harness.kill(rank, signal.SIGCONT)
        self.assertTrue(self.told('waiting for the next word'), 'twenty answers were faster than a signal')
        self.wait(lambda: self.told('The engine is') or self.finished(), 'the restart')
        self.shot('restart')
        self.wait(self.finished, 'the rest of the answer')
        self.assertIn('400 tokens', self.find('.turn.assistant .meta').text)
        self.assertFalse(self.all('.turn.running'))

    def told(self, text):
        return text in self.browser.execute_script('return told.join("\\n")')

    def test_an_error_is_said(self):
        self.ask('fish ' * 2000)
        self.wait(lambda: self.all('.meta .error'), 'the error')
        self.assertIn('context', self.find('.meta .error').text)
        self.shot('error')
        self.browser.get_log('browser')  # Chromium logs the refused request as severe

    def test_hostile_markdown_is_only_text(self):
        self.browser.execute_script('const b = addTurn("assistant", "").body; markdown(b, arguments[0]);', HOSTILE)
        body = self.find('.turn.assistant .body')
        self.assertIn('<img src=x', body.text)
        self.assertEqual(self.all('.body img, .body script, .body a'), [])
        for tag in ('strong', 'code', 'pre code', 'li', 'td'):
            self.assertTrue(self.all(f'.body {tag}'), tag)
        self.assertIsNone(self.browser.execute_script('return window.hacked ?? null'))
        self.shot('markdown')

    def test_cluster_is_shown(self):
        self.wait(lambda: self.all('.rank'), 'the ranks')
        self.assertIn('layers 0–3', self.find('.stage').text)
        self.assertIn('MB', self.find('.rank').text)
        self.assertEqual(self.find('#model').text, 'demo')

    def test_phone(self):
        # Windows do not get as narrow as phones.
        self.browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                                     {'width': 360, 'height': 740, 'deviceScaleFactor': 2, 'mobile': True})
        self.addCleanup(self.browser.execute_cdp_cmd, 'Emulation.clearDeviceMetricsOverride', {})
        self.wait(lambda: self.browser.execute_script('return window.innerWidth') == 360, 'the narrow page')
        self.assertFalse(self.find('aside').is_displayed())
        self.ask('Hello')
        self.wait(self.finished, 'an answer')
        self.shot('phone-chat')
        width = self.browser.execute_script('return [document.documentElement.scrollWidth, window.innerWidth]')
        self.assertLessEqual(width[0], width[1], 'the page must not scroll sideways')
        self.find('#toggle').click()
        self.wait(lambda: self.find('aside').is_displayed() and self.all('.rank'), 'the cluster')
        self.shot('phone-cluster')


if __name__ == '__main__':
    harness.main()
