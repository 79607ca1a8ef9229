"""Ranges over HTTP: cut, refused, redirected, slow or changed; what heals changes no byte."""

import email.utils
import multiprocessing
import os
import socket
import threading
import time
from base64 import b64decode

import numpy as np
import pytest

from data_pipeline.storage import http_connections
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.http_storage import HttpStorage
from data_pipeline.storage.limits import HostLimits
from data_pipeline.storage.remote import RemoteSettings, UrlStorage
from data_pipeline.storage.retry import RetryPolicy
from data_pipeline.storage.storage import FileState, TransientReadError
from tests.data_pipeline.storage.faulty_server import (
    FaultyServer,
    compressed,
    dropped,
    shifted,
    short,
    slow,
    status,
    whole,
)

CONTENT = np.random.default_rng(3).bytes(3_000_000)


@pytest.fixture(autouse=True)
def no_proxies_and_no_netrc(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    http_connections._from_netrc.cache_clear()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "x.tar").write_bytes(CONTENT)
    (tmp_path / "www" / "empty.tar").write_bytes(b"")
    with FaultyServer(tmp_path / "www") as server:
        yield server


def storage(deadline_s=20.0, timeout_s=5.0, **limits) -> HttpStorage:
    return HttpStorage(RetryPolicy(deadline_s, timeout_s, 0.01, 0.05), HostLimits(**limits))


def test_ranges_over_one_connection(server):
    http = storage()
    url = server.url + "/x.tar"
    state = http.state(url)
    assert state.size == len(CONTENT) and state.version
    for begin, end in ((0, 1), (5, 5), (0, len(CONTENT)), (2_999_999, 3_000_000), (7, 1_500_000)):
        assert http.read(url, begin, end, state) == CONTENT[begin:end]
    pieces = list(http.chunks(url, 10, len(CONTENT)))
    assert b"".join(pieces) == CONTENT[10:] and max(map(len, pieces)) <= 1 << 20
    assert http.state(server.url + "/empty.tar").size == 0
    assert server.connections == 1 and http.retries == 0
    http.close()


@pytest.mark.parametrize(
    "fault",
    [
        status(408),
        status(429),
        status(500),
        status(502),
        status(503),
        status(504),
        dropped,
        short,
        shifted,
        whole,
        slow(1.0),
        status(403),
        status(503, Retry_After="0"),
    ],
)
def test_faults_that_heal_change_nothing(server, fault):
    # Where silence is no fault, only a hang counts as one.
    http = storage(timeout_s=0.3 if fault.__qualname__.startswith("slow") else 5.0)
    url = server.url + "/x.tar"
    state = http.state(url)
    server.faults.extend([fault, fault])
    assert http.read(url, 1000, 2_900_000, state) == CONTENT[1000:2_900_000]
    # A connection that was open already may have been closed by the server for its age: asking
    # again over a new one is no retry.
    assert http.retries == (1 if fault is dropped else 2)
    server.faults.append(fault)
    assert http.state(url) == state


def test_reading_goes_on_at_the_byte_where_it_was_cut(server):
    server.faults.extend([short, short, dropped])
    assert storage().read(server.url + "/x.tar", 0, 2_000_000) == CONTENT[:2_000_000]
    begins = [int(span.removeprefix("bytes=").split("-")[0]) for _, span in server.asked]
    assert begins == [0, 1_000_000, 1_500_000, 1_500_000]


