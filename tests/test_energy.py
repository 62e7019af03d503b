"""Energy of a step on a simulated device whose true energy is known, and RAPL on a made-up tree."""

import pytest
from nvml_replay import replayed

from kdprof.hardware.cpu import RaplMeter
from kdprof.measure.energy import energy_of_blocks, measure_energy
from kdprof.measure.latency import Block, BlockEnergy


class Device:
    """A device with a queue, a clock of its own and a counter that moves every ``period_s``.

    It draws ``load_w`` while a step runs, else ``idle_w``; the host may be ``ahead_s`` before it.
    """

    source = "simulated"

    def __init__(self, step_s, *, load_w=500.0, idle_w=100.0, period_s=0.02, ahead_s=0.0):
        self.step_s, self.load_w, self.idle_w = step_s, load_w, idle_w
        self.period_s, self.ahead_s = period_s, ahead_s
        self.now_s, self.busy, self.steps = 7.0, [], 0
        self.reason, self.dies_at_s = None, float("inf")

    def run_steps(self, count):
        end_s = self.busy[-1][1] if self.busy else 0.0
        began_s = max(self.now_s, end_s)
        self.busy.append((began_s, began_s + count * self.step_s))
        self.steps += count
        self.now_s = max(self.now_s, self.busy[-1][1] - self.ahead_s)

    def synchronize(self):
        if self.busy:
            self.now_s = max(self.now_s, self.busy[-1][1])

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds

    def true_j(self, moment_s):
        worked = sum(max(0.0, min(end, moment_s) - began) for began, end in self.busy)
        return self.idle_w * moment_s + (self.load_w - self.idle_w) * worked

    def read_j(self):
        self.now_s += 1e-5
        if self.now_s >= self.dies_at_s:
            self.reason = "NVML: GPU is lost"
            return None
        return self.true_j(self.now_s // self.period_s * self.period_s)

    def power_w(self):
        works = any(began <= self.now_s <= end for began, end in self.busy)
        return self.load_w if works else self.idle_w

    def measured(self):
        return measure_energy(
            self.run_steps, self, self.synchronize, clock=self.clock, sleep=self.sleep
        )


@pytest.mark.parametrize("ahead_s", [0.0, 0.15])
@pytest.mark.parametrize("period_s", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("step_s", [0.003, 0.05, 0.4])
def test_joules_of_a_step_are_found_again(step_s, period_s, ahead_s):
    device = Device(step_s, period_s=period_s, ahead_s=ahead_s)
    joules, how, reason = device.measured()
    assert reason is None
    # What the counter may lag behind at one end more than at the other.
    error_j = device.load_w * period_s / how.steps
    assert joules == pytest.approx(500 * step_s, abs=error_j + 0.01 * 500 * step_s)
    assert how.source == "simulated"
    assert how.window_s >= max(0.5, 10 * how.counter_period_s)
    assert how.idle_w == pytest.approx(100, rel=0.01)


def test_by_hand():
    """Steps of 40 ms at 250 W on a counter of 40 ms: 10 J each, and the window is whole steps."""
    device = Device(0.04, load_w=250.0, idle_w=50.0, period_s=0.04)
    joules, how, _ = device.measured()
    assert joules == pytest.approx(10.0, rel=0.05)
    assert how.power_integral_j == pytest.approx(10.0, rel=0.02)
    assert how.idle_w == pytest.approx(50.0, rel=0.01)
    assert how.counter_period_s == pytest.approx(0.04, rel=0.05)
    assert 11 <= how.steps <= 15  # 0.5 s


def test_the_counters_period_is_found_and_sets_the_window():
    """A counter slower than a step; then a step slower than the counter, which hides its period."""
    slow = Device(0.01, period_s=0.2).measured()[1]
    assert slow.counter_period_s == pytest.approx(0.2, rel=0.1)
    assert slow.window_s >= 2.0
    hidden = Device(0.3, period_s=0.05).measured()[1]
    assert hidden.counter_period_s == pytest.approx(0.05, rel=0.1)


def test_a_counter_that_rests_while_the_device_is_idle():
    device = Device(0.02, idle_w=0.0, period_s=0.1)
    joules, how, reason = device.measured()
    assert reason is None
    assert joules == pytest.approx(10.0, rel=0.1)
    assert how.idle_w is None
    assert how.counter_period_s == pytest.approx(0.1, rel=0.1)


def test_the_cross_check_does_not_come_from_the_counter():
    device = Device(0.02)
    device.power_w = lambda: 300.0
    joules, how, _ = device.measured()
    assert how.power_integral_j == pytest.approx(6.0, rel=0.05)
    assert joules == pytest.approx(10.0, rel=0.05)


def test_one_missing_sample_of_power_leaves_no_cross_check():
    device = Device(0.02)
    device.power_w = lambda: None if device.steps > 70 else 500.0
    joules, how, _ = device.measured()
    assert joules is not None
    assert how.power_integral_j is None


def test_idle_is_measured_before_any_step_of_ours():
    device = Device(0.02)
    ran = []
    read = device.read_j

    def watched():
        ran.append(device.steps)
        return read()

    device.read_j = watched
    device.measured()
    assert ran.count(0) > 100  # half a second, polled every millisecond


@pytest.mark.parametrize("dies_at_s", [7.0, 8.2, 8.7, 9.0, 9.7, 10.0])
def test_a_driver_that_dies_on_the_way(dies_at_s):
    device = Device(0.05)
    device.dies_at_s = dies_at_s
    joules, how, reason = device.measured()
    assert (joules, how) == (None, None)
    assert reason == "the energy counter stopped answering: NVML: GPU is lost"


def test_a_counter_that_stands_still():
    device = Device(0.05)
    device.read_j = lambda: 42.0
    joules, how, reason = device.measured()
    assert (joules, how) == (None, None)
    assert "too rarely" in reason


def test_a_counter_that_stops_in_the_middle():
    device = Device(0.05)
    read = device.read_j
    device.read_j = lambda: read() if device.steps < 25 else 42.0
    joules, how, reason = device.measured()
    assert (joules, how) == (None, None)
    assert "did not move" in reason or "reset" in reason


def test_a_counter_that_is_reset():
    device = Device(0.05)
    read = device.read_j
    device.read_j = lambda: read() - (1e6 if device.steps > 30 else 0)
    joules, _, reason = device.measured()
    assert joules is None
    assert reason == "the energy counter was reset while steps ran"


def blocks_of(device, count, steps):
    """Run timed blocks as the stopwatch does, with pauses between them."""
    blocks = []
    for _ in range(count):
        device.sleep(0.013)
        began_j, began_s = device.read_j(), device.clock()
        device.run_steps(steps)
        device.synchronize()
        energy = BlockEnergy(device.read_j() - began_j, device.clock() - began_s, steps)
        blocks.append(Block([device.step_s] * steps, [], {}, {}, 0, energy))
    return blocks


def test_energy_around_long_blocks_costs_no_further_step():
    device = Device(0.2, period_s=0.1)
    blocks = blocks_of(device, 12, 10)
    steps = device.steps
    joules, how, reason = energy_of_blocks(device, blocks)
    assert reason is None
    assert device.steps == steps == how.steps
    assert how.window_s == pytest.approx(24.0, rel=1e-3)
    assert (how.counter_period_s, how.idle_w, how.power_integral_j) == (0.1, None, None)
    assert how.around_blocks
    assert joules == pytest.approx(0.2 * 500, rel=0.02)


def test_short_blocks_say_what_measures_their_energy():
    device = Device(0.04, period_s=0.1)
    joules, how, reason = energy_of_blocks(device, blocks_of(device, 10, 4))
    assert (joules, how) == (None, None)
    assert reason == (
        "10 timed blocks of 0.16 s are too short for a counter that moves every 0.1 s; --detail "
        "measures it"
    )


def test_energy_around_blocks_of_a_counter_that_stops():
    device = Device(0.2, period_s=0.1)
    blocks = blocks_of(device, 12, 5)
    blocks[3].energy = None
    assert energy_of_blocks(device, blocks).reason == "the energy counter stopped answering"
    device.reason = "no counter"
    assert energy_of_blocks(device, blocks).reason == "no counter"


def test_energy_around_blocks_of_a_counter_that_is_reset():
    device = Device(0.2, period_s=0.1)
    blocks = blocks_of(device, 12, 10)
    blocks[3].energy = blocks[3].energy._replace(joules=-1e6)
    assert "was reset" in energy_of_blocks(device, blocks).reason


def test_no_counter_runs_no_step():
    device = Device(0.05)
    device.reason = "no counter here"
    assert device.measured() == (None, None, "no counter here")
    assert device.steps == 0


def test_a_step_that_raises_is_not_swallowed():
    def broken(count):
        raise RuntimeError("boom")

    device = Device(0.05)
    device.run_steps = broken
    with pytest.raises(RuntimeError, match="boom"):
        device.measured()


def test_a_replayed_gpu_whose_counter_moves_62_joules_a_read():
    """The session's counter: 918273.645, 918335.645 and 918397.645 J, where it stays."""
    device = Device(0.05)
    meter = replayed("healthy").energy_meter()
    _, how, reason = measure_energy(
        device.run_steps, meter, device.synchronize, clock=device.clock, sleep=device.sleep
    )
    assert how is None
    assert "energy counter" in reason


# --- RAPL ---


def package(folder, name, uj, kind="package-0", most=262_143_328_850):
    zone = folder / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{kind}\n")
    (zone / "energy_uj").write_text(f"{uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{most}\n")
    return zone


def test_rapl_adds_packages_and_nothing_within_or_around_them(tmp_path):
    first = package(tmp_path, "intel-rapl:0", 1_000_000)
    second = package(tmp_path, "intel-rapl:1", 5_000_000, "package-1")
    others = [
        package(tmp_path, "intel-rapl:0:0", 0, "core"),
        package(tmp_path, "intel-rapl:0:1", 0, "dram"),
        package(tmp_path, "intel-rapl:2", 0, "psys"),
        package(tmp_path, "intel-rapl-mmio:0", 0),
    ]
    meter = RaplMeter(tmp_path)
    assert meter.reason is None
    assert "2 CPU package(s)" in meter.source
    began = meter.read_j()
    for zone in others:
        (zone / "energy_uj").write_text("99000000\n")
    (first / "energy_uj").write_text("3500000\n")
    (second / "energy_uj").write_text("6000000\n")
    assert meter.read_j() - began == pytest.approx(2.5 + 1.0)
    assert meter.power_w() is None


def test_rapl_wraps_around_package_by_package(tmp_path):
    first = package(tmp_path, "intel-rapl:0", 990_000, most=1_000_000)
    second = package(tmp_path, "intel-rapl:1", 100_000, "package-1", most=2_000_000)
    meter = RaplMeter(tmp_path)
    began = meter.read_j()
    (first / "energy_uj").write_text("15000")  # 10 000 to the top, 15 000 beyond
    (second / "energy_uj").write_text("300000")
    assert meter.read_j() - began == pytest.approx(0.025 + 0.2)
    (first / "energy_uj").write_text("16000")
    assert meter.read_j() - began == pytest.approx(0.226)


def test_rapl_that_is_not_there(tmp_path):
    for folder in (tmp_path, tmp_path / "no"):
        meter = RaplMeter(folder)
        assert meter.read_j() is None
        assert "no RAPL package" in meter.reason
        assert str(folder) in meter.reason


def test_rapl_that_only_root_may_read(tmp_path, monkeypatch):
    zone = package(tmp_path, "intel-rapl:0", 5)
    read = type(zone).read_text

    def denied(path, *arguments, **named):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **named)

    monkeypatch.setattr(type(zone), "read_text", denied)
    meter = RaplMeter(tmp_path)
    assert meter.read_j() is None
    assert "root only" in meter.reason
    assert "chmod a+r" in meter.reason


def test_rapl_that_vanishes_or_says_nonsense(tmp_path):
    zone = package(tmp_path, "intel-rapl:0", 5)
    meter = RaplMeter(tmp_path)
    (zone / "energy_uj").write_text("nonsense")
    assert meter.read_j() is None
    assert "nonsense" in meter.reason
    (zone / "energy_uj").unlink()
    assert meter.read_j() is None
    assert "No such file" in meter.reason
    (zone / "energy_uj").write_text("7")
    assert meter.read_j() == pytest.approx(2e-6)
    assert meter.reason is None


def test_energy_of_a_step_on_a_cpu_with_rapl(tmp_path):
    """A package at 60 W whose counter wraps twice on the way: steps of 0.1 s take 6 J."""
    zone = package(tmp_path, "intel-rapl:0", 0, most=100_000_000)
    device = Device(0.1, load_w=60.0, idle_w=60.0)
    meter = RaplMeter(tmp_path)

    class Kernel:
        source, reason, power_w = meter.source, None, meter.power_w

        def read_j(self):
            device.now_s += 1e-5
            uj = int(device.true_j(device.now_s) * 1e6) % 100_000_000
            (zone / "energy_uj").write_text(str(uj))
            return meter.read_j()

    joules, how, _ = measure_energy(
        device.run_steps, Kernel(), device.synchronize, clock=device.clock, sleep=device.sleep
    )
    assert joules == pytest.approx(6.0, rel=0.01)
    assert how.idle_w == pytest.approx(60.0, rel=0.01)
    assert how.power_integral_j is None
