"""Several processes at a time: who fails, who shares which cores, and that nobody is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import processes
from launch.processes import Job

NAP = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[-1].removeprefix("--workdir="))
(folder / "began").write_text(f"{time.monotonic()} {sorted(os.sched_getaffinity(0))}")
deadline = time.monotonic() + 60
while not Path(sys.argv[1]).exists() and time.monotonic() < deadline:
    time.sleep(0.01)
(folder / "ended").write_text(str(time.monotonic()))
sys.exit(sys.argv[2] or 0)
"""


@pytest.fixture
def nap(tmp_path, monkeypatch):
    """Jobs that wait for a file and then say a last word; one that says anything has failed."""
    (tmp_path / "nap.py").write_text(NAP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, until="nap.py", word="": Job(name, "nap", [str(tmp_path / until), word], tmp_path / name)


def times(job):
    began = float((job.folder / "began").read_text().split()[0])
    return began, float((job.folder / "ended").read_text())


def test_failures_are_told_and_the_others_go_on(nap, capsys):
    jobs = [nap("bad", word="no such thing"), nap("good"), nap("worse", word="nor this")]
    assert processes.run_all(jobs, 2) == [jobs[0], jobs[2]]
    assert (jobs[0].folder / "log.txt").read_text() == "no such thing\n"
    said = capsys.readouterr().out
    assert "bad: FAILED with status 1" in said and "good: done" in said and "0 waiting, 0 running" in said


def test_at_most_so_many_run_at_once(nap):
    """The third begins when one of the first two has ended, and does not wait for both: the first waits for it."""
    jobs = [nap("long", "next/ended"), nap("short", "long/began"), nap("next")]
    assert not processes.run_all(jobs, 2)
    (_, end), (_, short), (later, last) = map(times, jobs)
    assert short < later < last < end


def test_cores_are_shared_evenly():
    assert [processes.share([0, 1, 2, 3, 4], i, 2) for i in range(2)] == [[0, 1], [2, 3, 4]]
    assert [processes.share([3, 5], i, 3) for i in range(3)] == [[3], [5], [3]]
    assert processes.share([3, 5], 0, 1) == [3, 5]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot bind processes to cores")
def test_a_child_keeps_to_its_cores_and_we_to_all(nap):
    cores, job = sorted(os.sched_getaffinity(0)), nap("bound")
    processes.start(job, 0, len(cores)).wait()
    assert (job.folder / "began").read_text().endswith(f"[{cores[0]}]")
    assert sorted(os.sched_getaffinity(0)) == cores


def test_an_interrupt_while_a_child_is_started_does_not_leave_it_behind(nap, monkeypatch):
    """The moment in which nobody knows its number yet."""
    start, started = processes.start, []

    def interrupted(*given):
        started.append(start(*given))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(processes, "start", interrupted)
    with pytest.raises(SystemExit):
        processes.run_all([nap("one", "never")], 1)
    assert started[0].poll() == -signal.SIGTERM


def test_two_commands_cannot_work_in_one_folder(nap):
    job = nap("mine", "never")
    first = processes.start(job, 0, 1)
    with pytest.raises(ValueError, match=f"another process is at work in {job.folder}"):
        processes.start(job, 0, 1)
    processes.stop([first])
    assert first.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all(nap, monkeypatch, number):
    jobs, started = [nap("one", "never"), nap("two", "never"), nap("third", "never")], []
    start = processes.start
    monkeypatch.setattr(processes, "start", lambda *given: started.append(start(*given)) or started[-1])

    def interrupt(_):
        if len(started) == 2 and all((job.folder / "began").exists() for job in jobs[:2]):
            monkeypatch.undo()
            os.kill(os.getpid(), number)
        os.sched_yield()

    monkeypatch.setattr(time, "sleep", interrupt)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match=str(128 + number)):
        processes.run_all(jobs, 2)
    assert signal.getsignal(number) == before
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2
    assert not jobs[2].folder.exists()


def test_one_that_does_not_listen_is_killed(monkeypatch):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    deaf = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    deaf.stdout.readline()
    monkeypatch.setattr(processes, "PATIENCE_SECONDS", 0.2)
    processes.stop([deaf])
    assert deaf.returncode == -signal.SIGKILL
    deaf.stdout.close()
