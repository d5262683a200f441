"""shoal.v1.Coordinator over gRPC, with a plain Python client: streams, cancel, deadlines, health, reflection, keys."""
import http.client
import importlib
import json
import pathlib
import socket
import ssl
import subprocess
import sys
import tempfile

import grpc

import harness
import serve_harness

PROTO = harness.ROOT / 'launcher' / 'proto' / 'coordinator.proto'


def load_messages(folder):
    subprocess.run(['protoc', f'--proto_path={PROTO.parent}', f'--python_out={folder}', PROTO.name], check=True)
    sys.path.insert(0, str(folder))
    return importlib.import_module('coordinator_pb2')


class Client:
    def __init__(self, server, pb, key=None, credentials=None):
        address = '127.0.0.1:' + next(line for line in server.lines if 'gRPC on' in line).split()[-1]
        self.channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
        self.pb = pb
        self.metadata = [('authorization', f'Bearer {key}')] if key else None

    def unary(self, method, request, response, **kwargs):
        call = self.channel.unary_unary(f'/shoal.v1.Coordinator/{method}', request_serializer=lambda m: m.SerializeToString(),
                                        response_deserializer=response.FromString)
        return call(request, metadata=self.metadata, timeout=60, **kwargs)

    def stream(self, method, request, response, timeout=60):
        call = self.channel.unary_stream(f'/shoal.v1.Coordinator/{method}', request_serializer=lambda m: m.SerializeToString(),
                                         response_deserializer=response.FromString)
        return call(request, metadata=self.metadata, timeout=timeout)

    def generate(self, timeout=60, **fields):
        return self.stream('Generate', self.pb.GenerateRequest(**fields), self.pb.GenerateResponse, timeout)

    def raw(self, path, data):
        return self.channel.unary_unary(path)(data, timeout=20)


class GrpcTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.pb = load_messages(folder.name)
        cls.server = serve_harness.Server('--grpc-reflection', '--parallel', 2)
        cls.addClassCleanup(cls.server.kill)
        cls.client = Client(cls.server, cls.pb)

    def greedy(self):
        return self.pb.SamplingParams(temperature=0)

    def test_generate_equals_http(self):
        answers = list(self.client.generate(prompt='Once upon a time', max_tokens=24, sampling=self.greedy(), logprobs=True))
        text = ''.join(a.text for a in answers)
        self.assertEqual(text, self.server.complete('Once upon a time', max_tokens=24))
        last = answers[-1]
        self.assertEqual(last.usage.completion_tokens, sum(len(a.tokens) for a in answers))
        self.assertIn(last.finish_reason, ('stop', 'length'))
        self.assertTrue(all(t.logprob <= 0 for a in answers for t in a.tokens))

    def test_chat_and_schema(self):
        chat = self.pb.Chat(messages=[self.pb.Message(role='user', content='Hello')])
        text = ''.join(a.text for a in self.client.generate(chat=chat, max_tokens=60, json_schema='{"enum": ["yes", "no"]}'))
        self.assertIn(json.loads(text), ('yes', 'no'))

    def test_cancel_by_call_by_id_and_by_deadline(self):
        call = self.client.generate(prompt='a', max_tokens=450, ignore_eos=True)
        next(call)
        call.cancel()
        other = self.client.generate(prompt='b', max_tokens=450, ignore_eos=True)
        first = next(other)
        answer = self.client.unary('Cancel', self.pb.CancelRequest(id=first.id), self.pb.CancelResponse)
        self.assertTrue(answer.found)
        with self.assertRaises(grpc.RpcError) as caught:
            list(other)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.CANCELLED)
        self.assertFalse(self.client.unary('Cancel', self.pb.CancelRequest(id='gen-0'), self.pb.CancelResponse).found)
        with self.assertRaises(grpc.RpcError) as caught:
            for _ in range(50):  # however fast the machine
                list(self.client.generate(prompt='c', max_tokens=480, ignore_eos=True, timeout=0.05))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        harness.wait_until(lambda: self.server.status()['unfinished'] == 0, 20, 'all to end')

    def test_errors(self):
        for fields in ({}, {'prompt': 'a', 'sampling': self.pb.SamplingParams(temperature=-1)}, {'tokens': self.pb.TokenIds(ids=[-4])},
                       {'prompt': 'a', 'json_schema': '{'}, {'prompt': 'fish ' * 3000}):
            with self.subTest(fields=str(fields)[:60]), self.assertRaises(grpc.RpcError) as caught:
                list(self.client.generate(**fields))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT, fields)

    def test_tokens_models_status(self):
        ids = self.client.unary('Tokenize', self.pb.TokenizeRequest(text='A fish'), self.pb.TokenizeResponse).ids
        text = self.client.unary('Detokenize', self.pb.DetokenizeRequest(ids=ids), self.pb.DetokenizeResponse).text
        self.assertEqual(text.strip(), 'A fish')
        self.assertEqual(list(self.client.unary('ListModels', self.pb.ListModelsRequest(), self.pb.ListModelsResponse).models), ['demo'])
        watch = self.client.stream('ClusterStatus', self.pb.ClusterStatusRequest(watch=True, interval_ms=100), self.pb.ClusterStatusResponse)
        states = [next(watch) for _ in range(3)]
        watch.cancel()
        self.assertEqual({s.state for s in states}, {'ready'})
        self.assertEqual(len(states[0].ranks), 1)
        self.assertEqual(len(list(self.client.stream('ClusterStatus', self.pb.ClusterStatusRequest(), self.pb.ClusterStatusResponse))), 1)

    def test_health_and_reflection(self):
        self.assertEqual(self.client.raw('/grpc.health.v1.Health/Check', b''), b'\x08\x01')  # SERVING
        call = self.client.channel.stream_stream('/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo')
        listing = next(call(iter([b'\x3a\x01*']), timeout=20))  # list_services
        self.assertIn(b'shoal.v1.Coordinator', listing)
        self.assertIn(b'inference.GRPCInferenceService', listing)

    def test_kserve(self):
        def ask(method, data=b''):
            return self.client.raw(f'/inference.GRPCInferenceService/{method}', data)

        def name(model):
            return b'\x0a' + bytes([len(model)]) + model

        for method in ('ServerLive', 'ServerReady'):
            self.assertEqual(ask(method), b'\x08\x01')
        self.assertEqual(ask('ModelReady', name(b'demo')), b'\x08\x01')
        self.assertTrue(ask('ServerMetadata').startswith(name(b'shoal')))
        metadata = ask('ModelMetadata', name(b'demo'))
        self.assertTrue(metadata.startswith(name(b'demo')))
        for part in (b'text_input', b'text_output', b'BYTES'):
            self.assertIn(part, metadata)
        for method in ('ModelReady', 'ModelMetadata'):
            with self.assertRaises(grpc.RpcError) as caught:
                ask(method, name(b'other'))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)


class GrpcKeysTest(harness.TestCase):
    def test_key_and_shutdown(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        pb = load_messages(folder.name)
        keys = self.scratch / 'keys'
        keys.write_text('sk-grpc-key-01\n')
        server = serve_harness.Server('--api-key-file', keys, ready=False)
        self.addCleanup(server.kill)
        good, bad = Client(server, pb, 'sk-grpc-key-01'), Client(server, pb, 'sk-grpc-key-02')
        harness.wait_until(lambda: good.raw('/grpc.health.v1.Health/Check', b'') == b'\x08\x01', 60, 'ready')
        for call in (lambda: list(bad.generate(prompt='a')),
                     lambda: bad.unary('Tokenize', pb.TokenizeRequest(text='a'), pb.TokenizeResponse),
                     lambda: bad.raw('/inference.GRPCInferenceService/ServerReady', b''),
                     lambda: bad.raw('/inference.GRPCInferenceService/ModelMetadata', b'')):
            with self.assertRaises(grpc.RpcError) as caught:
                call()
            self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAUTHENTICATED)
        self.assertEqual(bad.raw('/inference.GRPCInferenceService/ServerLive', b''), b'\x08\x01')
        self.assertTrue(list(good.generate(prompt='a', max_tokens=2)))
        watch = good.stream('ClusterStatus', pb.ClusterStatusRequest(watch=True), pb.ClusterStatusResponse)
        next(watch)
        self.assertEqual(server.stop(), 0)


