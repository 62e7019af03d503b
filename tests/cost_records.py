"""Costs for tests: plain ones with every sample alike, and a set as a GPU would give it."""

import random
from math import exp

from kdprof.records import (
    Canary,
    Ceilings,
    Cost,
    CountedCost,
    Energy,
    Flop,
    Interval,
    Memory,
    Operation,
    Outlier,
    PhaseBound,
    Ratio,
    TermCost,
)

REASONS = {
    "end_to_end_s": "not asked for",
    "canary": "not asked for",
    "terms": "not asked for",
    "operations": "not asked for",
    "bytes_moved": "not asked for",
    "hidden_cost": "not asked for",
    "ceilings": "not asked for",
    "bounds": "not asked for",
    "mfu": "not asked for",
    "energy_j": "no counter",
}


def alike(value: float, **changes) -> Interval:
    return Interval(**{"median": value, "low": value, "high": value, **changes})


def memory(**known: int) -> Memory:
    return Memory(**dict.fromkeys(Memory.model_fields) | known)


def student_only(flop: float) -> Flop:
    return Flop(
        teacher=0, student=flop, objective=0, backward=0, auxiliary=0, total=flop, counted=flop
    )


def make_cost(
    method: str, seconds: float = 0.2, *, flop: float | Flop | None = 1e9, **changes
) -> Cost:
    """A Cost whose every sample is ``seconds``, beside a reference ``none`` of 0.1 s, apart from
    what ``changes`` says."""
    fields = {
        "method": method,
        "device": "cpu",
        "key": f"key-{method}",
        "session": f"session-{method}",
        "latency_s": alike(seconds),
        "ratio": Ratio(**alike(10 * seconds).model_dump(), to="none"),
        "end_to_end_s": None,
        "end_to_end_ratio": None,
        "samples_s": [[seconds] * 2] * 4,
        "reference_samples_s": [[0.1] * 2] * 4,
        "end_to_end_samples_s": [],
        "reference_end_to_end_samples_s": [],
        "outliers": [],
        "canary": None,
        "phases_s": {"objective": seconds},
        "terms": None,
        "flop": student_only(flop) if isinstance(flop, float) else flop,
        "operations": None,
        "bytes_moved": None,
        "hidden_cost": None,
        "ceilings": None,
        "bounds": None,
        "mfu": None,
        "memory_bytes": memory(process=2**30),
        "energy_j": None,
        "energy": None,
        "reliable": True,
        "warnings": [],
        "unavailable": REASONS,
        "timing": {},
        "hardware": {},
        "settings": {},
        "versions": {},
    }
    return Cost(**(fields | changes))


PHASES = {
    "none": (0.0, 0.30, 0.08, 0.0, 0.0, 0.55, 0.07),
    "kd": (0.33, 0.18, 0.05, 0.04, 0.04, 0.32, 0.04),
    "cwd": (0.32, 0.18, 0.05, 0.05, 0.05, 0.31, 0.04),
    "cirkd": (0.17, 0.10, 0.03, 0.30, 0.22, 0.16, 0.02),
}
PHASE_NAMES = (
    "teacher_forward", "student_forward", "task_loss", "objective", "objective_backward",
    "student_backward", "optimizer",
)  # fmt: skip
GFLOP = {"none": 1404.0, "kd": 3390.0, "cwd": 3390.0, "cirkd": 3420.0}
SECONDS = {"none": 0.0905, "kd": 0.1621, "cwd": 0.1664, "cirkd": 0.3112}
TERMS = {
    "none": {},
    "kd": {"kd": 1.0},
    "cwd": {"cwd": 3.0},
    "cirkd": {"kd": 1.0, "memory_pixel": 0.1, "memory_region": 0.0},
}
CEILINGS = Ceilings(matmul_flop_per_s=5.1e13, copy_bytes_per_s=3.9e12, precision="fp32")


def _phases(method: str) -> dict[str, float]:
    shares = zip(PHASE_NAMES, PHASES[method], strict=True)
    return {name: share * SECONDS[method] for name, share in shares}


def _terms(method: str) -> dict[str, TermCost]:
    own, phases = TERMS[method], _phases(method)
    return {
        name: TermCost(
            weight=weight,
            forward_flop=4.2e9 * place,
            backward_flop=8.4e9 * place,
            bytes_moved=3.1e9,
            forward_s=phases["objective"] / len(own),
            backward_s=phases["objective_backward"] / len(own) if weight else 0.0,
        )
        for place, (name, weight) in enumerate(own.items())
    }


