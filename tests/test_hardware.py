"""The state of the device, read of replayed drivers and of folders that look like the kernel's."""

import json
import os
import subprocess
import sys
import time

import pynvml
import pytest
import torch
from nvml_replay import NvmlReplay, replayed, session

from kdprof import hardware
from kdprof.hardware import hardware_of
from kdprof.hardware import nvml as nvml_module
from kdprof.hardware.cpu import CpuHardware
from kdprof.hardware.device import versions
from kdprof.hardware.nvml import CudaHardware, NoNvml, open_nvml
from kdprof.measure import user_step

GIB = 2**30
SESSIONS = ("healthy", "throttled_shared", "consumer", "no_permission", "driver_goes_away")


def measured(gpu, readings=3):
    """Read as a measurement does: before, between the blocks, after."""
    before = gpu.state()
    during = [gpu.during() for _ in range(readings)]
    return before, during, gpu.state()


# --- a GPU ---


def test_a_healthy_gpu_tells_everything_and_is_trusted():
    gpu = replayed("healthy")
    before, during, after = measured(gpu)
    del before["time_s"]
    assert before == {
        "sm_clock_mhz": 1980,
        "throttle_reasons": ["idle"],
        "temperature_c": 34,
        "power_w": 118.204,
        "other_process_count": 0,
        "driver_version": "570.86.15",
        "max_sm_clock_mhz": 1980,
        "memory_clock_mhz": 3201,
        "power_limit_w": 700.0,
        "default_power_limit_w": 700.0,
        "ecc_enabled": True,
        "mig_enabled": False,
        "persistence": True,
        "other_processes": [],
        "utilization_percent": 97,
    }
    assert gpu.problems(before, during, after) == []


@pytest.mark.parametrize("name", SESSIONS)
def test_every_state_is_json_and_every_none_has_its_reason(name):
    for reading in (replayed(name).state(), replayed(name).during()):
        assert json.loads(json.dumps(reading)) == reading
        nones = {key for key, value in reading.items() if value is None}
        assert nones == set(reading.get("unavailable", {}))
        assert all(reading.get("unavailable", {}).values())


def test_throttling_and_strangers_make_it_untrusted():
    gpu = replayed("throttled_shared")
    before, during, after = measured(gpu)
    assert before["other_processes"] == [
        {"pid": 777, "memory_bytes": 10 * GIB},
        {"pid": 778, "memory_bytes": 2 * GIB},
    ]
    assert [reading["throttle_reasons"] for reading in (before, during[0], after)] == [
        [],
        ["application clocks"],
        ["power cap", "software thermal slowdown"],
    ]
    assert gpu.problems(before, during, after) == [
        "the GPU was throttled (power cap)",
        "the GPU was throttled (software thermal slowdown)",
        "2 other process(es) used the GPU (at least 12.0 GiB)",
        "the SM clock went from 1410 to 1230 MHz during the measurement",
    ]


@pytest.mark.parametrize(
    ("mask", "names", "harmful"),
    [
        (0x0, [], False),
        (0x1, ["idle"], False),
        (0x2 | 0x100, ["application clocks", "display clocks"], False),
        (0x4, ["power cap"], False),  # a loaded GPU's usual state, while its clock is steady
        (0x8 | 0x40, ["hardware slowdown", "hardware thermal slowdown"], True),
        (0x10, ["sync boost"], True),
        (0x80, ["hardware power brake"], True),
        (0x400, ["reason 0x400"], True),  # what a later driver may add is not taken for harmless
    ],
)
def test_reasons_that_hold_the_clock_down(mask, names, harmful):
    gpu = replayed("healthy", nvmlDeviceGetCurrentClocksEventReasons=mask)
    before, during, after = measured(gpu)
    assert before["throttle_reasons"] == names
    assert bool(gpu.problems(before, during, after)) == harmful


def test_our_bits_are_nvmls():
    ours = {name.replace(" ", ""): bit for bit, name in nvml_module._CLOCK_REASONS.items()}
    theirs = {
        "idle": pynvml.nvmlClocksThrottleReasonGpuIdle,
        "powercap": pynvml.nvmlClocksThrottleReasonSwPowerCap,
        "hardwareslowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
        "syncboost": pynvml.nvmlClocksThrottleReasonSyncBoost,
        "softwarethermalslowdown": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        "hardwarethermalslowdown": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "hardwarepowerbrake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        "applicationclocks": pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting,
        "displayclocks": pynvml.nvmlClocksThrottleReasonDisplayClockSetting,
    }
    assert ours == theirs
    clocks = (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU)
    assert clocks == (
        nvml_module._SM_CLOCK,
        nvml_module._MEMORY_CLOCK,
        nvml_module._CORE_TEMPERATURE,
    )


