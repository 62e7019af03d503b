"""What hands batches to a device ahead of time, and how long was waited for them."""

import time
from contextlib import nullcontext

import pytest
import torch
from data_cases import Numbered, equal, fed, numbered_batches, scene_batches

from kdprof.data import Batches, Feeder
from kdprof.data import feeder as feeder_module
from kdprof.data.augment import Gathered


def test_feeder_tells_how_long_was_waited():
    class Slow(Numbered):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    batches = numbered_batches(8, 2)
    batches.data = Slow(batches.data.sizes)
    feeder = fed(batches, 0, 4)
    assert feeder.waited_s == 0
    began = time.perf_counter()
    list(feeder)
    assert 8 * 0.02 <= feeder.waited_s <= time.perf_counter() - began
    feeder.forget_waits()
    time.sleep(0.02)  # is no wait
    assert feeder.waited_s == 0


class FakeEvent:
    """An event that happens at once, at the next second of a clock, unless ``behind``."""

    seconds = 0.0
    behind = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.seconds += 1
        self.at = FakeEvent.seconds

    def query(self):
        return not FakeEvent.behind

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_on_a_gpu_one_batch_is_made_ahead_and_only_its_own_is_waited_for(monkeypatch):
    """The order of the calls to CUDA, on a stand-in for it."""
    told, made = [], Batches.gathered

    class Stream:
        def record_event(self):
            told.append("record")
            return len(told)

        def wait_event(self, event):
            told.append(f"wait for {event}")

    def gathered(self, index):
        told.append(f"make {index}")
        return made(self, index)

    monkeypatch.setattr(feeder_module, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Gathered, "to", lambda batch, device: batch)
    monkeypatch.setattr(Batches, "gathered", gathered)
    feeder = Feeder(scene_batches(0), torch.device("cuda"), 0, 3)
    assert told == []
    got = [next(feeder)]
    assert told == ["make 0", "record", "make 1", "wait for 2"]
    monkeypatch.setattr(FakeEvent, "behind", True)
    got.append(next(feeder))
    assert told[4:] == ["record", "make 2", "wait for 5"]
    assert feeder.waited_s == 1  # the device has not come to the second one
    monkeypatch.setattr(FakeEvent, "behind", False)
    assert feeder.waited_s == 2
    got += feeder
    assert [m for m in told if m.startswith("make")] == ["make 0", "make 1", "make 2"]
    assert all(equal(g, scene_batches(0).batch(i)) for i, g in enumerate(got))
    assert len(got) == 3
    feeder.forget_waits()
    assert feeder.waited_s == 0


def test_waits_of_a_gpu_do_not_contain_a_stop_of_the_process(monkeypatch):
    """Three waits of 1 s, 9 s of which the process was stopped for 8, and 1 s of a device that had
    other work while the process was stopped."""
    stopped, lengths = [0.0], iter([1.0, 9.0, 1.0])
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "elapsed_time", lambda *events: 1e3 * next(lengths))
    monkeypatch.setattr(feeder_module, "stopped_s", lambda: stopped[0])
    waits = feeder_module._GpuWaits()
    for stop_s, total_s in ((0.0, 1.0), (8.0, 2.0), (8.0, 2.0)):
        waits.begin()
        stopped[0] += stop_s
        waits.end()
        assert waits.total_s() == total_s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_feeder_of_a_gpu_gives_what_a_cpu_gives(workers):
    """But for rounding, and without waiting for the device."""
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = [scene_batches(0).batch(i) for i in range(12)]
    feeder = Feeder(scene_batches(workers), device, 0, 12)
    got = [next(feeder)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in feeder:
            # Keeps the step's stream busy, and the batch's memory in use, while more are made.
            torch.cuda._sleep(2_000_000)
            got.append(tuple(t.clone() for t in batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert len(got) == 12
    for (images, labels), (on_cpu, classes) in zip(got, wanted, strict=True):
        assert images.device == labels.device == device
        assert torch.equal(labels.cpu(), classes)
        difference = (images.cpu().int() - on_cpu.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("slow_s", [0.0, 0.05])
def test_waits_of_a_gpu_are_its_own(slow_s):
    """A loader slower than the step is waited for; one that is hidden behind it is not."""

    class Slow(Numbered):
        def __getitem__(self, index):
            time.sleep(slow_s)
            return super().__getitem__(index)

    batches = numbered_batches(8, 1)
    batches.data = Slow(batches.data.sizes)
    feeder = Feeder(batches, torch.device("cuda", torch.cuda.current_device()), 0, 14)
    for _ in range(4):
        next(feeder)
    torch.cuda.synchronize()
    feeder.forget_waits()
    for _ in feeder:
        torch.cuda._sleep(40_000_000)  # some 20 ms
    torch.cuda.synchronize()
    if slow_s:
        assert feeder.waited_s > 9 * 0.01
    else:
        assert feeder.waited_s < 0.02