def _operations(method: str) -> list[Operation]:
    made = {
        "aten.convolution": ("matrix", 0.61, 0.0),
        "aten.native_batch_norm": ("normalisation", 0.12, 2.1e9),
        "aten.relu": ("elementwise", 0.11, 0.9e9),
        "aten._softmax": ("softmax", 0.05, 0.7e9),
        "aten.topk": ("uncounted", 0.015 if method == "cirkd" else 0.0, None),
        "aten.grid_sampler_2d": ("uncounted", 0.01 if method == "cirkd" else 0.0, None),
        "aten.upsample_bilinear2d": ("resize", 0.07, 0.4e9),
    }
    return [
        Operation(
            phase="student_forward",
            name=name,
            kind=kind,
            calls=12,
            matrix_flop=1e12 if kind == "matrix" else 0.0,
            other_flop=flop,
            bytes_read=2e9,
            bytes_written=1e9,
            seconds=share * SECONDS[method],
        )
        for name, (kind, share, flop) in made.items()
        if share
    ]


def _bounds(method: str) -> dict[str, PhaseBound]:
    kinds = {
        "teacher_forward": ("compute", 0.72), "student_forward": ("compute", 0.61),
        "task_loss": ("memory", 0.66), "objective": ("memory", 0.58),
        "objective_backward": ("overhead", 0.21), "student_backward": ("compute", 0.64),
        "optimizer": ("overhead", 0.12),
    }  # fmt: skip
    return {
        phase: PhaseBound(
            matrix_flop=1e12, bytes_moved=1e9, intensity=1e3, ceiling_share=share, bound=bound
        )
        for phase, (bound, share) in kinds.items()
        if _phases(method)[phase]
    }


def _around(value: float, width: float) -> dict[str, float]:
    return {"median": value, "low": value / (1 + width), "high": value * (1 + width)}


def gpu_cost(method: str, **changes) -> Cost:
    """A Cost as a GPU gives it: noisy samples, every field that it can have."""
    noise = random.Random(f"{method}")
    seconds, reference = SECONDS[method], SECONDS["none"]
    ratio, flop = seconds / reference, GFLOP[method] * 1e9

    def rounds(level: float) -> list[list[float]]:
        return [[level * noise.gauss(1, 0.004) for _ in range(3)] for _ in range(12)]

    loaded = {"end_to_end_s": alike(1.0, **_around(1.01 * seconds, 0.006))}
    loaded["end_to_end_ratio"] = Ratio(**_around(ratio, 0.007), to="none")
    parts = {
        "teacher": 0.586 * flop if method != "none" else 0.0,
        "student": 468e9,
        "objective": 2e9 * len(TERMS[method]),
        "auxiliary": 0.0,
    }
    fields = {
        "device": "NVIDIA H200",
        "latency_s": Interval(**_around(seconds, 0.004)),
        "ratio": Ratio(**_around(ratio, 0.0048 if method != "none" else 0.0), to="none"),
        **loaded,
        "samples_s": rounds(seconds),
        "reference_samples_s": rounds(reference),
        "end_to_end_samples_s": [1.01 * seconds] * 12,
        "reference_end_to_end_samples_s": [1.01 * reference] * 12,
        "canary": Canary(
            median_s=2.1e-4, drift=0.004 + 0.001 * len(method), steady=True, samples_s=[2.1e-4] * 12
        ),
        "phases_s": _phases(method),
        "terms": _terms(method),
        "flop": Flop(**parts, backward=flop - sum(parts.values()), total=flop, counted=flop),
        "operations": _operations(method),
        "bytes_moved": 4.1e10 * ratio,
        "hidden_cost": 1 - flop / GFLOP["none"] / 1e9 / ratio,
        "ceilings": CEILINGS,
        "bounds": _bounds(method),
        "mfu": flop / seconds / 6.7e13,
        "memory_bytes": Memory(
            peak_allocated=round(9.4 * 2**30 * ratio**0.5),
            peak_reserved=12 * 2**30,
            process=13 * 2**30,
            phases=_fixed_phases(method),
            phases_reserved=_fixed_phases(method),
        ),
        "energy_j": 540 * seconds,
        "energy": Energy(
            source="NVML total energy counter",
            window_s=4.0,
            steps=40,
            counter_period_s=0.1,
            idle_w=75.0,
            power_integral_j=541 * seconds,
        ),
        "unavailable": {},
        "timing": {"stopped": "the interval is 0.9% wide", "precision_target": 0.01},
    }
    return make_cost(method, **(fields | changes))


def _fixed_phases(method: str) -> dict[str, int]:
    return {phase: 2**33 for phase, seconds in _phases(method).items() if seconds}


def outlier(cause: str) -> Outlier:
    return Outlier(of="step", round=3, step=1, seconds=0.5, times_median=3.0, cause=cause)


def counted(cost: Cost, modules: dict[str, dict[str, float]] | None = None) -> CountedCost:
    """The same Cost as one that was counted, with these FLOP by module."""
    return CountedCost(**cost.model_dump(), modules_flop=modules)


def ratio(median: float, error: float = 0.0) -> Ratio:
    """A ratio to none whose interval is ``error`` wide to each side on the log scale."""
    return Ratio(median=median, low=median * exp(-error), high=median * exp(error), to="none")