def test_a_consumer_card_says_which_readings_it_does_not_support():
    state = replayed("consumer").state()
    missing = {
        "power_w", "power_limit_w", "default_power_limit_w", "ecc_enabled", "mig_enabled",
    }  # fmt: skip
    assert state["unavailable"] == dict.fromkeys(missing, "NVML: Not Supported")
    meter = replayed("consumer").energy_meter()
    assert (meter.reason, meter.read_j(), meter.power_w()) == ("NVML: Not Supported", None, None)


def test_without_permission_and_with_an_old_library():
    gpu = replayed("no_permission")
    before, during, after = measured(gpu)
    forbidden = {
        "throttle_reasons", "power_w", "other_process_count", "other_processes",
        "utilization_percent",
    }  # fmt: skip
    assert before["unavailable"] == {
        **dict.fromkeys(forbidden, "NVML: Insufficient Permissions"),
        "persistence": "this nvidia-ml-py has no nvmlDeviceGetPersistenceMode",
    }
    assert gpu.problems(before, during, after) == []  # nothing was seen: not a fault of the run
    assert gpu.cause(during[0], during[1]) is None
    assert gpu.process_memory_bytes() == (None, "NVML: Insufficient Permissions")
    assert gpu.energy_meter().reason == "NVML: Insufficient Permissions"


def test_a_driver_that_goes_away_in_the_middle():
    gpu = replayed("driver_goes_away")
    before, during, after = measured(gpu)
    assert before["sm_clock_mhz"] == 1980
    assert after["sm_clock_mhz"] is None
    assert after["unavailable"]["sm_clock_mhz"] == "NVML: GPU is lost"
    assert gpu.problems(before, during, after) == ["NVML stopped answering: GPU is lost"]
    assert gpu.energy_meter().reason == "NVML: GPU is lost"
    assert gpu.cause(during[0], during[-1]) is None


def test_what_never_answered_did_not_stop_answering():
    gpu = replayed("consumer")
    assert gpu.problems(*measured(gpu)) == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML Shared Library Not Found"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "Insufficient Permissions"),
    ],
)
def test_nvml_that_does_not_start(code, text):
    gpu = replayed("healthy", nvmlInit={"error": code})
    state = gpu.state()
    known = {name for name, value in state.items() if value is not None}
    assert known == {"time_s", "unavailable"}
    assert all(text in reason for reason in state["unavailable"].values())
    assert gpu.problems(*measured(gpu)) == []
    assert text in gpu.process_memory_bytes()[1]
    assert text in gpu.energy_meter().reason


def test_a_uuid_that_nvml_does_not_know():
    library = NvmlReplay(session("healthy"))
    nvml = open_nvml(library, "GPU-of-a-slice")
    gpu = CudaHardware("NVIDIA H200 MIG 1g.18gb", nvml, frozenset({4242}), users=1)
    reason = gpu.state()["unavailable"]["sm_clock_mhz"]
    assert "GPU-of-a-slice" in reason
    assert "Not Found" in reason
    assert "MIG" in reason


def test_pynvml_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml = nvml_module.nvml_of(torch.device("cuda", 0))
    assert isinstance(nvml, NoNvml)
    assert "pip install nvidia-ml-py" in nvml.reason


def test_mig_is_no_problem_but_has_no_energy_of_its_own():
    gpu = replayed("healthy", nvmlDeviceGetMigMode=[1, 1])
    before, during, after = measured(gpu)
    assert before["mig_enabled"] is True
    assert gpu.problems(before, during, after) == []
    meter = gpu.energy_meter()
    assert "MIG is on" in meter.reason
    assert meter.read_j() is None


LISTED = [
    {"pid": 10, "usedGpuMemory": 8 * GIB},
    {"pid": 11, "usedGpuMemory": 1 * GIB},
    {"pid": 12, "usedGpuMemory": None},
]