def test_retry_after_is_honoured(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    soon = email.utils.formatdate(time.time() + 12, usegmt=True)
    server.faults.extend([status(429, Retry_After="7"), status(503, Retry_After=soon)])
    server.faults.append(status(503, Retry_After="nonsense"))
    assert storage().read(server.url + "/x.tar", 0, 9) == CONTENT[:9]
    waits = [wait for wait in waits if wait]
    assert waits[0] == 7.0 and 10 < waits[1] <= 12 and waits[2] <= 0.05
    server.faults.append(status(429, Retry_After="3600"))
    with pytest.raises(TransientReadError, match=r"x\.tar: HTTP 429 .* asked for 3600 s .*tried 1"):
        storage().read(server.url + "/x.tar", 0, 9)


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        (404, FileNotFoundError, "HTTP 404"),
        (410, FileNotFoundError, "HTTP 410"),
        (400, PermissionError, "HTTP 400"),
        (403, PermissionError, "signature in the URL out of date"),
        (401, PermissionError, r"\.netrc"),
        (416, ShardError, "are not there: truncated or replaced"),
    ],
)
def test_answers_that_will_not_heal(server, code, error, text):
    server.always = status(code)
    http = storage()
    url = f"{server.url}/x.tar?sig=hush"
    with pytest.raises(error, match=text) as caught:
        http.read(url, 0, 9)
    assert f"{server.url}/x.tar" in str(caught.value) and "hush" not in str(caught.value)
    # Refused access is tried a few times, everything else once.
    assert len(server.asked) == (4 if error is PermissionError else 1)
    with pytest.raises(PermissionError if code == 416 else error, match=f"HTTP {code}"):
        http.state(url)
    with pytest.raises(ShardError, match=r"x\.tar\?\.\.\.: is no valid URL"):
        http.read(f"{server.url}x/x.tar?sig=hush", 0, 9)


def test_a_server_that_stays_away_is_given_up_in_time(server):
    server.always = status(503)
    started = time.monotonic()
    with pytest.raises(TransientReadError) as caught:
        storage(deadline_s=0.5).read(f"{server.url}/x.tar?token=hush", 0, 9)
    assert time.monotonic() - started < 60  # patience is five minutes
    text = str(caught.value)
    assert f"{server.url}/x.tar" in text and "HTTP 503" in text and "deadline 0.5 s" in text
    assert "hush" not in text and int(text.split("tried ")[1].split()[0]) > 3
    port = server.server_port
    server.shutdown()
    server.server_close()
    with pytest.raises(TransientReadError, match="ConnectionRefusedError"):
        storage(deadline_s=0.3).read(f"http://127.0.0.1:{port}/x.tar", 0, 9)


def test_a_name_that_no_host_has_is_given_up_soon(server, monkeypatch):
    """But not that of one which has answered: then it is the network that is away."""
    asked, known = [], storage(deadline_s=1.0)
    known.state(server.url + "/x.tar")
    known.close()

    def unknown(host, *args, **options):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    patient = HttpStorage(RetryPolicy(300.0, 5.0, 0.001, 0.01), HostLimits())
    with pytest.raises(TransientReadError, match=r"datta/x\.tar: gaierror.*not known .tried 6"):
        patient.state("http://datta/x.tar")
    assert asked == ["datta"] * 6
    with pytest.raises(TransientReadError, match="deadline 1 s"):
        known.state(server.url + "/x.tar")
    assert len(asked) > 6 + 6


def test_a_server_that_is_down_for_a_while(server, tmp_path):
    http = storage()
    url = server.url + "/x.tar"
    pieces = http.chunks(url, 0, len(CONTENT))
    begin = next(pieces)
    port = server.server_port
    server.always = dropped
    server.shutdown()
    server.server_close()
    started_again = []

    def start_again():
        time.sleep(0.5)
        started_again.append(FaultyServer(tmp_path / "www", port).start())

    threading.Thread(target=start_again).start()
    assert begin + b"".join(pieces) == CONTENT
    # What had been sent before the server went away may have been on its way in full.
    assert http.read(url, 5, 99) == CONTENT[5:99] and started_again
    started_again[0].shutdown()
    started_again[0].server_close()


def tagged(**headers: str):
    """The right answer, with other tags."""

    def fault(request):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request.send_header = lambda name, value: type(request).send_header(
            request, name, names.get(name, value)
        )
        try:
            request.send_file()
        finally:
            del request.send_header

    return fault


