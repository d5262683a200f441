"""Clients that misbehave, each with the answer it gets. launcher/README.md has the table."""
import json
import socket
import time

import harness
import serve_harness


class ServeAbuseTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = serve_harness.Server('--parallel', 2, '--max-requests', 40)
        cls.addClassCleanup(cls.server.kill)

    def tearDown(self):
        # Whatever a client did, the next one is served.
        self.assertEqual(self.server.request('GET', '/health/ready')[0], 200, self.server.log())

    def raw(self, data, timeout=20, read=True):
        """Sends bytes and returns everything that comes back until the server closes."""
        with socket.create_connection(('127.0.0.1', self.server.port), timeout) as s:
            try:
                s.sendall(data)
            except OSError:
                pass  # it answered and closed before it read everything
            out = b''
            while read:
                try:
                    piece = s.recv(65536)
                except OSError:
                    break
                if not piece:
                    break
                out += piece
            return out

    def status_of(self, data):
        answer = self.raw(data)
        self.assertTrue(answer.startswith(b'HTTP/1.'), answer[:200])
        return int(answer.split(b' ', 2)[1])

    def post_head(self, *headers, path='/v1/completions'):
        lines = [f'POST {path} HTTP/1.1', 'Host: localhost', 'Content-Type: application/json', 'Connection: close', *headers]
        return '\r\n'.join(lines).encode() + b'\r\n\r\n'

    def test_malformed_requests(self):
        for data in (b'\x00\x01\x02\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n', b'FROB\r\n\r\n',
                     b'GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n',
                     b'POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n'):
            self.assertEqual(self.status_of(data), 400, data)

    def test_requests_that_proxies_read_otherwise(self):
        """Each would let a second request hide in the first, or be checked by one name and answered by another."""
        body = b'{"prompt": "x", "max_tokens": 1}'
        length = f'Content-Length: {len(body)}'
        for status, headers in ((200, [length]), (400, [length, 'Transfer-Encoding: chunked']), (400, [length, 'Content-Length: 3']),
                                (501, ['Transfer-Encoding: xchunked']), (501, ['Transfer-Encoding: gzip, chunked']),
                                (400, [length, 'Host: evil.example']), (415, [length, 'Content-Encoding: gzip']),
                                (400, [length, 'X-Space : y'])):
            self.assertEqual(self.status_of(self.post_head(*headers) + body), status, headers)
        no_host = self.post_head(length).replace(b'Host: localhost\r\n', b'')
        self.assertEqual(self.status_of(no_host + body), 400)
        self.assertEqual(self.status_of(no_host.replace(b'HTTP/1.1', b'HTTP/1.0') + body), 200)

    def test_pipelined_requests_are_all_answered(self):
        body = b'{"prompt": "x", "max_tokens": 2}'
        last = self.post_head(f'Content-Length: {len(body)}') + body
        answer = self.raw(last.replace(b'Connection: close\r\n', b'') * 5 + last)
        self.assertEqual(answer.count(b'HTTP/1.1 200 OK'), 6)

    def test_headers_without_end(self):
        many = b''.join(b'x-%d: y\r\n' % i for i in range(200000))
        self.assertEqual(self.status_of(b'GET / HTTP/1.1\r\nHost: localhost\r\n' + many + b'\r\n'), 431)
        self.assertEqual(self.status_of(b'GET / HTTP/1.1\r\nHost: localhost\r\nx: ' + b'y' * 1000000 + b'\r\n\r\n'), 431)

    def test_huge_and_endless_bodies(self):
        self.assertEqual(self.status_of(self.post_head('Content-Length: 999999999999')), 413)
        chunk = b'100000\r\n' + b' ' * 0x100000 + b'\r\n'
        self.assertEqual(self.status_of(self.post_head('Transfer-Encoding: chunked') + chunk * 20), 413)

    def test_body_that_ends_early(self):
        with socket.create_connection(('127.0.0.1', self.server.port)) as s:
            s.sendall(self.post_head('Content-Length: 100') + b'{"prompt"')

    def test_json_bombs(self):
        for body in (b'[' * 1000000, b'{"a":' * 500000, b'{"prompt": "\xff\xfe"}', b'{"prompt": NaN}', b'', b'null', b'"x"',
                     b'{"prompt": "x", "temperature": 1e400}', b'{"prompt": "x", "max_tokens": -1}',
                     b'{"prompt": "x", "n": 1e9}', b'{"prompt": "x", "stop": ' + json.dumps(['s'] * 10000).encode() + b'}',
                     b'{"prompt": "x", "logprobs": 1000000}', b'{"prompt": []}',
                     b'{"prompt": "x", "logit_bias": {' + b','.join(b'"%d": 1' % i for i in range(5000)) + b'}}'):
            status, _, answer = self.server.request('POST', '/v1/completions', body)
            self.assertEqual(status, 400, (body[:60], answer))
            self.assertIn('error', json.loads(answer))

    def test_schema_bombs(self):
        deep = {'type': 'string'}
        for _ in range(50):
            deep = {'type': 'array', 'items': deep}
        for schema in (deep, {'enum': list(range(100000))}, {'$ref': '#'}, {'type': 'string', 'pattern': '(a+)+$'},
                       {'type': 'object', 'properties': {f'p{i}': {} for i in range(5000)}}):
            status, answer = self.server.post('/v1/completions', {'prompt': 'x', 'response_format': {
                'type': 'json_schema', 'json_schema': {'name': 's', 'schema': schema}}})
            self.assertEqual(status, 400, answer)

    def test_prompt_that_is_too_long(self):
        status, answer = self.server.post('/v1/completions', {'prompt': [5] * 100000})
        self.assertEqual(status, 400)
        self.assertIn('100000 tokens', answer['error']['message'])

    def test_other_sites_and_names(self):
        body = {'prompt': 'x', 'max_tokens': 1}
        for headers, status in (({'Origin': 'http://evil.example'}, 403), ({'Host': 'evil.example'}, 403),
                                ({'Host': 'evil.example', 'Origin': 'http://evil.example'}, 403), ({'Origin': 'null'}, 403),
                                ({'Host': f'localhost:{self.server.port}'}, 200),
                                ({'Origin': f'http://127.0.0.1:{self.server.port}'}, 200)):
            got, answer_headers, answer = self.server.request('POST', '/v1/completions', body, headers=headers)
            self.assertEqual(got, status, (headers, answer))
            self.assertNotIn('Access-Control-Allow-Origin', answer_headers)

    def test_wrong_methods(self):
        for method, path in (('GET', '/v1/completions'), ('DELETE', '/v1/models'), ('POST', '/'), ('PUT', '/tokenize')):
            status, headers, _ = self.server.request(method, path)
            self.assertEqual(status, 405)
            self.assertTrue(headers['Allow'])

    def test_client_that_never_reads(self):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.connect(('127.0.0.1', self.server.port))
        body = json.dumps({'prompt': 'x', 'max_tokens': 400, 'ignore_eos': True, 'stream': True, 'n': 2}).encode()
        s.sendall(self.post_head(f'Content-Length: {len(body)}') + body)
        # It takes a place, not the server: others are answered meanwhile.
        self.assertTrue(self.server.complete('Once', max_tokens=3))
        s.close()
        harness.wait_until(lambda: self.server.status()['unfinished'] == 0, 30, 'its requests to end')

    def test_overload_is_refused_and_hundreds_leave_at_once(self):
        sockets = []
        body = json.dumps({'prompt': 'x', 'max_tokens': 400, 'ignore_eos': True, 'stream': True}).encode()
        head = self.post_head(f'Content-Length: {len(body)}')
        for _ in range(300):
            s = socket.create_connection(('127.0.0.1', self.server.port))
            s.sendall(head + body)
            sockets.append(s)
        harness.wait_until(lambda: self.server.status()['unfinished'] == 40, 30, 'the queue to be full')
        status, headers, _ = self.server.request('POST', '/v1/completions', body)
        self.assertEqual(status, 503)
        self.assertTrue(headers['Retry-After'])
        self.assertEqual(self.server.request('GET', '/health/live')[0], 200)
        for s in sockets:
            s.close()
        harness.wait_until(lambda: self.server.status()['unfinished'] == 0, 30, 'all to be cancelled')
        harness.wait_until(lambda: self.server.status()['running'] == 0, 30, 'the engine to be idle')

    def test_slow_client_is_no_hindrance(self):
        slow = [socket.create_connection(('127.0.0.1', self.server.port)) for _ in range(50)]
        for s in slow:
            s.sendall(b'GET /sta')
        began = time.monotonic()
        self.assertEqual(self.server.request('GET', '/health/live')[0], 200)
        self.assertLess(time.monotonic() - began, 5)
        for s in slow:
            s.close()


if __name__ == '__main__':
    harness.main()
