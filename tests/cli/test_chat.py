"""A conversation is remembered, a stopped answer does not end the program, each side has its own memory."""

import io
import os
import pty
import select
import subprocess
import sys
import textwrap
import time

import pytest

from lorasmith.cli.answering import Side
from lorasmith.cli.chat import HELP, talk
from lorasmith.data.example import Message
from lorasmith.errors import OverlongError
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.generation.stream import Piece


class EchoChat:
    """Answers "<number of messages>:<question>" in two pieces, and remembers what it was asked."""

    def __init__(self, name="echo"):
        self.name = name
        self.asked = []

    def stream(self, question, **kwargs):
        self.asked.append((tuple(question), kwargs))
        if question[-1].content == "too long":
            raise OverlongError("The question has 600 tokens.")
        if question[-1].content == "silence":
            return iter([Piece("", (2,), "stop", 1.0)])
        pieces = [f"{len(question)}:", question[-1].content]
        return iter([Piece(pieces[0], (1,), None, 1.0), Piece(pieces[1], (2,), "stop", 1.0)])


def run_talk(lines, *chats, **kwargs):
    """Feed ``lines`` (exceptions are raised) and return what was written."""
    feed = iter([*lines, EOFError])
    out = io.StringIO()

    def read_line():
        line = next(feed)
        if not isinstance(line, str):
            raise line
        return line

    sides = [Side(chat.name, chat) for chat in chats]
    talk(sides, SamplingSettings(), read_line=read_line, out=out, **kwargs)
    return out.getvalue()


def test_a_conversation_is_remembered_and_reset():
    chat = EchoChat()
    out = run_talk(["one", "", "two", "/reset", "three"], chat)
    assert out == "1:one\n3:two\n1:three\n\n"
    assert chat.asked[1][0] == (Message("user", "one"), Message("assistant", "1:one"), Message("user", "two"))


def test_each_side_has_its_own_memory():
    first, second = EchoChat("untuned"), EchoChat("tuned")
    out = run_talk(["one", "two"], first, second)
    assert out == "[untuned]\n1:one\n[tuned]\n1:one\n[untuned]\n3:two\n[tuned]\n3:two\n\n"


def test_the_settings_reach_every_turn():
    chat = EchoChat()
    run_talk(["one"], chat, system="A pirate.", override_system=True)
    assert chat.asked[0][1] == {
        "sampling": SamplingSettings(),
        "system": "A pirate.",
        "override_system": True,
    }


@pytest.mark.parametrize("leave", ["/exit", "/quit"])
def test_commands(leave, capsys):
    chat = EchoChat()
    out = run_talk(["/help", "/nosuch", leave, "never"], chat)
    assert out == HELP + "\n"
    assert "no command /nosuch" in capsys.readouterr().err
    assert chat.asked == []


def test_a_question_may_begin_with_a_path():
    chat = EchoChat()
    run_talk(["/etc/hosts is what?", "/tmp/a"], chat)
    assert len(chat.asked) == 2


def test_ctrl_c_twice_in_a_row_at_the_prompt_leaves():
    chat = EchoChat()
    run_talk([KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "never"], chat)
    assert [question[-1].content for question, _ in chat.asked] == ["one"]


def test_a_turn_that_fails_or_says_nothing_is_not_remembered(capsys):
    chat = EchoChat()
    assert run_talk(["one", "too long", "silence", "two"], chat) == "1:one\n\n3:two\n\n"
    error = capsys.readouterr().err
    assert "600 tokens" in error
    assert "/reset" in error
    assert "ended its answer at once" in error


PROGRAM = textwrap.dedent("""
    import sys, time
    from lorasmith.cli.answering import Side
    from lorasmith.cli.chat import talk
    from lorasmith.generation.sampling import SamplingSettings
    from lorasmith.generation.stream import Piece

    class Slow:
        name = "slow"
        def stream(self, question, **_):
            if len(question) > 1:
                yield Piece("heard " + question[-2].content[:4] + ".", (1,), "stop", 1.0)
            for _ in range(600):
                yield Piece("tick ", (1,), None, 1.0)
                time.sleep(0.05)

    talk([Side("slow", Slow())], SamplingSettings(), read_line=lambda: input("> "), out=sys.stdout)
    print("left in peace")
""")


def test_ctrl_c_in_a_terminal_stops_the_answer_and_then_the_program():
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=_own_the_terminal,
    )
    os.close(slave)
    screen = Screen(master)
    try:
        screen.wait_for("> ")
        os.write(master, b"hello\n")
        screen.wait_for("tick tick ")
        os.write(master, b"\x03")
        screen.wait_for("(stopped)")
        screen.wait_for_prompt()
        screen.press_ctrl_c_until("(Ctrl-C again leaves)")
        os.write(master, b"and now\n")
        screen.wait_for("heard tick.")
        os.write(master, b"\x03")
        screen.wait_for_prompt()
        screen.press_ctrl_c_until("(Ctrl-C again leaves)")
        screen.wait_for_prompt()
        screen.press_ctrl_c_until("left in peace")
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        child.wait()
        os.close(master)


def _own_the_terminal():
    import fcntl
    import signal
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run started with & hands down that it is ignored


class Screen:
    """What the child has written, read as far as it was waited for."""

    def __init__(self, master):
        self._master = master
        self._unread = ""

    def wait_for(self, text, seconds=60):
        end = time.monotonic() + seconds
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} within {seconds} s; the screen shows {self._unread!r}"
            self._unread += os.read(self._master, 4096).decode(errors="replace")
        self._unread = self._unread.split(text, 1)[1]

    def press_ctrl_c_until(self, text):
        """Press Ctrl-C at the prompt; again if it was lost, as input() loses one just before it reads."""
        for _ in range(4):
            os.write(self._master, b"\x03")
            end = time.monotonic() + 8
            while text not in self._unread and time.monotonic() < end:
                ready, _, _ = select.select([self._master], [], [], 0.5)
                if ready:
                    self._unread += os.read(self._master, 4096).decode(errors="replace")
            if text in self._unread:
                break
        self.wait_for(text, seconds=1)

    def wait_for_prompt(self):
        """Wait until the child reads: input() loses a Ctrl-C that falls between its prompt and its read."""
        self.wait_for("> ")
        time.sleep(0.5)