@pytest.mark.parametrize(
    "tags",
    [
        [{"ETag": '"0-abc"'}, {"ETag": '"1-abc"'}],
        [{"ETag": '"abc"'}, {"ETag": 'W/"abc"'}],
        [{"ETag": "", "Last_Modified": f"Sun, 13 Sep 2020 12:26:4{n} GMT"} for n in (0, 1)],
    ],
    ids=["etag", "weak", "time"],
)
@pytest.mark.parametrize("begin", [0, 1])
def test_mirrors_with_tags_of_their_own_are_one_file(server, tags, begin, caplog):
    """The sums of the bytes decide, not the tags; one request at a time must be enough."""
    http = HttpStorage(RetryPolicy(first_wait_s=0.01), HostLimits(1, None))
    url = server.url + "/x.tar"
    server.faults += [tagged(**tags[(begin + n) % 2]) for n in range(60)]
    state = http.state(url)
    for at in range(0, 50, 10):
        assert http.read(url, at, at + 10, state) == CONTENT[at : at + 10]
    warned = "two versions in turn" in caplog.text
    assert warned == (tags[0].get("ETag") != '"abc"')


def test_mirrors_that_answer_in_step_or_each_on_its_connection_are_one_file(server, caplog):
    url = server.url + "/x.tar"
    http = storage(requests=1)
    tags = {"ETag": '"a"'}, {"ETag": '"b"'}
    server.faults += [tagged(**tags[n]) for n in [0, *[1] * 20, *[0, 1] * 9]]
    state = http.state(url)
    assert http.read(url, 0, 9, state) == CONTENT[:9] and "two versions in turn" in caplog.text
    caplog.clear()
    server.faults.clear()
    mirrors = {}

    def pinned(request):
        mirror = mirrors.setdefault(request.client_address, len(mirrors) % 2)
        tagged(**tags[mirror])(request)

    server.always = pinned
    http, other = storage(), storage()
    state = other.state(url)
    for at in range(0, 90, 9):
        assert http.read(url, at, at + 9, state) == CONTENT[at : at + 9]
    assert "two versions in turn" in caplog.text


def test_a_file_that_changes_is_named_and_never_mixed(server, tmp_path):
    http = storage()
    url = server.url + "/x.tar"
    state = http.state(url)
    path = tmp_path / "www" / "x.tar"

    def replace(request):
        request.send_file(cut=0.5)
        other = path.with_name("other")
        other.write_bytes(CONTENT[::-1])
        os.utime(other, (1, 1))
        os.replace(other, path)

    server.faults.append(replace)
    with pytest.raises(ShardError, match=r"/x\.tar: was replaced: it has 3000000 bytes and"):
        http.read(url, 0, 2_000_000)
    with pytest.raises(ShardError, match="was replaced"):
        http.read(url, 0, 9, state)
    assert http.read(url, 0, 9, FileState(len(CONTENT), "")) == CONTENT[::-1][:9]
    path.write_bytes(CONTENT[:1000])
    with pytest.raises(ShardError, match=r"it has 1000 bytes .* expected were 3000000"):
        http.read(url, 0, 9, FileState(len(CONTENT), ""))
    with pytest.raises(ShardError, match=r"has 1000 bytes, the bytes 990-1099 are not there"):
        http.read(url, 990, 1100)


def test_servers_that_cannot_do_ranges(server):
    server.always = whole
    http = storage()
    assert http.state(server.url + "/x.tar").size == len(CONTENT)
    assert http.read(server.url + "/x.tar", 0, 500) == CONTENT[:500]
    with pytest.raises(ShardError, match="does not answer byte ranges"):
        http.read(server.url + "/x.tar", 1, 500)
    server.always = compressed
    with pytest.raises(ShardError, match=r"sends it compressed \(gzip\)"):
        http.read(server.url + "/x.tar", 1, 500)


def test_redirects(server):
    url = server.url + "/old.tar"
    server.of = "old.tar"
    server.always = status(302, Location="/x.tar")
    assert storage().read(url, 3, 9) == CONTENT[3:9]
    server.always = status(302, Location="/old.tar")
    with pytest.raises(ShardError, match="more than 5 redirects"):
        storage().read(url, 3, 9)
    server.always = status(302, Location="ftp://elsewhere/x.tar")
    with pytest.raises(ShardError, match=r"redirected to ftp://elsewhere/x.tar"):
        storage().read(url, 3, 9)


