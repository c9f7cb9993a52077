"""Killed, interrupted, shared: finished work is never lost and never done twice."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from regard.workbench import carrier, compare as module
carrier.LATENCY_SECONDS = 0.02
out, seeds, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"
names = ("toys:Slow", "none")
config = module.CompareConfig(names, "digits:width=4", out, seeds=seeds, budget="12steps", threads=1, cost_lengths=(8,), resume=resume)
module.compare(config, Console(quiet="loud" not in sys.argv))
"""


def start(out: Path, seeds: int, how: str, *more: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parent), *[p for p in sys.path if p]])
    command = [sys.executable, "-c", SCRIPT, str(out), str(seeds), how, *more]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(out: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """(candidate, seed) -> (metric, moment it was stored)."""
    if not (out / "results.db").exists():
        return {}
    db = sqlite3.connect(out / "results.db", timeout=30)
    try:
        return {(c, s): (m, t) for c, s, m, t in db.execute("select candidate, seed, metric, finished from trials")}
    except sqlite3.OperationalError:
        return {}
    finally:
        db.close()


def wait_for(out: Path, count: int, process: subprocess.Popen[bytes]) -> dict[tuple[str, int], tuple[float, float]]:
    deadline = time.monotonic() + 60
    while len(found := finished(out)) < count:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def done(process: subprocess.Popen[bytes], code: int = 0) -> str:
    text = process.communicate(timeout=90)[0].decode()
    assert process.returncode == code, text
    return text


def worker_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_kill_9_and_resume(tmp_path: Path) -> None:
    process = start(tmp_path, 3, "new")
    wait_for(tmp_path, 1, process)
    worker = worker_of(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(worker), "the worker must not outlive its parent"
    before = finished(tmp_path)
    assert 1 <= len(before) < 6
    done(start(tmp_path, 3, "resume"))
    after = finished(tmp_path)
    assert len(after) == 6
    assert all(after[key] == value for key, value in before.items()), "a finished trial ran again"
    assert (tmp_path / "report.html").exists()


def test_two_runs_share_one_database_and_ctrl_c_keeps_everything(tmp_path: Path) -> None:
    one = start(tmp_path, 8, "new", "loud")  # many trials, so that one is not done before it is stopped, however busy the machine
    wait_for(tmp_path, 1, one)
    two = start(tmp_path, 8, "resume")
    wait_for(tmp_path, 2, one)
    one.send_signal(signal.SIGINT)
    text = done(one, 130)
    assert "Everything finished is kept" in text and "--resume" in text
    before = finished(tmp_path)
    done(two)
    after = finished(tmp_path)
    assert len(after) == 16 and all(after[key] == value for key, value in before.items())
    db = sqlite3.connect(tmp_path / "results.db")
    assert db.execute("select count(*) from curves").fetchone()[0] == 16 * 5
    db.close()
