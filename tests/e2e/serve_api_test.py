"""`shoal serve` as an OpenAI client sees it: shapes, streams, parameters, errors, and a clean end."""
import base64
import json
import signal
import struct

import harness
import serve_harness

CHAT = [{'role': 'user', 'content': 'Tell me a story about a fish.'}]


class ServeApiTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = serve_harness.Server('--parallel', 4, '--alias', 'fish')
        cls.addClassCleanup(cls.server.kill)

    def ok(self, path, body):
        status, answer = self.server.post(path, body)
        self.assertEqual(status, 200, answer)
        return answer

    def test_completion_equals_run(self):
        text = self.server.complete('Once upon a time', max_tokens=24)
        run = self.assert_ok(harness.shoal('run', '-p', 'Once upon a time', '-n', 24, '--temp', 0, '-q'))
        self.assertEqual('Once upon a time' + text, run.out.decode().removesuffix('\n'))

    def test_chat_whole_and_streamed(self):
        body = {'model': 'fish', 'messages': CHAT, 'temperature': 0, 'max_tokens': 20}
        whole = self.ok('/v1/chat/completions', body)
        self.assertEqual(whole['object'], 'chat.completion')
        choice = whole['choices'][0]
        self.assertEqual(choice['message']['role'], 'assistant')
        self.assertIn(choice['finish_reason'], ('stop', 'length'))
        usage = whole['usage']
        self.assertEqual(usage['total_tokens'], usage['prompt_tokens'] + usage['completion_tokens'])
        events = list(self.server.stream('/v1/chat/completions', {**body, 'stream_options': {'include_usage': True}}))
        self.assertEqual(events[-1], '[DONE]')
        self.assertEqual(events[0]['choices'][0]['delta'], {'role': 'assistant', 'content': ''})
        self.assertEqual(events[0]['object'], 'chat.completion.chunk')
        self.assertEqual(len({e['id'] for e in events[:-1]}), 1)
        self.assertEqual(events[-2]['choices'], [])
        self.assertEqual(events[-2]['usage']['completion_tokens'], usage['completion_tokens'])
        self.assertEqual(events[-3]['choices'][0]['finish_reason'], choice['finish_reason'])
        self.assertEqual(serve_harness.text_of(events), choice['message']['content'])

    def test_embeddings(self):
        body = {'model': 'fish', 'input': ['The sea', 'The sea', 'A completely different text about a red boat']}
        answer = self.ok('/v1/embeddings', body)
        vectors = [d['embedding'] for d in answer['data']]
        self.assertEqual([d['index'] for d in answer['data']], [0, 1, 2])
        dot = lambda a, b: sum(x * y for x, y in zip(a, b))
        self.assertAlmostEqual(dot(vectors[0], vectors[0]), 1, places=5)
        self.assertAlmostEqual(dot(vectors[0], vectors[1]), 1, places=5)
        self.assertLess(dot(vectors[0], vectors[2]), 0.999)
        packed = self.ok('/v1/embeddings', {**body, 'encoding_format': 'base64'})['data'][2]['embedding']
        values = struct.unpack(f'<{len(vectors[2])}f', base64.b64decode(packed))
        self.assertAlmostEqual(dot(values, vectors[2]), 1, places=5)
        self.assertGreater(answer['usage']['prompt_tokens'], 3)
        status, error = self.server.post('/v1/embeddings', {'input': []})
        self.assertEqual((status, error['error']['param']), (400, 'input'))

    def test_run_through_the_server(self):
        url = f'http://127.0.0.1:{self.server.port}'
        flags = ('-p', 'Once upon a time', '-n', 24, '--temp', 0, '-q')
        self.assertEqual(self.assert_ok(harness.shoal('run', '--server', url, *flags)).out,
                         self.assert_ok(harness.shoal('run', *flags)).out)
        self.assertEqual(harness.shoal('run', '--server', url, '-m', 'x.gguf', '-p', 'x').code, 2)
        self.assertEqual(harness.shoal('run', '--server', 'ftp://x', '-p', 'x').code, 2)
        gone = harness.shoal('run', '--server', 'http://127.0.0.1:1', '-p', 'x')
        self.assertEqual(gone.code, 69)
        self.assertIn('127.0.0.1 port 1', gone.err)

    def test_trace_comes_back(self):
        trace = '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'
        for sent, expected in ((trace, trace), ('x' * 55, None)):
            headers = self.server.request('POST', '/v1/completions', {'prompt': 'x', 'max_tokens': 1}, {'traceparent': sent})[1]
            self.assertEqual(headers['traceparent'], expected)

    def test_statistics_of_a_rank(self):
        self.server.complete('Once', max_tokens=8)

        def steps():
            text = self.server.request('GET', '/metrics')[2].decode()
            return any(line.startswith('shoal_rank_steps_total{rank="0"}') and float(line.split()[1]) > 0
                       for line in text.splitlines())
        harness.wait_until(steps, 30, 'the rank to report its steps')

    def test_stop_strings_across_tokens(self):
        text = self.server.complete('Once upon a time', max_tokens=30)
        stop = text[7:13]
        answer = self.ok('/v1/completions', {'prompt': 'Once upon a time', 'temperature': 0, 'max_tokens': 30,
                                             'stop': [stop, 'never to be seen']})
        self.assertEqual(answer['choices'][0]['text'], text[:text.index(stop)])
        self.assertEqual(answer['choices'][0]['finish_reason'], 'stop')

    def test_seed_decides_and_n_differs(self):
        body = {'prompt': 'Once', 'temperature': 1.5, 'max_tokens': 16, 'seed': 11, 'n': 3}
        first, again = (self.ok('/v1/completions', body) for _ in range(2))
        texts = [c['text'] for c in first['choices']]
        self.assertEqual([c['index'] for c in first['choices']], [0, 1, 2])
        self.assertEqual(texts, [c['text'] for c in again['choices']])
        self.assertEqual(len(set(texts)), 3)
        single = self.ok('/v1/completions', {**body, 'n': 1})
        self.assertEqual(single['choices'][0]['text'], texts[0])

    def test_logprobs(self):
        answer = self.ok('/v1/chat/completions', {'messages': CHAT, 'temperature': 0, 'max_tokens': 4, 'logprobs': True,
                                                  'top_logprobs': 3})
        content = answer['choices'][0]['logprobs']['content']
        self.assertEqual(len(content), answer['usage']['completion_tokens'])
        for token in content:
            self.assertEqual(bytes(token['bytes']).decode(errors='replace'), token['token'])
            self.assertEqual(len(token['top_logprobs']), 3)
            self.assertAlmostEqual(token['logprob'], token['top_logprobs'][0]['logprob'], places=4)
            self.assertLessEqual(token['logprob'], 0)
        old = self.ok('/v1/completions', {'prompt': 'Once', 'temperature': 0, 'max_tokens': 3, 'logprobs': 2})
        logprobs = old['choices'][0]['logprobs']
        self.assertEqual([len(logprobs[k]) for k in ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset')], [3] * 4)

    def test_logit_bias_bans_a_token(self):
        base = self.ok('/v1/completions', {'prompt': 'Once upon a', 'temperature': 0, 'max_tokens': 1, 'logprobs': 0})
        token = base['choices'][0]['logprobs']['tokens'][0]
        ids = [i for i in self.ok('/tokenize', {'content': token, 'add_special': False})['tokens']]
        biased = self.ok('/v1/completions', {'prompt': 'Once upon a', 'temperature': 0, 'max_tokens': 1,
                                             'logit_bias': {str(i): -100 for i in ids}, 'logprobs': 0})
        self.assertNotEqual(biased['choices'][0]['logprobs']['tokens'][0], token)

    def test_json_schema(self):
        schema = {'type': 'object', 'properties': {'name': {'type': 'string', 'maxLength': 12},
                                                   'age': {'type': 'integer', 'minimum': 0, 'maximum': 120},
                                                   'kind': {'enum': ['fish', 'bird']}},
                  'required': ['name', 'age', 'kind'], 'additionalProperties': False}
        for temperature in (0, 1):
            answer = self.ok('/v1/chat/completions', {
                'messages': CHAT, 'temperature': temperature, 'max_tokens': 200, 'seed': 3,
                'response_format': {'type': 'json_schema', 'json_schema': {'name': 'pet', 'schema': schema}}})
            pet = json.loads(answer['choices'][0]['message']['content'])
            self.assertEqual(set(pet), {'name', 'age', 'kind'})
            self.assertIn(pet['kind'], ('fish', 'bird'))
            self.assertTrue(0 <= pet['age'] <= 120 and len(pet['name']) <= 12, pet)
            self.assertEqual(answer['choices'][0]['finish_reason'], 'stop')

    def test_forced_tool_call(self):
        tools = [{'type': 'function', 'function': {'name': 'get_weather', 'parameters': {
            'type': 'object', 'properties': {'city': {'type': 'string', 'maxLength': 10}}, 'required': ['city']}}}]
        body = {'messages': CHAT, 'max_tokens': 150, 'tools': tools, 'temperature': 0,
                'tool_choice': {'type': 'function', 'function': {'name': 'get_weather'}}}
        choice = self.ok('/v1/chat/completions', body)['choices'][0]
        self.assertEqual(choice['finish_reason'], 'tool_calls')
        call = choice['message']['tool_calls'][0]
        self.assertEqual(call['function']['name'], 'get_weather')
        self.assertEqual(set(json.loads(call['function']['arguments'])), {'city'})
        streamed = [c['delta']['tool_calls'][0] for e in self.server.stream('/v1/chat/completions', body) if e != '[DONE]'
                    for c in e['choices'] if 'tool_calls' in c['delta']]
        self.assertEqual(streamed[0]['function'], call['function'])

    def test_drafts_change_nothing_but_the_steps(self):
        """Guessed tokens are in the metrics and nowhere else."""
        server = serve_harness.Server('--parallel', 4, '--alias', 'fish', '--draft-max', 7)
        self.addCleanup(server.kill)
        repetitive = 'Tom has a red ball. Mia has a red ball. Tom has a red ball. Mia has a'
        schema = {'type': 'object', 'properties': {'name': {'type': 'string'}, 'age': {'type': 'integer'}}}
        wanted = {'type': 'json_schema', 'json_schema': {'name': 'p', 'schema': schema}}
        for path, body in (
                ('/v1/completions', {'prompt': repetitive, 'temperature': 0, 'max_tokens': 120, 'ignore_eos': True}),
                ('/v1/completions', {'prompt': repetitive, 'temperature': 1, 'seed': 3, 'n': 3, 'max_tokens': 60}),
                ('/v1/completions', {'prompt': repetitive, 'temperature': 0, 'max_tokens': 80, 'stop': ['ball']}),
                ('/v1/completions', {'prompt': repetitive, 'temperature': 0.5, 'seed': 1, 'max_tokens': 40, 'logprobs': 3}),
                ('/v1/completions', {'prompt': repetitive, 'temperature': 0, 'max_tokens': 60, 'frequency_penalty': 0.5}),
                ('/v1/chat/completions', {'messages': CHAT, 'temperature': 1, 'seed': 9, 'max_tokens': 60,
                                          'response_format': wanted})):
            answers = []
            for s in (self.server, server):
                status, answer = s.post(path, body)
                self.assertEqual(status, 200, answer)
                # What was cached depends on what the server did before.
                answer['usage'].pop('prompt_tokens_details')
                answers.append([answer['choices'], answer['usage']])
            self.assertEqual(answers[0], answers[1], body)
        self.assertEqual(serve_harness.text_of(server.stream('/v1/completions', {'prompt': repetitive, 'temperature': 0})),
                         self.server.complete(repetitive))
        for name in ('draft', 'accepted'):
            harness.wait_until(lambda: f'shoal_spec_decode_num_{name}_tokens_total 0' not in
                               server.request('GET', '/metrics')[2].decode(), 20, 'drafts to be counted')

    def test_tokenize_and_back(self):
        ids = self.ok('/tokenize', {'content': 'A small fish'})['tokens']
        self.assertEqual(self.ok('/detokenize', {'tokens': ids})['content'].strip(), 'A small fish')

    def test_models_health_metrics_page(self):
        models = json.loads(self.server.request('GET', '/v1/models')[2])
        self.assertEqual([m['id'] for m in models['data']], ['fish'])
        for path in ('/health/live', '/health/ready'):
            self.assertEqual(self.server.request('GET', path)[0], 200)
        self.server.complete('Once', max_tokens=2)
        metrics = self.server.request('GET', '/metrics')[2].decode()
        for name in ('shoal_num_requests_running', 'shoal_time_to_first_token_seconds_bucket',
                     'shoal_generation_tokens_total', 'shoal_kv_cache_usage_perc'):
            self.assertIn(name, metrics)
        status, headers, page = self.server.request('GET', '/')
        self.assertEqual(status, 200)
        self.assertIn("default-src 'none'", headers['Content-Security-Policy'])
        self.assertIn(b'<title>shoal</title>', page)

    def test_errors_have_openai_shape(self):
        for path, body, status, param in (
                ('/v1/chat/completions', {'messages': []}, 400, 'messages'),
                ('/v1/chat/completions', {'messages': CHAT, 'model': 'gpt-4'}, 404, 'model'),
                ('/v1/completions', {'prompt': 'a', 'temperature': 9}, 400, 'temperature'),
                ('/v1/completions', {'prompt': 'fish ' * 5000, 'max_tokens': 1}, 400, None),
                ('/nowhere', {}, 404, None)):
            got, answer = self.server.post(path, body)
            self.assertEqual(got, status, answer)
            self.assertEqual(set(answer['error']), {'message', 'type', 'param', 'code'})
            self.assertEqual(answer['error']['param'], param)
        _, answer = self.server.post('/v1/completions', {'prompt': 'fish ' * 5000, 'max_tokens': 1})
        self.assertRegex(answer['error']['message'], r'has \d{4,} tokens.* holds 512')

    def test_connection_is_kept_and_pipelined(self):
        connection = self.server.connect()
        for _ in range(3):
            connection.request('GET', '/health/live')
            response = connection.getresponse()
            self.assertEqual((response.status, response.read()), (200, b'{"status":"ok"}'))
        connection.close()


class ServeLifeTest(harness.TestCase):
    def test_sigterm_finishes_what_runs(self):
        server = serve_harness.Server()
        self.addCleanup(server.kill)
        events = server.stream('/v1/completions', {'prompt': 'Once', 'max_tokens': 200, 'ignore_eos': True, 'temperature': 0})
        first = next(events)
        server.process.send_signal(signal.SIGTERM)
        harness.wait_until(lambda: 'draining' in server.log(), 10, 'the server to drain')
        rest = list(events)
        self.assertEqual(rest[-1], '[DONE]')
        self.assertEqual(rest[-2]['choices'][0]['finish_reason'], 'length')
        self.assertTrue(first['choices'])
        self.assertEqual(server.process.wait(20), 0, server.log())

    def test_thoughts_are_apart_from_the_answer(self):
        """The template opens a thought that this model never ends."""
        model = harness.generate(self.scratch / 'thinks.gguf', '--chat-template',
                                 '{% for m in messages %}{{ m.content.split("</think>")[-1] }}{% endfor %}<think>\n')
        server = serve_harness.Server(model=model)
        self.addCleanup(server.kill)
        body = {'messages': CHAT, 'temperature': 0, 'max_tokens': 12}
        status, whole = server.post('/v1/chat/completions', body)
        self.assertEqual(status, 200, whole)
        message = whole['choices'][0]['message']
        self.assertEqual(message['content'], '')
        self.assertTrue(message['reasoning_content'])
        deltas = [e['choices'][0]['delta'] for e in server.stream('/v1/chat/completions', body) if e != '[DONE]']
        self.assertEqual(''.join(d.get('reasoning_content', '') for d in deltas), message['reasoning_content'])
        self.assertEqual(''.join(d.get('content', '') for d in deltas), '')
        self.assertIn('w', server.complete('w1', max_tokens=4), 'a completion is text as it comes')

    def test_shards_and_kv_pages_on_disk(self):
        """A folder of `shoal shard` is a model like any other; what a stop leaves on disk the next start finds."""
        shards = self.scratch / 'shards'
        self.assert_ok(harness.shoal('shard', '-m', harness.DEMO_MODEL, '-o', shards, '-q'))
        prompt = ' '.join(f'The fish number {i} swam to the sea.' for i in range(25))
        flags = ['-m', str(shards), '-c', 512, '--kv-cache-dir', self.scratch / 'kv', '--kv-disk', '64M']

        def metric(server, name):
            text = server.request('GET', '/metrics')[2].decode()
            return float(next(line.split()[1] for line in text.splitlines() if line.startswith(name + ' ')))

        texts = []
        for start in range(2):
            server = serve_harness.Server(*flags)
            self.addCleanup(server.kill)
            texts.append(server.complete(prompt, max_tokens=16))
            read = 'shoal_kv_disk_hits_total'
            if start == 1:
                harness.wait_until(lambda: metric(server, read) >= 256, 20, 'tokens from disk to be counted')
            else:
                harness.wait_until(lambda: metric(server, 'shoal_kv_disk_pages_written_total') >= 1, 20, 'pages to be counted')
                self.assertEqual(metric(server, read), 0)
            self.assertEqual(metric(server, 'shoal_kv_disk_pages_lost_total'), 0)
            self.assertEqual(server.stop(), 0, server.log())
        self.assertEqual(texts[0], texts[1])
        run = self.assert_ok(harness.shoal('run', '-p', prompt, '-n', 16, '--temp', 0, '-c', 512, '-q'))
        self.assertEqual(prompt + texts[0], run.out.decode().removesuffix('\n'))

    def test_what_cannot_start_ends_with_the_engines_code(self):
        result = harness.shoal('serve', '--port', 0, '-m', '/nowhere.gguf')
        self.assertEqual(result.code, harness.UNREADABLE, str(result))
        result = harness.shoal('serve', '--port', 0, '-c', 100000)
        self.assertEqual(result.code, harness.USAGE, str(result))
        self.assertIn('context', result.err)
        result = harness.shoal('serve', '--port', 0, '--listen', '0.0.0.0')
        self.assertEqual(result.code, 77, str(result))
        self.assertIn('--api-key-file', result.err)


class ServeKeysTest(harness.TestCase):
    def test_every_route_but_live_health_needs_the_key(self):
        keys = self.scratch / 'keys'
        keys.write_text('alice:sk-alice-secret\nbob:sk-bob-secret00\n')
        server = serve_harness.Server('--api-key-file', keys, '--max-concurrent', 1, ready=False)
        self.addCleanup(server.kill)
        good = {'Authorization': 'Bearer sk-alice-secret'}
        harness.wait_until(lambda: server.request('GET', '/health/ready', headers=good)[0] == 200, 60, 'ready')
        routes = [('GET', '/'), ('GET', '/status'), ('GET', '/metrics'), ('GET', '/health/ready'), ('GET', '/v1/models'),
                  ('POST', '/v1/completions'), ('POST', '/v1/chat/completions'), ('POST', '/v1/embeddings'),
                  ('POST', '/tokenize'), ('POST', '/detokenize'), ('GET', '/nowhere')]
        basic = 'Basic ' + base64.b64encode(b'x:sk-wrong-secret').decode()
        for method, path in routes:
            for wrong in ({}, {'Authorization': 'Bearer sk-alice-secre'}, {'Authorization': basic}):
                status, _, body = server.request(method, path, '{}' if method == 'POST' else None, headers=wrong)
                self.assertEqual(status, 401, (path, body))
        self.assertEqual(server.request('GET', '/health/live')[0], 200)
        page = server.request('GET', '/', headers={
            'Authorization': 'Basic ' + base64.b64encode(b'x:sk-bob-secret00').decode()})
        self.assertEqual(page[0], 200)
        # One request at a time for each key.
        slow = server.stream('/v1/completions', {'prompt': 'a', 'max_tokens': 400, 'ignore_eos': True}, headers=good)
        next(slow)
        status, headers, _ = server.request('POST', '/v1/completions', {'prompt': 'a'}, headers=good)
        self.assertEqual(status, 429)
        self.assertTrue(int(headers['Retry-After']) >= 1)
        other = server.request('POST', '/v1/completions', {'prompt': 'a', 'max_tokens': 1},
                               headers={'Authorization': 'Bearer sk-bob-secret00'})
        self.assertEqual(other[0], 200)
        slow.close()
        self.assertNotIn('secret', server.log())


if __name__ == '__main__':
    harness.main()
