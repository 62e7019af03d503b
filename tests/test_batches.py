"""Batches: their order, the processes that load them, faults in these."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_cases import Numbered, equal, fed, numbered_batches, scene_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from kdprof.data import evaluation_batches
from kdprof.data.batches import _next
from kdprof.errors import KdprofError, UserError

same_every_time = settings(derandomize=True, deadline=None, max_examples=60)


@same_every_time
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 100))
def test_every_epoch_holds_each_sample_once(count, batch, seed):
    """Also where a batch holds more than one epoch."""
    batches = numbered_batches(count, batch, seed=seed)
    epochs = 3
    needed = -(-epochs * count // batch)
    visited = [int(image[0, 0, 0]) for i in range(needed) for image in batches.batch(i)[0]]
    for epoch in range(epochs):
        assert sorted(visited[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(numbered_batches(20, 1, seed=seed).sample_index(20 * epoch + i) for i in range(20))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batch_depends_on_nothing_but_its_index():
    in_order, mixed = scene_batches(0), scene_batches(0)
    wanted = [in_order.batch(i) for i in range(6)]
    np.random.seed(7)
    torch.manual_seed(7)
    for i in (5, 0, 3, 3, 4, 1, 2):
        assert equal(mixed.batch(i), wanted[i])
    assert not equal(scene_batches(0, seed=1).batch(0), wanted[0])


def test_images_and_labels_of_a_batch():
    images, labels = scene_batches(0).batch(0)
    assert images.shape == (3, 3, 20, 28)
    assert labels.shape == (3, 20, 28)
    assert images.dtype == labels.dtype == torch.uint8


def test_loader_processes_change_nothing():
    """Bit for bit, from any start, and torch's global generator is left alone."""
    wanted = [scene_batches(0).batch(i) for i in range(2, 9)]
    for workers in (0, 2):
        before = torch.get_rng_state()
        batches = list(fed(scene_batches(workers), 2, 9))
        assert torch.equal(torch.get_rng_state(), before)
        assert len(batches) == 7
        assert all(equal(b, w) for b, w in zip(batches, wanted, strict=True))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_iterate(workers):
    assert list(fed(scene_batches(workers), 4, 4)) == []


def test_closing_midway_ends_the_processes():
    batches = fed(scene_batches(2), 0, 1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_loader_processes_outlive_the_signals_of_the_job():
    """Slurm and Ctrl-C signal the whole group; the main process decides."""
    wanted = [scene_batches(0).batch(i) for i in range(12)]
    batches = fed(scene_batches(2), 0, 12)
    got = [next(batches)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    got += batches
    assert all(equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_file_is_one_line_from_any_process(workers):
    batches = numbered_batches(8, 2, workers=workers, unusable={5})
    with pytest.raises(UserError) as caught:
        list(fed(batches, 0, 4))
    assert str(caught.value) == "image 5 cannot be read; replace it"
    assert caught.value.problems == (str(caught.value),)
    # While the error, and with it the iterator's frame, is still held.
    assert multiprocessing.active_children() == []


class Broken(Numbered):
    def __getitem__(self, index):
        raise ValueError("a fault of the program")


def test_fault_in_a_loader_process_ends_them_all():
    batches = numbered_batches(8, 2, workers=2)
    batches.data = Broken(batches.data.sizes)
    with pytest.raises(ValueError, match="a fault of the program"):
        list(batches.iterate(0, 4))
    assert multiprocessing.active_children() == []


LEFT_OPEN = """
from kdprof.data import Augmentation, Batches
from kdprof.data.synthetic import SyntheticScenes
data = SyntheticScenes("train", (24, 32), 8)
batches = Batches(data, seed=0, batch=2, augmentation=Augmentation((16, 16)), workers=2)
held = batches.iterate(0, 1000)
next(held)
print("leaving")
"""


def test_iterator_left_open_does_not_keep_python_from_exiting():
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
)
def test_dead_loader_process_is_one_line_with_the_mend(error):
    with pytest.raises(KdprofError, match=r"^a loader process died.*workers lower$"):
        _next([raising(error)])


def test_other_failures_are_not_taken_for_a_dead_process():
    with pytest.raises(RuntimeError, match="out of memory"):
        _next([raising(RuntimeError("CUDA out of memory"))])


def raising(error):
    raise error
    yield


# Evaluation


def test_evaluation_shows_every_image_once_in_order():
    sizes = [(4, 6)] * 3 + [(6, 4)] * 2 + [(4, 6)]
    batches = list(evaluation_batches(Numbered(sizes), 2))
    assert [len(images) for images, _ in batches] == [2, 1, 2, 1]
    seen = [(int(i[0, 0, 0]), tuple(i.shape[1:])) for images, _ in batches for i in images]
    assert seen == list(enumerate(sizes))
    assert all(images.shape[-2:] == labels.shape[-2:] for images, labels in batches)
