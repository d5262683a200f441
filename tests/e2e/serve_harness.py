"""A `shoal serve` of its own for a test, and a plain HTTP client for it (standard library only)."""
import http.client
import json
import os
import re
import subprocess
import threading
import time

import harness


class Server:
    """Starts `shoal serve` on a free port of 127.0.0.1 (or on `port`) and waits until it is ready."""

    def __init__(self, *flags, model=None, ready=True, timeout=120, env=None, port=0):
        command = [harness.BINARY, 'serve', '--port', str(port), *map(str, flags)]
        if model is not None:
            command += ['-m', str(model)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, cwd=harness.ROOT, env={**os.environ, **(env or {})},
                                        start_new_session=True)
        self.lines = []
        self.port = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            harness.wait_until(lambda: self.port or self.process.poll() is not None, timeout, 'the server to listen')
            if self.port is None:
                raise AssertionError(f'the server ended with {self.process.returncode}\n{self.log()}')
            if ready:
                harness.wait_until(lambda: self.state() == 'ready', timeout, 'the server to be ready')
        except BaseException:
            self.kill()
            raise

    def _read(self):
        for line in self.process.stderr:
            text = line.decode(errors='replace')
            self.lines.append(text)
            if match := re.search(r'listening on https?://\S+?:(\d+)$', text.strip()):
                self.port = int(match[1])

    def log(self):
        return ''.join(self.lines[-100:])

    def state(self):
        try:
            return self.status()['state']
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            return None

    def status(self):
        return json.loads(self.request('GET', '/status')[2])

    def connect(self, timeout=120):
        return http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)

    def request(self, method, path, body=None, headers=None, timeout=120):
        """(status, headers, body) of one request on its own connection."""
        connection = self.connect(timeout)
        try:
            if isinstance(body, (dict, list)):
                body = json.dumps(body)
            connection.request(method, path, body, {'Content-Type': 'application/json', **(headers or {})})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, path, body, **kwargs):
        status, _, data = self.request('POST', path, body, **kwargs)
        return status, json.loads(data)

    def complete(self, prompt, **fields):
        """The text of a greedy completion."""
        status, answer = self.post('/v1/completions', {'prompt': prompt, 'temperature': 0, **fields})
        if status != 200:
            raise AssertionError(f'{status}: {answer}')
        return answer['choices'][0]['text']

    def stream(self, path, body, headers=None, timeout=120):
        """Yields the events of a stream, as objects; the last is the string [DONE]."""
        connection = self.connect(timeout)
        try:
            connection.request('POST', path, json.dumps({'stream': True, **body}),
                               {'Content-Type': 'application/json', **(headers or {})})
            response = connection.getresponse()
            if response.status != 200:
                raise AssertionError(f'{response.status}: {response.read()!r}')
            for line in response:
                if line.startswith(b'data: '):
                    data = line[6:].decode().strip()
                    yield data if data == '[DONE]' else json.loads(data)
        finally:
            connection.close()

    def ranks(self):
        """Process ids of the ranks: the engine's leaves."""
        family = harness.descendants(self.process.pid)
        return sorted(p for p in family if harness.name_of(p) == 'shoal' and not harness.descendants(p))

    def stop(self, timeout=30):
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self):
        family = harness.descendants(self.process.pid)
        for pid in [self.process.pid] + family:
            harness.kill(pid)
        self.process.wait()
        self._reader.join(5)
        self.process.stderr.close()


def text_of(events):
    """The text of a stream of completion or chat events."""
    text = ''
    for e in events:
        if e == '[DONE]':
            break
        if 'error' in e:
            raise AssertionError(e)
        for choice in e['choices']:
            text += choice['text'] if 'text' in choice else choice['delta'].get('content') or ''
    return text
