"""https: whom a certificate is accepted from, and what an unacceptable one leads to."""

import contextlib
import socket
import socketserver
import ssl
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.remote import RemoteSettings, UrlStorage
from data_pipeline.storage.storage import TransientReadError
from tests.data_pipeline.loader.test_loader import contents, loader
from tests.data_pipeline.photos import pack
from tests.data_pipeline.small_shards import sample, write_shards
from tests.data_pipeline.storage.faulty_server import FaultyServer, dropped, short, status

# Signed for 127.0.0.1 until 2126.
FILES = Path(__file__).with_name("tls")
SETTINGS = RemoteSettings(retry_first_wait_s=0.01, retry_longest_wait_s=0.05, retry_deadline_s=30)


class TlsServer(FaultyServer):
    """A FaultyServer that speaks https."""

    def __init__(self, folder):
        super().__init__(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(FILES / "test_server_and_its_public_key.pem")
        # The handshake belongs to the thread of the connection, not to the one that accepts.
        self.socket = context.wrap_socket(
            self.socket, server_side=True, do_handshake_on_connect=False
        )

    @property
    def url(self):
        return super().url.replace("http:", "https:")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    yield


@pytest.fixture
def trusted(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(FILES / "test_authority.pem"))


def test_shards_over_https_with_an_authority_of_ones_own(tmp_path, trusted):
    local = write_shards(tmp_path / "www", 30, 10)
    with TlsServer(tmp_path / "www") as server:
        opened = ShardSet.open(server.url, SETTINGS)
        assert opened.fingerprint == local.fingerprint
        server.faults.extend([dropped, short, status(503)])
        reader = SampleReader(opened)
        assert [reader.read(row).members for row in range(30)] == [sample(n)[1] for n in range(30)]
        assert not server.faults and opened.storage.retries


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_of_workers_over_https_equal_the_local_ones(tmp_path, trusted):
    expected = contents(loader(pack(tmp_path / "www", 40), workers=0))
    with TlsServer(tmp_path / "www") as server:
        assert contents(loader(ShardSet.open(server.url, SETTINGS), workers=2)) == expected


class Tunnel(socketserver.ThreadingTCPServer):
    """A proxy that connects to whatever it is asked for, and keeps what it was asked."""

    allow_reuse_address = daemon_threads = True

    class RequestHandlerClass(socketserver.StreamRequestHandler):
        def handle(self):
            head = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
            self.server.asked.append(head)
            host, _, port = head.split()[1].rpartition(":")
            with socket.create_connection((host, int(port))) as there:
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=self._pass, args=(there, self.connection))
                back.start()
                self._pass(self.connection, there)
                back.join()

        @staticmethod
        def _pass(source, target):
            with contextlib.suppress(OSError):  # one side may have gone first
                while piece := source.recv(1 << 16):
                    target.sendall(piece)
                target.shutdown(socket.SHUT_WR)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.asked = []


def test_https_goes_through_a_proxy_that_sees_neither_paths_nor_credentials(
    tmp_path, trusted, monkeypatch
):
    write_shards(tmp_path / "www", 4, 2)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password secret\n", "utf-8")
    with TlsServer(tmp_path / "www") as server, Tunnel() as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("https_proxy", f"http://bob:pass@127.0.0.1:{proxy.server_address[1]}")
        storage = UrlStorage(RemoteSettings())
        expected = (tmp_path / "www" / "train-000000.tar").read_bytes()
        for begin in (0, 512):
            found = storage.read(server.url + "/train-000000.tar", begin, 600)
            assert found == expected[begin:600]
        storage._storage(server.url).close()
        proxy.shutdown()
    (asked,) = proxy.asked  # one connection serves both
    assert asked.startswith(f"CONNECT {server.url.removeprefix('https://')} HTTP/1.")
    assert "proxy-authorization: basic ym9iOnBhc3M=".lower() in asked.lower()
    assert "\nauthorization" not in asked.lower() and "train" not in asked


def test_an_unknown_authority_is_refused_at_once(tmp_path):
    write_shards(tmp_path / "www", 4, 2)
    with TlsServer(tmp_path / "www") as server:
        started = time.monotonic()
        host = server.url.removeprefix("https://")
        text = (
            rf"{host}/.*: the certificate of {host} is not accepted \(unable to get local issuer "
            r"certificate\).*SSL_CERT_FILE=FILE"
        )
        for specs in (server.url, server.url + "/train-000000.tar"):
            with pytest.raises(PermissionError, match=text):
                ShardSet.open(specs, RemoteSettings())
        storage = UrlStorage(RemoteSettings())
        with pytest.raises(PermissionError, match=text):
            storage.read(server.url + "/train-000000.tar", 0, 9)
        assert storage.retries == 0 and not server.asked
        assert time.monotonic() - started < 60  # patience is five minutes


def test_a_certificate_that_turns_bad_ends_a_run(tmp_path, trusted, monkeypatch):
    write_shards(tmp_path / "www", 4, 2)
    with TlsServer(tmp_path / "www") as server:
        opened = ShardSet.open(server.url, RemoteSettings())
        monkeypatch.delenv("SSL_CERT_FILE")
        fresh = ShardSet(opened.shards, storage=UrlStorage(RemoteSettings()))
        with pytest.raises(TransientReadError, match="is not accepted"):
            SampleReader(fresh).read(0)


def test_a_certificate_for_another_host(tmp_path, trusted):
    write_shards(tmp_path / "www", 4, 2)
    with TlsServer(tmp_path / "www") as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with pytest.raises(PermissionError, match=r"not accepted \(Hostname mismatch.*'localhost'"):
            ShardSet.open(url, RemoteSettings())


class HangsUp(TlsServer):
    """Ends its first connections in the midst of the handshake."""

    times = 7

    def get_request(self):
        connection, address = super().get_request()
        if self.times == 0:
            return connection, address
        self.times -= 1
        with socket.socket(fileno=connection.detach()) as plain:
            plain.recv(1 << 16)
        raise OSError("hung up")


def test_a_handshake_that_is_cut_is_no_refusal(tmp_path, trusted):
    write_shards(tmp_path / "www", 4, 2)
    with HangsUp(tmp_path / "www") as server:
        storage = UrlStorage(SETTINGS)
        assert storage.read(server.url + "/manifest.json", 0, 1) == b"{"
        assert storage.retries == 7


def test_a_server_that_does_not_speak_https(tmp_path):
    with FaultyServer(tmp_path) as server:
        storage = UrlStorage(SETTINGS)
        url = server.url.replace("http:", "https:")
        with pytest.raises(PermissionError, match=r"/x\.tar: no https with 127\.0\.0\.1:\d+: "):
            storage.state(url + "/x.tar")
        assert storage.retries == 3
