"""The memory of a step on a GPU, by the numbers of an allocator that is simulated."""

from types import SimpleNamespace

import pytest
import torch

from kdprof.measure.clock import CpuClock
from kdprof.measure.memory import LEAK_STEPS, REPLAYED, SETTLING_STEPS, read_memory

GPU = torch.device("cuda", 0)
MIB = 2**20


class Allocator:
    """The counters of torch's allocator, in bytes; it reserves a pool of 100 MiB."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = self.peak = 0
        answers = {
            "synchronize": lambda device: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.now),
            "max_memory_allocated": lambda device: self.peak,
            "max_memory_reserved": lambda device: 100 * MIB,
            "memory_allocated": lambda device: self.now,
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)

    def use(self, size: int) -> None:
        """Allocate and free."""
        self.peak = max(self.peak, self.now + size)


class Step:
    """A step of two phases that need 5 and 8 MiB."""

    name, phases, feed = "mine", ("forward", "backward"), None

    def __init__(self, allocator: Allocator, compiled: str):
        self.allocator, self.ran = allocator, 0
        self.traced = SimpleNamespace(settings=SimpleNamespace(compile=compiled))

    def run(self, mark):
        self.ran += 1
        for phase, size in (("forward", 5), ("backward", 8)):
            recorded = self.traced.settings.compile == "cuda-graphs" and self.ran > SETTLING_STEPS
            self.allocator.use(0 if recorded else size * MIB)
            mark(phase)

    def check(self, result):
        pass


def reading(patch: pytest.MonkeyPatch, compiled: str):
    hardware = SimpleNamespace(process_memory_bytes=lambda: (None, "no NVML"))
    step = Step(Allocator(patch), compiled)
    found = read_memory(step, GPU, hardware, CpuClock())
    assert step.ran == len(found.step_s) == SETTLING_STEPS + LEAK_STEPS
    assert (found.memory.peak_reserved, found.leaked_bytes) == (100 * MIB, 0)
    assert found.memory.phases_reserved == dict.fromkeys(step.phases, 100 * MIB)
    return found


@pytest.mark.parametrize("compiled", ["none", "teacher", "default"])
def test_peaks_are_the_allocators(compiled, monkeypatch):
    found = reading(monkeypatch, compiled)
    assert found.memory.peak_allocated == 8 * MIB
    assert found.memory.phases == {"forward": 5 * MIB, "backward": 8 * MIB}
    assert found.unavailable == {"memory_bytes.process": "no NVML"}


def test_what_a_replayed_graph_uses_is_not_known_to_the_allocator(monkeypatch):
    found = reading(monkeypatch, "cuda-graphs")
    assert (found.memory.peak_allocated, found.memory.phases) == (None, None)
    assert found.unavailable == {
        "memory_bytes.process": "no NVML",
        "memory_bytes.peak_allocated": REPLAYED,
        "memory_bytes.phases": REPLAYED,
    }
