"""The official `openai` Python package against `shoal serve`.

The package comes from PyPI into .venv/ in the project's root; without a network the test is skipped, loudly.
"""
import json
import os
import pathlib
import subprocess
import sys

import harness
import serve_harness

VENV = harness.ROOT / '.venv'
PACKAGE = 'openai>=1.50'

try:
    import openai
except ImportError:
    openai = None

CHAT = [{'role': 'user', 'content': 'Tell me about a fish.'}]


class OpenAiTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        keys = pathlib.Path(cls.enterClassContext(__import__('tempfile').TemporaryDirectory())) / 'keys'
        keys.write_text('sk-test-key-0001\n')
        cls.server = serve_harness.Server('--api-key-file', keys, '--alias', 'fish', '--parallel', 4, ready=False)
        cls.addClassCleanup(cls.server.kill)
        cls.client = openai.OpenAI(base_url=f'http://127.0.0.1:{cls.server.port}/v1', api_key='sk-test-key-0001', max_retries=0)
        good = {'Authorization': 'Bearer sk-test-key-0001'}
        harness.wait_until(lambda: cls.server.request('GET', '/health/ready', headers=good)[0] == 200, 60, 'ready')

    def chat(self, **fields):
        return self.client.chat.completions.create(model='fish', messages=CHAT, **{'max_tokens': 24, 'temperature': 0, **fields})

    def test_chat_and_stream_agree(self):
        whole = self.chat()
        streamed = list(self.chat(stream=True, stream_options={'include_usage': True}))
        self.assertEqual(''.join(c.choices[0].delta.content or '' for c in streamed if c.choices), whole.choices[0].message.content)
        self.assertEqual(streamed[-1].usage.completion_tokens, whole.usage.completion_tokens)
        self.assertEqual(streamed[0].choices[0].delta.role, 'assistant')

    def test_completions_n_stop_seed(self):
        def make():
            return self.client.completions.create(model='fish', prompt='Once upon', n=3, seed=3, temperature=1.2, max_tokens=12)
        self.assertEqual([c.text for c in make().choices], [c.text for c in make().choices])
        text = self.client.completions.create(model='fish', prompt='Once upon', temperature=0, max_tokens=20).choices[0].text
        cut = self.client.completions.create(model='fish', prompt='Once upon', temperature=0, max_tokens=20, stop=[text[5:9]])
        self.assertEqual(cut.choices[0].text, text[:text.index(text[5:9])])

    def test_logprobs(self):
        content = self.chat(logprobs=True, top_logprobs=2, max_tokens=3).choices[0].logprobs.content
        self.assertEqual([len(t.top_logprobs) for t in content], [2] * len(content))
        self.assertEqual(content[0].token, content[0].top_logprobs[0].token)

    def test_json_schema(self):
        schema = {'type': 'object', 'properties': {'color': {'enum': ['red', 'blue']}, 'legs': {'type': 'integer', 'maximum': 8, 'minimum': 0}},
                  'required': ['color', 'legs'], 'additionalProperties': False}
        answer = self.chat(max_tokens=100, response_format={'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema, 'strict': True}})
        self.assertEqual(set(json.loads(answer.choices[0].message.content)), {'color', 'legs'})
        anything = self.chat(max_tokens=300, response_format={'type': 'json_object'})
        if anything.choices[0].finish_reason == 'stop':
            self.assertIsInstance(json.loads(anything.choices[0].message.content), dict)

    def test_tools(self):
        tools = [{'type': 'function', 'function': {'name': 'swim', 'parameters': {
            'type': 'object', 'properties': {'meters': {'type': 'integer', 'minimum': 0, 'maximum': 100}}, 'required': ['meters']}}}]
        choice = self.chat(tools=tools, tool_choice='required', max_tokens=100).choices[0]
        self.assertEqual(choice.finish_reason, 'tool_calls')
        self.assertIn('meters', json.loads(choice.message.tool_calls[0].function.arguments))

    def test_errors_are_its_exception_classes(self):
        with self.assertRaises(openai.BadRequestError):
            self.chat(max_tokens=-1)
        with self.assertRaises(openai.NotFoundError):
            self.client.chat.completions.create(model='gpt-4', messages=CHAT)
        with self.assertRaises(openai.AuthenticationError):
            self.client.with_options(api_key='sk-wrong-key').models.list()

    def test_stream_that_is_closed_is_cancelled(self):
        stream = self.chat(stream=True, max_tokens=400, extra_body={'ignore_eos': True})
        next(iter(stream))
        stream.close()
        good = {'Authorization': 'Bearer sk-test-key-0001'}
        harness.wait_until(lambda: json.loads(self.server.request('GET', '/status', headers=good)[2])['unfinished'] == 0, 20, 'the cancel')

    def test_models(self):
        self.assertEqual([m.id for m in self.client.models.list()], ['fish'])


if __name__ == '__main__':
    if openai is None and not os.environ.get('SHOAL_IN_VENV'):
        python = VENV / 'bin' / 'python'
        steps = [[sys.executable, '-m', 'venv', str(VENV)], [str(python), '-m', 'pip', 'install', '-q', PACKAGE]]
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                print(f'SKIPPED: {" ".join(step)} failed; PyPI is needed for the openai package\n{done.stderr[-1000:]}')
                sys.exit(harness.SKIPPED)
        os.execve(str(python), [str(python), *sys.argv], {**os.environ, 'SHOAL_IN_VENV': '1'})
    harness.main()
