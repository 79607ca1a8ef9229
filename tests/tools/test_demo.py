"""What the demo shows is what a user can type."""

import shlex
import sys

from tools import demo


def test_commands_are_shown_whole(capfd):
    """Lists in brackets are none of rich's tags, and the launcher has the name that users know."""
    command = (*demo.LAUNCHER, "--help", "tasks.caption.data.shards=[a b/train]")
    assert demo.start(*command).wait() == 0
    shown = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("$ "))
    assert shlex.split(shown)[1:] == ["deepspeed", *command[3:]]
    demo.start(sys.executable, "-c", "pass").wait()
    assert shlex.split(capfd.readouterr().out)[-2:] == ["-c", "pass"]
    demo.real("a=[b/c]")
    assert "a=[b/c]" in capfd.readouterr().out