@pytest.mark.parametrize(
    ("own", "users", "strangers"),
    [
        ({10}, 1, [11, 12]),
        ({10, 11}, 2, [12]),
        ({10, 99}, 2, [11, 12]),  # 99 of ours has not touched the GPU
        ({98}, 1, [12, 11]),  # a container: none is recognised, one of them is ours
        ({97, 98}, 2, [12]),
        ({97, 98}, 1, [12, 11]),  # one of ours does not use this GPU
        ({96, 97, 98, 99}, 4, []),
    ],
)
def test_who_is_a_stranger(own, users, strangers):
    gpu = replayed("healthy", frozenset(own), users, nvmlDeviceGetComputeRunningProcesses=LISTED)
    state = gpu.state()
    assert [process["pid"] for process in state["other_processes"]] == strangers
    assert state["other_process_count"] == len(strangers)


def test_a_stranger_who_came_and_went_between_the_states():
    stranger = [{"pid": 4242, "usedGpuMemory": GIB}, {"pid": 5, "usedGpuMemory": GIB}]
    alone = [{"pid": 4242, "usedGpuMemory": GIB}]
    gpu = replayed(
        "healthy",
        nvmlDeviceGetComputeRunningProcesses={"sequence": [alone, alone, stranger, alone]},
    )
    problems = gpu.problems(*measured(gpu))
    assert problems == ["1 other process(es) used the GPU (memory unknown)"]


def test_memory_that_nvml_books_to_this_process():
    mine = {"pid": os.getpid(), "usedGpuMemory": 3 * GIB}
    listed = replayed("healthy", nvmlDeviceGetComputeRunningProcesses=[LISTED[0], mine])
    assert listed.process_memory_bytes() == (3 * GIB, None)
    untold = {**mine, "usedGpuMemory": None}
    gpu = replayed("healthy", nvmlDeviceGetComputeRunningProcesses=[untold])
    assert gpu.process_memory_bytes() == (None, "NVML does not report a process's memory")
    missing, reason = replayed("healthy").process_memory_bytes()
    assert missing is None
    assert "container" in reason


def reading(clock=1980, reasons=(), others=0):
    return {
        "sm_clock_mhz": clock,
        "throttle_reasons": list(reasons),
        "other_process_count": others,
    }


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [
        (reading(), reading(), None),
        (reading(2000), reading(1941), None),  # 2.95 %
        (reading(2000), reading(1935), "clock drop"),  # 3.25 %
        (reading(1935), reading(2000), None),
        (reading(), reading(345, ["idle"]), None),  # the block was over: nothing ran any more
        (reading(), reading(1500, ["power cap"]), "throttling: power cap"),
        (reading(), reading(reasons=["application clocks"]), None),
        (reading(), reading(others=1), "another process"),
        (reading(others=1), reading(others=1), None),
        (reading(None), reading(None), None),
    ],
)
def test_cause_of_a_slow_block_on_a_gpu(before, after, cause):
    assert replayed("healthy").cause(before, after) == cause


@pytest.mark.parametrize(
    ("clocks", "spread"), [([2000, 1901], False), ([2000, 1899], True), ([None, 2000], False)]
)
def test_spread_of_the_clock(clocks, spread):
    gpu = replayed("healthy")
    problems = gpu.problems(gpu.state(), [reading(clock) for clock in clocks], gpu.state())
    assert bool(problems) == spread


def test_an_idle_gpu_between_blocks_is_no_spread():
    gpu = replayed("healthy")
    during = [reading(1980), reading(345, ["idle"]), reading(1980)]
    assert gpu.problems(gpu.state(), during, gpu.state()) == []


def test_the_energy_counter_is_in_millijoules():
    meter = replayed("healthy").energy_meter()
    first, second = meter.read_j(), meter.read_j()
    assert first == 918335.645  # the first answer went to the check whether there is one
    assert second - first == pytest.approx(62.0)
    assert meter.power_w() == 118.204


# --- a CPU ---

STAT = "cpu  1000 200 300 99999 50 10 20 70 400 30\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
CPUINFO = "processor\t: 0\nmodel name\t: Test CPU\ncpu MHz\t\t: 2000.0\n\ncpu MHz\t\t: 3000.0\n"


