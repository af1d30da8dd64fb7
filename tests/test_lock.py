"""Two trainings never share a folder, and no lock outlives its training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.training import settings, task

from dalle_fast.training import fit
from dalle_fast.training.lock import locked

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from dalle_fast.training.lock import locked
with locked(Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder, and has a worker."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGKILL)
    process.stdout.close()


def test_a_folder_in_use_is_refused_until_its_process_dies(tmp_path, holder):
    message = rf"no other training runs, got {tmp_path}, in use by process {holder.pid} on"
    with pytest.raises(ValueError, match=message), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):  # its worker lives on
        assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_training_holds_the_lock_of_its_folder_alone(tmp_path):
    config = settings("clip", steps=2)
    with locked(tmp_path), pytest.raises(ValueError, match="in use by process"), locked(tmp_path):
        pass
    some, refused = task("clip", config), []
    loss = some.loss

    def start_another(model, batch, step):
        with pytest.raises(ValueError, match=rf"got {tmp_path / 'clip'}, in use by process {os.getpid()} on"):
            fit(task("clip", config), config, tmp_path)
        refused.append(step)
        return loss(model, batch, step)

    some.loss = start_another
    fit(some, config, tmp_path)
    assert refused == [0, 1]
    fit(task("clip", config), config, tmp_path)
    failing = task("clip", settings("clip", steps=3))
    failing.loss = lambda model, batch, step: torch.zeros(())[1]
    with pytest.raises(IndexError):
        fit(failing, settings("clip", steps=3), tmp_path)
    fit(task("clip", config), config, tmp_path)  # an error releases it, too


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with (
        pytest.warns(
            UserWarning, match=r"lock: no lock, so two trainings here would disturb each other.*not supported"
        ),
        locked(tmp_path),
    ):
        pass
