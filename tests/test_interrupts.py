"""Ctrl-C at any moment ends a fit, and leaves nothing behind that hangs."""

import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest

from streamgd.run.epochs import interrupts

SCRIPT = """
import faulthandler, random, signal, sys, threading, time
import streamgd

source = streamgd.open_source(sys.argv[1], target="y")
settings = {"tol": None, "n_threads": 2, "buffer": "1MB", "n_lanes": int(sys.argv[2])}
streamgd.SGDRegressor(max_iter=1, **settings).fit(source)


def interrupt(*_):
    raise KeyboardInterrupt


signal.signal(signal.SIGALRM, interrupt)
moments, interrupted = random.Random(1), 0
faulthandler.dump_traceback_later(30, exit=True)
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01 + moments.random() * 0.02)
        try:
            streamgd.SGDRegressor(max_iter=1000, **settings).fit(source)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("streamgd")]
print(interrupted > 20, left)
"""


@pytest.mark.parametrize("n_lanes", [1, 4])
def test_interrupts_at_random_moments(tmp_path, n_lanes):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"], file["y"] = rng.normal(size=(60_000, 8)).astype(np.float32), rng.normal(size=60_000)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.h5"), str(n_lanes)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    # Python itself reports interrupts that come within its own callbacks, and goes on.
    assert (ended.returncode, ended.stdout) == (0, "True []\n"), ended.stderr


def test_an_interrupt_while_a_condition_takes_its_lock_again():
    """Python then lets go of a lock that it does not have, and says so in place of the interrupt."""

    def wait(interrupted):
        with lock:
            lock.release()  # as `Condition.wait` does
            if interrupted:
                raise KeyboardInterrupt

    lock = threading.Lock()
    with pytest.raises(KeyboardInterrupt), interrupts():
        wait(interrupted=True)
    with pytest.raises(RuntimeError, match="release unlocked lock"), interrupts():
        wait(interrupted=False)