def test_credentials_and_proxies_of_the_environment(server, tmp_path, monkeypatch):
    seen = []

    def look(request):
        seen.append(
            (
                request.path,
                request.headers.get("Authorization"),
                request.headers.get("Proxy-Authorization"),
            )
        )
        request.send_file()

    server.always = look
    assert storage().read(server.url + "/x.tar", 0, 3) == CONTENT[:3]
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password secret\n")
    http_connections._from_netrc.cache_clear()
    assert storage().read(server.url + "/x.tar", 0, 3) == CONTENT[:3]
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//bob:pass@"))
    assert storage().read("http://data.example/x.tar?a=1", 0, 3) == CONTENT[:3]
    basic = "Basic YW5uOnNlY3JldA=="
    assert seen == [
        ("/x.tar", None, None),
        ("/x.tar", basic, None),
        ("http://data.example/x.tar?a=1", None, "Basic Ym9iOnBhc3M="),
    ]


def test_a_password_of_any_letters(server, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password gr\u00fcn\n", "utf-8")
    seen = []

    def look(request):
        seen.append(b64decode(request.headers["Authorization"].split()[1]).decode("utf-8"))
        request.send_file()

    server.always = look
    assert storage().read(server.url + "/x.tar", 0, 3) == CONTENT[:3]
    assert storage().read(server.url.replace("//", "//bob:a%40b@") + "/x.tar", 0, 3) == CONTENT[:3]
    assert seen == ["ann:gr\u00fcn", "bob:a@b"]


def test_what_stands_in_a_url_is_sent_as_it_is_escaped_or_not(server):
    def look(request):
        seen.append(request.path)
        request.path = "/x.tar"
        request.send_file()

    server.always, server.of = look, ""
    for written, sent in [
        ("/a b/100%.tar?sig=a%2fb&x=c d", "/a%20b/100%25.tar?sig=a%2Fb&x=c%20d"),
        ("/a%20b/\u00e4.tar?q=50%&r=%C3", "/a%20b/%C3%A4.tar?q=50%25&r=%C3"),
        ("?list=1", "/?list=1"),
    ]:
        seen = []
        storage().read(server.url + written, 0, 3)
        assert seen == [sent]


def test_a_proxy_that_is_none_or_away_is_named(server, monkeypatch):
    for proxy in ("socks5://127.0.0.1:1080", "http://127.0.0.1:80a"):
        monkeypatch.setenv("http_proxy", proxy.replace("//", "//ann:hush@"))
        with pytest.raises(PermissionError, match=f"{proxy}, is none .* unset http_proxy"):
            storage().read("http://data.example/x.tar", 0, 3)
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    with pytest.raises(TransientReadError, match="no connection to the proxy of the environment"):
        storage().read("http://data.example/x.tar", 0, 3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert storage().read(server.url + "/x.tar", 0, 3) == CONTENT[:3]


def test_at_most_so_many_requests_at_a_time(server):
    server.delay_s = 0.05
    http = storage(requests=3)
    threads = [
        threading.Thread(target=http.read, args=(server.url + "/x.tar", n, n + 1000))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.busiest == 3 and server.connections == 3 and len(server.asked) == 12


def test_bytes_per_second(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    http = storage(bytes_per_s=1e6)
    http.read(server.url + "/x.tar", 0, 2_000_000)
    # Nobody slept in fact: the last piece has to wait for all that came before it.
    assert 1.5 < max(waits) <= 2.0


def read_in_another_process(url_storage, url, queue):
    queue.put(url_storage.read(url, 100, 200) == CONTENT[100:200])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_processes_have_connections_of_their_own(server, method):
    url = server.url + "/x.tar"
    shared = UrlStorage(RemoteSettings(retry_deadline_s=5))
    assert shared.read(url, 0, 9) == CONTENT[:9]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [
        context.Process(target=read_in_another_process, args=(shared, url, queue)) for _ in "12"
    ]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [True, True]
    for worker in workers:
        worker.join()
    assert shared.read(url, 9, 19) == CONTENT[9:19] and shared.retries == 0
    assert server.connections == 3
