"""A chat in a terminal: what a person types, pastes and interrupts does what they expect."""
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
import unittest

import harness

COLUMNS = 200  # wide, so that what is typed stands on one line
PROMPT = '> '
CTRL_A, CTRL_C, CTRL_D, BACKSPACE, UP = '\x01', '\x03', '\x04', '\x7f', '\x1b[A'


class Terminal:
    """shoal run in a pseudo terminal of its own."""

    def __init__(self, *args, language='C.UTF-8'):
        self.text = ''
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            env = {**os.environ, 'TERM': 'xterm', 'LC_ALL': language}
            os.execve(harness.BINARY, [harness.BINARY, 'run', '--temp', '0', *args], env)
        self.resize(COLUMNS)

    def resize(self, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))

    def type(self, text, editing=True):
        """What is typed before the editor has taken over would be echoed twice: wait for that first."""
        if editing:
            harness.wait_until(lambda: not termios.tcgetattr(self.fd)[3] & termios.ICANON, 30, 'the line editor')
        os.write(self.fd, text.encode())

    def read(self, timeout):
        """False at the end."""
        if select.select([self.fd], [], [], timeout)[0]:
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError:  # Linux' way to say that the other side has closed
                return False
            self.text += data.decode(errors='replace')
            return bool(data)
        return True

    def expect(self, what, timeout=30):
        """Waits for `what` and returns the text up to it, which is forgotten with it."""
        deadline = time.monotonic() + timeout
        while what not in self.text:
            if time.monotonic() > deadline or not self.read(1):
                raise AssertionError(f'waited for {what!r}, found {self.text!r}')
        before, self.text = self.text.split(what, 1)
        return before

    def ask(self, text):
        """Types a message and returns the reply."""
        self.type(text + '\n')
        self.expect('\r\n')
        reply = self.expect('\r\n' + PROMPT)
        return reply.strip()

    def end(self, timeout=30):
        """(exit code, what was printed) once the process has ended by itself."""
        deadline = time.monotonic() + timeout
        while self.read(1):
            if time.monotonic() > deadline:
                raise AssertionError(f'still running: {self.text!r}')
        _, status = os.waitpid(self.pid, 0)
        self.pid = None
        return os.waitstatus_to_exitcode(status), self.text

    def close(self):
        os.close(self.fd)
        if self.pid:
            harness.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class ChatTest(harness.TestCase):
    def chat(self, *args, **kwargs):
        terminal = Terminal(*args, **kwargs)
        self.addCleanup(terminal.close)
        terminal.expect(PROMPT)
        return terminal

    def test_reply_and_end(self):
        chat = self.chat()
        reply = chat.ask('Tell me a story about a fish')
        self.assertRegex(reply, r'^[A-Z]')
        chat.type(CTRL_D)
        code, rest = chat.end()
        self.assertEqual(code, 0, rest)
        self.assertIn('\r\nrank 0', rest, 'the statistics begin on a line of their own')

    def test_the_same_message_gets_the_same_reply_however_it_was_typed(self):
        expected = self.chat().ask('Tell me about fish')
        chat = self.chat()
        self.assertEqual(chat.ask('ell me about the' + BACKSPACE * 3 + 'fish' + CTRL_A + 'T'), expected)
        # Half a message is dropped by Ctrl-C; the arrow brings the last one back.
        chat = self.chat()
        chat.type('something else')
        chat.expect('something else')
        chat.type(CTRL_C)
        chat.expect('\r\n' + PROMPT)
        self.assertEqual(chat.ask('Tell me about fish'), expected)
        chat.type(UP)
        self.assertIn('Tell me about fish', chat.text + chat.expect('fish') + 'fish')

    def test_letters_beyond_ascii(self):
        """Also where the environment names no UTF-8 locale."""
        for language in ('C.UTF-8', 'C'):
            with self.subTest(language=language):
                chat = self.chat(language=language)
                chat.type('Füße 日本' + BACKSPACE + CTRL_A)
                chat.expect('Füße 日')
                self.assertTrue(chat.ask(''))

    def test_a_paste_is_one_message(self):
        chat = self.chat()
        chat.type('Hello fish\n\nTell me a story\n')
        chat.expect('Tell me a story\r\n')
        self.assertTrue(chat.expect('\r\n' + PROMPT).strip())
        self.assertEqual(chat.text.count(PROMPT), 0, 'one paste, one reply')
        self.assertTrue(chat.ask('Once more \\\nwith feeling'))

    def test_interrupt_stops_the_reply_and_a_second_one_leaves(self):
        model = harness.generate(self.scratch / 'slow.gguf', '--dim', 512, '--layers', 12, '--ffn', 4096,
                                 '--context', 131072, '--chat-template',
                                 '{% for m in messages %}{{ m.content }}{% endfor %}')
        chat = self.chat('-m', str(model), '-c', '100000', '-n', '90000')
        chat.type('a\n')
        chat.expect('\r\n')
        chat.expect(' w')  # all words of this model are w and a number
        chat.type(CTRL_C, editing=False)
        chat.expect('(stopped)')
        chat.expect(PROMPT)
        chat.type(CTRL_C)
        code, rest = chat.end()
        self.assertEqual(code, 0, rest)

    def test_thoughts_are_marked_as_such(self):
        """The template opens a thought that this model never ends."""
        model = harness.generate(self.scratch / 'thinks.gguf', '--chat-template',
                                 '{% for m in messages %}{{ m.content.split("</think>")[-1] }}{% endfor %}<think>\n')
        chat = self.chat('-m', str(model), '-n', '8')
        chat.type('a\n')
        chat.expect('(thinks) ')
        chat.expect(PROMPT)

    def test_a_resized_window_keeps_what_was_typed(self):
        expected = self.chat().ask('Tell me about fish')
        chat = self.chat()
        chat.type('Tell me ')
        chat.expect('Tell me ')
        chat.resize(60)
        self.assertEqual(chat.ask('about fish').replace('\r\n', ''), expected.replace('\r\n', ''))


def has_terminals():
    try:
        for fd in pty.openpty():
            os.close(fd)
        return True
    except OSError:
        return False


if __name__ == '__main__':
    if not has_terminals():
        raise SystemExit('this machine gives no pseudo terminals (in a bare root: mount -t devpts devpts /dev/pts)')
    harness.main()
