"""Several GPUs of one machine that run a step together, as one device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdprof.errors import UserError
from kdprof.hardware.base import EnergyMeter, State
from kdprof.hardware.nvml import CudaHardware


class SummedMeter:
    """The energy counters of several devices, read one after the other."""

    def __init__(self, meters: Sequence[EnergyMeter]):
        self._meters = meters
        self.source = f"{meters[0].source}, {len(meters)} of them"
        self.period_s = meters[0].period_s

    @property
    def reason(self) -> str | None:
        """Why one of them has no reading; None if all have one."""
        return next((meter.reason for meter in self._meters if meter.reason), None)

    def read_j(self) -> float | None:
        """Return the sum of the joules consumed; None if one counter has no reading."""
        return _sum(meter.read_j() for meter in self._meters)

    def power_w(self) -> float | None:
        """Return the sum of the powers; None if one has no reading."""
        return _sum(meter.power_w() for meter in self._meters)


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None


class SeveralGpus:
    """GPUs of one type that run a step together; the slowest of them sets its speed.

    A state is the first GPU's, with those of the others under ``other_gpus``.

    Raises:
        UserError: the GPUs are of different types.
    """

    def __init__(self, gpus: Sequence[CudaHardware]):
        names = list(dict.fromkeys(gpu.name for gpu in gpus))
        if len(names) > 1:
            raise UserError(
                f"step.gpus = {len(gpus)} would mix {' and '.join(names)}; choose GPUs of one type "
                "with CUDA_VISIBLE_DEVICES"
            )
        self._gpus = gpus
        self.name = f"{len(gpus)} x {names[0]}"

    def state(self) -> State:
        """Return the full state of all GPUs now."""
        return _joined([gpu.state() for gpu in self._gpus])

    def during(self) -> State:
        """Return the cheap part of :meth:`state`."""
        return _joined([gpu.during() for gpu in self._gpus])

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Return why a measurement is unreliable, with the GPU that is the reason."""
        first, last, between = _split(before), _split(after), [_split(state) for state in during]
        return [
            f"cuda:{index}: {problem}"
            for index, gpu in enumerate(self._gpus)
            for problem in gpu.problems(first[index], [s[index] for s in between], last[index])
        ]

    def cause(self, before: State, after: State) -> str | None:
        """Return what slowed down the block between two readings, on any of the GPUs."""
        pairs = zip(self._gpus, _split(before), _split(after), strict=True)
        causes = (gpu.cause(early, late) for gpu, early, late in pairs)
        return next((cause for cause in causes if cause), None)

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return the memory that NVML reports for this process on its own GPU, the first."""
        return self._gpus[0].process_memory_bytes()

    def energy_meter(self) -> EnergyMeter:
        """Return the sum of the GPUs' counters."""
        return SummedMeter([gpu.energy_meter() for gpu in self._gpus])


def _joined(states: Sequence[State]) -> State:
    return {**states[0], "other_gpus": list(states[1:])}


def _split(state: State) -> list[State]:
    return [state, *state["other_gpus"]]