def make_certificates(folder):
    """PEM files: a CA, certificates of it for a server on 127.0.0.1 and for a client, and a client's of another CA."""
    def openssl(*args):
        subprocess.run(['openssl', *map(str, args)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    new = ('-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', 2)
    for ca in ('ca', 'other-ca'):
        openssl('req', '-x509', *new, '-subj', f'/CN={ca}', '-keyout', folder / f'{ca}.key', '-out', folder / f'{ca}.pem')
    (folder / 'san').write_text('subjectAltName=IP:127.0.0.1,DNS:localhost\n')
    for name, ca in (('server', 'ca'), ('client', 'ca'), ('stranger', 'other-ca')):
        openssl('req', *new, '-subj', f'/CN={name}', '-keyout', folder / f'{name}.key', '-out', folder / f'{name}.csr')
        openssl('x509', '-req', '-in', folder / f'{name}.csr', '-CA', folder / f'{ca}.pem', '-CAkey', folder / f'{ca}.key',
                '-set_serial', 7, '-days', 2, '-extfile', folder / 'san', '-out', folder / f'{name}.pem')


class TlsTest(harness.TestCase):
    def test_https_and_mutual_tls(self):
        make_certificates(self.scratch)
        pem = lambda name: (self.scratch / name).read_bytes()
        server = serve_harness.Server('--tls-cert', self.scratch / 'server.pem', '--tls-key', self.scratch / 'server.key',
                                      '--grpc-client-ca', self.scratch / 'ca.pem', ready=False)
        self.addCleanup(server.kill)
        pb = load_messages(self.scratch)
        check = '/grpc.health.v1.Health/Check'

        def client(name):
            pair = {'private_key': pem(f'{name}.key'), 'certificate_chain': pem(f'{name}.pem')} if name else {}
            return Client(server, pb, credentials=grpc.ssl_channel_credentials(pem('ca.pem'), **pair))

        known = client('client')
        harness.wait_until(lambda: known.raw(check, b'') == b'\x08\x01', 60, 'ready')
        text = ''.join(a.text for a in known.generate(prompt='Once', max_tokens=8, sampling=pb.SamplingParams(temperature=0)))
        self.assertNotEqual(text, '')
        for wrong in (client(None), client('stranger'), Client(server, pb)):
            with self.assertRaises(grpc.RpcError) as caught:
                wrong.raw(check, b'')
            self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
        # HTTP asks for no certificate, and speaks no plain text.
        trust = ssl.create_default_context(cafile=str(self.scratch / 'ca.pem'))
        https = http.client.HTTPSConnection('127.0.0.1', server.port, timeout=60, context=trust)
        self.addCleanup(https.close)
        https.request('POST', '/v1/completions', json.dumps({'prompt': 'Once', 'max_tokens': 8, 'temperature': 0}),
                      {'Content-Type': 'application/json'})
        self.assertEqual(json.loads(https.getresponse().read())['choices'][0]['text'], text)
        with self.assertRaises((OSError, http.client.HTTPException)):
            server.request('GET', '/health/live')
        self.assertEqual(server.stop(), 0)


class GrpcPortTest(harness.TestCase):
    def test_taken_ports(self):
        """The default gRPC port being taken costs gRPC; a port that was asked for is had or refused."""
        port = harness.reserve_ports(2)
        with socket.create_server(('127.0.0.1', port + 1)):
            server = serve_harness.Server(port=port)
            self.addCleanup(server.kill)
            self.assertIn(f'cannot listen for gRPC on 127.0.0.1 port {port + 1}', server.log())
            self.assertNotIn('shoal: gRPC on', server.log())
            self.assertNotEqual(server.complete('Once', max_tokens=4), '')
            result = harness.shoal('serve', '--port', 0, '--grpc-port', port + 1)
            self.assertEqual(result.code, harness.UNAVAILABLE, str(result))
            self.assertIn('choose another with --grpc-port', result.err)
            result = harness.shoal('serve', '--port', port)
            self.assertEqual(result.code, harness.UNAVAILABLE, str(result))
            self.assertIn('choose another with --port', result.err)


if __name__ == '__main__':
    harness.main()
