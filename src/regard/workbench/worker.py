"""The process that trains and measures, apart from the one that keeps the books: a crash or a kill for memory loses one trial and no more.

Requests and answers are lines of JSON on two pipes. The worker ends when its parent does, however that ends.
"""

import contextlib
import ctypes
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

START_LIMIT = 300.0  # seconds until the worker has imported torch, on a busy machine
Progress = Callable[[int, float, float | None], None]


class WorkFailed(Exception):
    """One piece of work failed; the text says why. The next can go on."""


class Worker:
    """The parent's side. The process starts with the first request, and again after it was lost.

    Args:
        setup: what every request shares: task, device, threads, batch sizes.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup = setup
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], *, limit: float, progress: Progress | None = None) -> Any:
        """The worker's answer.

        Args:
            limit: seconds after which the worker is stopped and the work has failed.
            progress: called with (step, loss, metric or None) while a training runs.
        """
        if self._process is None:
            self._start()
            self._talk({"setup": self.setup}, START_LIMIT, None)
        return self._talk(request, limit, progress)

    def _talk(self, request: dict[str, Any], limit: float, progress: Progress | None) -> Any:
        deadline = time.monotonic() + limit
        try:
            self._send(request)
            while True:
                line = self._line(deadline)
                message = json.loads(line)
                if "result" in message:
                    return message["result"]
                if "error" in message:
                    raise WorkFailed(message["error"])
                if progress is not None:
                    progress(*message["progress"])
        except TimeoutError:
            self.stop()
            raise WorkFailed(f"it ran into the time limit of {limit:g} s") from None
        except (EOFError, BrokenPipeError):
            raise WorkFailed(self._obituary()) from None

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for end in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                os.close(end)
        self._process = None
        self._log.close()

    def _start(self) -> None:
        read_requests, self._requests = os.pipe()
        self._answers, write_answers = os.pipe()
        self._buffer = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        # The import path travels along, so that what the parent can import the worker can. Threads that sleep while they wait cost little on
        # a free machine and make steps several times faster on a busy one. The memory counter is to count, not to report.
        environment = {"OMP_WAIT_POLICY": "passive", "KINETO_LOG_LEVEL": "99", **os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-m", "regard.workbench.worker", str(read_requests), str(write_answers), str(os.getpid())]
        self._process = subprocess.Popen(
            command, pass_fds=(read_requests, write_answers), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment
        )
        os.close(read_requests)
        os.close(write_answers)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._requests, data) :]

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            more = os.read(self._answers, 1 << 16)
            if not more:
                raise EOFError
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _obituary(self) -> str:
        """Why the process is gone, and its last words."""
        assert self._process is not None
        code = self._process.wait()
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()
        self.stop()
        if code == -signal.SIGKILL:
            return "its process was killed (signal 9), most likely because the machine ran out of memory"
        if code < 0:
            return f"its process crashed ({signal.Signals(-code).name})"
        return f"its process ended with code {code}: {words[-1] if words else 'it said nothing'}"


def main() -> None:
    """The worker's side: `python -m regard.workbench.worker REQUESTS ANSWERS PARENT`."""
    requests, answers, parent = (int(word) for word in sys.argv[1:4])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    inbox: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        with os.fdopen(requests) as lines:
            for line in lines:
                inbox.put(json.loads(line))
        os._exit(0)  # the parent is gone; whatever is running now has nobody to report to

    threading.Thread(target=listen, daemon=True).start()
    with os.fdopen(answers, "w") as out:

        def say(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        bench = None
        while True:
            request = inbox.get()
            try:
                if "setup" in request:
                    bench = Bench(request["setup"])
                    say({"result": None})
                    continue
                assert bench is not None
                say({"result": bench.answer(request, lambda step, loss, metric: say({"progress": [step, loss, metric]}))})
            except Exception as error:
                say({"error": reason(error)})


def reason(error: Exception) -> str:
    """One line that a reader of the report understands."""
    text = " ".join(str(error).split())
    low = text.lower()
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in low or "out of memory" in low:
        return f"out of memory: {text[:200]}"
    return f"{type(error).__name__}: {text}"[:500]


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process with its parent, and to choose it first when memory runs out."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


class Bench:
    """Answers requests about one task on one device."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import torch

        from . import candidates, tasks

        self.setup = setup
        self.task, self.options = tasks.parse(setup["task"])
        self.device = torch.device(setup["device"])
        torch.set_num_threads(setup["threads"])
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.data = cache(lambda length: self.task.data(length, setup["host"], self.options))
        self.candidate = cache(candidates.parse)

    def answer(self, request: dict[str, Any], progress: Progress) -> Any:
        match request["work"]:
            case "calibrate":
                from .measure import calibrate

                rates = calibrate(self.device)
                return {"gflops": rates.gflops, "gbytes": rates.gbytes, "chance": self.task.chance(self.data(request["length"]))}
            case "plan":
                from .train import seconds_per_step

                trial = self.trial(request["candidate"], request["length"])
                return seconds_per_step(trial, self.data(trial.length), budget=request["budget"])
            case "trial":
                from .train import train

                trial = self.trial(request["candidate"], request["length"], request["seed"])
                return train(trial, self.data(trial.length), request["steps"], picture=request["picture"], report=progress).plain()
            case "count":
                return self.count(request["candidate"], request["length"])
            case "latency":
                return self.latency(request["candidates"], request["length"], request["seconds"])
            case other:
                raise ValueError(f"unknown work {other!r}")

    def trial(self, name: str, length: int, seed: int = 0) -> Any:
        from .train import Trial

        s = self.setup
        return Trial(
            self.task,
            self.options,
            self.candidate(name),
            s["host"],
            length,
            s["longest"],
            seed,
            s["batch"],
            s["learning_rate"],
            self.device,
        )

    def ready(self, name: str, length: int) -> tuple[Any, tuple[Any, ...]]:
        """A network for inference, and its inputs at this length."""
        import torch

        from .train import network

        trial = self.trial(name, length)
        model = network(trial).to(self.device).eval()
        probe = self.task.probe(self.task.cost_batch, length, trial.host, torch.Generator().manual_seed(0)).to(self.device)
        return model, (probe.x,) if probe.key_mask is None else (probe.x, probe.key_mask)

    def count(self, name: str, length: int) -> list[float]:
        from .measure import count

        model, inputs = self.ready(name, length)
        counted = count(model, inputs)
        return [counted.flops, counted.peak_bytes, counted.least_bytes]

    def latency(self, names: list[str], length: int, seconds: float) -> dict[str, list[float]]:
        """[median, lower quartile, upper quartile, rounds] of each, in milliseconds."""
        from .measure import latencies, quartiles

        ready = {name: self.ready(name, length) for name in names}
        passes = {name: (lambda model=model, inputs=inputs: model(*inputs)) for name, (model, inputs) in ready.items()}
        found = latencies(passes, seconds=seconds, device=self.device)
        rows = {name: (quartiles(times), len(times)) for name, times in found.items()}
        return {name: [q[1], q[0], q[2], rounds] for name, (q, rounds) in rows.items()}


if __name__ == "__main__":
    main()
