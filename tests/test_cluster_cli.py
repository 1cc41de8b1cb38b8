"""``--scheduler``: whom it reaches, and what is said where nobody is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streamgd.commands import clusters
from streamgd.run import worker_memory
from tests.clustering import cluster
from tests.test_cli import Said, assert_same_run, parquet, sg

__all__ = ["parquet", "sg"]


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1", ":::", "http://127.0.0.1:80", "127.0.0.1:1", "tls://127.0.0.1:9", "inproc://x", "silent"],
)
def test_wrong_addresses_are_told_at_once(
    sg: Callable[..., Said], parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Whatever is wrong with them, and if somebody listens and says nothing; before anything is written."""
    monkeypatch.setattr(clusters, "_CONNECT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if address == "silent":
            address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        said = sg("train", parquet, "--target", "y", "--run", tmp_path / "run", "--scheduler", address)
        assert time.monotonic() - began < 10
    assert said.status == 2
    assert f"no scheduler at {address!r} (" in said.err
    assert "start one with `dask scheduler`" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_a_scheduler_is_found(
    sg: Callable[..., Said], parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", parquet, "--target", "y", "--epochs", 1, "--lanes", 2, "--quiet", "--run"]
    with cluster(1) as (made, _):
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(worker_memory, "PROCESS_BYTES", 10**15)
            said = sg(*train, tmp_path / "there", "--scheduler", made.scheduler_address)
        assert said.status == 2
        assert "choose a smaller buffer" in said.err  # and it can be tried at once
        said = sg(*train, tmp_path / "there", "--scheduler", made.scheduler_address)
        assert said.status == 0, said.err
    assert sg(*train, tmp_path / "here").status == 0
    assert_same_run(tmp_path / "here", tmp_path / "there")


def test_a_scheduler_that_is_lost_is_told_once(parquet: Path, tmp_path: Path) -> None:
    """Without the tracebacks that Dask logs."""
    train = [sys.executable, "-m", "streamgd", "train", parquet, "--target", "y", "--lanes", "2", "--run"]
    more = ["--epochs", "100000", "--tol", "none", "--scheduler"]
    with (tmp_path / "err").open("w+") as err:
        with cluster(1) as (made, _):
            command = [*map(str, [*train, tmp_path / "there"]), *more, made.scheduler_address]
            patience = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}  # it is 30 s
            process = subprocess.Popen(command, stdout=err, stderr=err, env=os.environ | patience)
            while "/100000 done  loss" not in (tmp_path / "err").read_text():
                assert process.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.05)
        try:
            assert process.wait(timeout=60) == 2
        finally:
            process.kill()
    said = (tmp_path / "err").read_text()
    assert said.count("streamgd: error: the ") == said.count("start the cluster again") == 1  # lost, or silent
    for noise in ("Traceback", "distributed", "cancelled"):
        assert noise not in said