@pytest.fixture
def system(tmp_path):
    """Return folders like /proc and /sys/devices/system/cpu."""
    proc, cpu = tmp_path / "proc", tmp_path / "cpu"
    proc.mkdir()
    (proc / "stat").write_text(STAT)
    (proc / "cpuinfo").write_text(CPUINFO)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   12345 kB\n")
    for number, khz in enumerate((1_000_000, 3_000_000)):
        folder = cpu / f"cpu{number}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
        (folder / "scaling_governor").write_text("powersave\n")
    return {"proc": proc, "cpu": cpu, "powercap": tmp_path / "powercap"}


def test_state_of_a_cpu(system):
    cpu = CpuHardware(**system)
    assert cpu.name == "Test CPU (1 threads)"
    state = cpu.state()
    # user, nice, system, irq, softirq and steal; a guest's time is in user already.
    assert state["cpu_busy_s"] == 1600 / os.sysconf("SC_CLK_TCK")
    assert state["memory_available_bytes"] == 12345 * 1024
    assert state["cpu_mhz"] == 2000.0
    assert state["scaling_governor"] == "powersave"
    assert state["threads"] == 1
    assert "unavailable" not in state
    assert json.loads(json.dumps(state)) == state


def test_a_cpu_without_frequency_scaling_tells_its_clock_in_cpuinfo(system):
    state = CpuHardware(**{**system, "cpu": system["cpu"] / "none"}).state()
    assert state["cpu_mhz"] == 2500.0
    assert "No such file" in state["unavailable"]["scaling_governor"]


def test_a_system_without_proc(tmp_path):
    cpu = CpuHardware(proc=tmp_path / "no", cpu=tmp_path / "no", powercap=tmp_path / "no")
    before, during, after = measured(cpu)
    missing = {"cpu_busy_s", "scaling_governor", "cpu_mhz", "memory_available_bytes"}
    assert set(before["unavailable"]) == missing
    assert all("No such file" in reason for reason in before["unavailable"].values())
    assert cpu.problems(before, during, after) == []
    assert cpu.cause(before, after) is None


def test_a_proc_that_says_something_else(system):
    (system["proc"] / "stat").write_text("cpu 1 2\n")
    state = CpuHardware(**system).state()
    assert state["cpu_busy_s"] is None
    assert "not reported by this system" in state["unavailable"]["cpu_busy_s"]


def moment(time_s, busy_s, own_s):
    return {"time_s": time_s, "cpu_busy_s": busy_s, "own_cpu_s": own_s}


def test_work_of_others_is_told_in_cores():
    cpu = CpuHardware()
    before, after = moment(100, 50, 5), moment(120, 65, 15)  # 5 s of others in 20 s
    during = [moment(110, 55, 10)]
    assert cpu.problems(before, during, after) == ["other processes used 0.25 cores on average"]


@pytest.mark.parametrize(
    ("elapsed_s", "others_s", "found"),
    [
        (10.0, 1.00, False),  # a tenth of a core
        (10.0, 1.05, True),
        (0.1, 0.02, False),  # two ticks of 10 ms may be the counters' rounding
        (10.0, -0.5, False),  # a child was waited for: its time comes at once
    ],
)
def test_how_much_work_of_others_is_too_much(elapsed_s, others_s, found):
    before, after = moment(0, 0, 0), moment(elapsed_s, 3 + others_s, 3)
    assert bool(CpuHardware().problems(before, [], after)) == found


def test_readings_that_could_not_be_made_are_left_out():
    broken = {**moment(5, None, 1), "unavailable": {"cpu_busy_s": "gone"}}
    cpu = CpuHardware()
    assert cpu.problems(moment(0, 0, 0), [broken], moment(10, 1, 1)) == []
    assert cpu.problems(moment(0, 0, 0), [broken], moment(10, 9, 1)) != []
    assert cpu.cause(moment(0, 0, 0), broken) is None


@pytest.mark.parametrize(("others_s", "cause"), [(0.31, None), (0.33, "another process")])
def test_cause_of_a_slow_block_on_a_cpu(others_s, cause):
    assert CpuHardware().cause(moment(0, 0, 0), moment(1, 1 + others_s, 1)) == cause


