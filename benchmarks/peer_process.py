"""A second process for peers that run in torch, on the same device, spoken to in lines of JSON.

Two processes keep the memory and the Triton versions of JAX and of torch apart. Only one of them
works at a time while something is timed: the other one waits for a line.

    {"request": NAME, ...arguments}  ->  {"result": ...} or {"error": "..."}
"""

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timing import reason


class PeerError(RuntimeError):
    """A peer could not do what it was asked; says why."""


class PeerProcess:
    """The process of the peers, seen from the benchmark.

    Args:
        script: a Python file that calls `serve`.
        python: the interpreter that has torch.
        path: PYTHONPATH of the process; None leaves the one there is.
    """

    def __init__(self, script: Path, python: str = sys.executable, path: str | None = None) -> None:
        environment = dict(os.environ)
        if path is not None:
            environment["PYTHONPATH"] = path
        try:
            self._process = subprocess.Popen(
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise PeerError(f"{python} could not be started ({reason(error)})") from error
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def send(self, request: str, **arguments: Any) -> None:
        """Sends a request; each must be followed by `receive`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # the process has ended; `receive` says so

    def receive(self, timeout: float = 240.0) -> Any:
        """The answer to the oldest request that has none yet.

        Raises:
            PeerError: the peer failed, ended, or did not answer within `timeout` seconds.
        """
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._process.kill()
            raise PeerError(f"no answer from the peer within {timeout:.0f} s") from None
        if line is None:
            self._answers.put(None)
            raise PeerError(f"the peer's process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["result"]

    def ask(self, request: str, *, timeout: float = 240.0, **arguments: Any) -> Any:
        """Sends a request and waits for its answer; raises as `receive` does."""
        self.send(request, **arguments)
        return self.receive(timeout)

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                pass
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answers requests until there are no more; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"result": handlers[arguments.pop("request")](**arguments)}
        except Exception as error:
            if not isinstance(error, ImportError):
                traceback.print_exc()
            answer = {"error": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
