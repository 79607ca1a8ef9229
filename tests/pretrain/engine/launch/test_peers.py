"""A rank that was killed is named with the signal, by its peers."""

import os
import signal
import time

import pytest

from pretrain.engine.launch.peers import Place, ended_peers, own_place, speaks_of_a_peer


@pytest.fixture
def child():
    pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    yield pid
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_who_ended_and_how(child):
    me = own_place()
    places = [me, Place(me.host, child), Place("elsewhere", 1)]
    assert ended_peers(places, 0, patience_s=0.0) == []
    os.kill(child, signal.SIGKILL)
    assert ended_peers(places, 0) == [f"rank 1 (process {child}) was ended by SIGKILL"]
    os.waitpid(child, 0)  # its launcher has taken note
    assert ended_peers(places, 0) == [f"rank 1 (process {child}) is gone"]


def test_an_exit_code_is_named(child):
    pid = os.fork()
    if not pid:
        os._exit(3)
    me = own_place()
    assert ended_peers([me, Place(me.host, pid)], 0) == [
        f"rank 1 (process {pid}) ended with exit code 3"
    ]
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("text", "echo"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3412", True),
        ("Broken pipe", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_that_may_be_an_echo(text, echo):
    assert speaks_of_a_peer(RuntimeError(text)) == echo
    assert not speaks_of_a_peer(ValueError(text))