def test_children_are_ours_while_they_live(system):
    """A loader's worker, and a parent process named as ours, are no strangers."""
    child = system["proc"] / "4711"
    child.mkdir()
    tick = os.sysconf("SC_CLK_TCK")
    fields = ["S", "1", "1", "0", "-1", "0", "0", "0", "0", "0", "0"]
    times = [2 * tick, 3 * tick, 4 * tick, 5 * tick]
    stat = f"4711 (a (strange) name) {' '.join(map(str, fields + times))} 20 0 1\n"
    (child / "stat").write_text(stat)
    alone = CpuHardware(**system).during()["own_cpu_s"]
    together = CpuHardware(frozenset({os.getpid(), 4711}), **system).during()["own_cpu_s"]
    assert together - alone == pytest.approx(14.0, abs=0.5)
    gone = CpuHardware(frozenset({os.getpid(), 4712}), **system).during()["own_cpu_s"]
    assert gone == pytest.approx(alone, abs=0.5)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs /proc")  # noqa: PTH110
def test_work_of_this_process_is_own_and_that_of_another_shows():
    cpu = CpuHardware()
    before, began = cpu.during(), time.process_time()
    while time.process_time() - began < 0.2:
        pass
    after = cpu.during()
    assert after["own_cpu_s"] - before["own_cpu_s"] >= 0.18
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    stranger = subprocess.Popen([sys.executable, "-c", spin])
    while stranger.poll() is None and cpu.during()["cpu_busy_s"] - after["cpu_busy_s"] < 0.25:
        time.sleep(0.02)
    seen = cpu.during()  # before the child is waited for, which makes its time ours
    stranger.wait()
    assert seen["cpu_busy_s"] - after["cpu_busy_s"] >= 0.2


def test_reading_a_cpu_in_the_middle_is_cheap():
    cpu = CpuHardware()
    times = []
    for _ in range(20):
        began = time.perf_counter()
        cpu.during()
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


def test_a_cpu_has_no_memory_of_its_own_to_ask():
    assert CpuHardware().process_memory_bytes() == (None, "not a GPU")


def test_hardware_of_a_cpu():
    assert isinstance(hardware_of(torch.device("cpu")), CpuHardware)
    assert isinstance(hardware_of(torch.device("cpu"), frozenset({1})), CpuHardware)


@pytest.mark.parametrize(
    ("own", "settings", "users"),
    [
        (None, {}, [1]),
        ({1, 2}, {}, [2]),
        ({1, 2}, {"users": 1}, [1]),  # of a user's step: the parent leaves the GPU alone
        ({1, 2, 3}, {"count": 3}, [1, 1, 1]),  # ranks
        ({1, 2, 3, 4}, {"count": 3}, [2, 1, 1]),  # ranks and the parent, which uses the first GPU
    ],
)
def test_how_many_of_our_processes_use_a_gpu(own, settings, users, monkeypatch):
    """In a container, where NVML names none of them, so many do not count as strangers."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(hardware, "nvml_of", lambda device: open_nvml(library, library.uuid))
    listed = [{"pid": pid, "usedGpuMemory": GIB} for pid in range(100, 106)]
    library = NvmlReplay(session("healthy", nvmlDeviceGetComputeRunningProcesses=listed))
    gpu = hardware_of(torch.device("cuda", 0), own and frozenset(own), **settings)
    state = gpu.state()
    states = [state, *state.get("other_gpus", [])]
    assert [len(listed) - one["other_process_count"] for one in states] == users


def test_a_users_step_is_alone_on_the_gpu(monkeypatch):
    """The parent, whose id is known, never uses it."""
    asked = []

    def ask(*given, **kinds):
        asked.append(kinds)
        return hardware_of(*given, **kinds)

    monkeypatch.setattr(user_step, "hardware_of", ask)
    user_step.measure_steps({"mine": lambda: None}, device="cpu", max_time_s=0.01)
    assert asked == [{"users": 1}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_answers():
    gpu = hardware_of(torch.device("cuda", 0))
    state = gpu.state()
    nones = {key for key, value in state.items() if value is None}
    assert nones == set(state.get("unavailable", {}))
    assert all(isinstance(text, str) for text in gpu.problems(state, [gpu.during()], gpu.state()))


def test_versions_name_timm_without_importing_it():
    code = (
        "import sys; from kdprof.hardware.device import versions; "
        "assert versions()['timm'] != 'none'; sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"kdprof", "python", "torch", "timm", "cuda", "cudnn"} <= set(versions())
