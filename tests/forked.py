"""Python processes as forks of the test's own: importing torch and transformers anew takes most of a short one's time.

What such a process is started with (arguments, environment, pipes, session) and its exit code are those of a process
started by `subprocess`. What a test is to show of the start itself, it shows on a real one.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest


def fork_from(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Lets `module`, which imports `subprocess`, start its Python processes as forks."""
    patch.setattr(module, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Forked}))


class Forked:
    """As `subprocess.Popen` of `python -m MODULE ...` or `python SCRIPT ...`, with a pipe as standard input."""

    def __init__(self, args, *, stdin, stdout, stderr, env, cwd=None, pass_fds=(), start_new_session=False):
        assert (args[0], stdin, stderr) == (sys.executable, subprocess.PIPE, subprocess.STDOUT)
        words = [os.fspath(word) for word in args[1:] if word != "-P"]
        theirs, ours = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.args, self.returncode = args, None
        self.pid = os.fork()
        if self.pid == 0:
            end(lambda: _become(words, theirs, stdout.fileno(), env, cwd, pass_fds, start_new_session))
        os.close(theirs)
        self.stdin = os.fdopen(ours, "wb")

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _become(words, stdin, stdout, env, cwd, pass_fds, start_new_session) -> None:
    """Runs the module or script with the descriptors, environment and signals that a new process would have."""
    if start_new_session:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for source, target in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(source, target)
    first = 3
    for kept in sorted(pass_fds):
        os.closerange(first, kept)
        first = kept + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or os.getcwd())
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def end(function: Callable[[], object]) -> None:
    """Runs `function` and exits as the interpreter would after it."""
    code = 1
    try:
        function()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        else:
            code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
