"""What `kdprof doctor` finds: here, on replayed GPUs, and where things are missing."""

import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from nvml_replay import replayed
from rich.console import Console
from small_study import small_study

from kdprof.hardware.cpu import CpuHardware
from kdprof.measure import doctor, feeding
from kdprof.measure.doctor import findings, findings_here
from kdprof.measure.feeding import Feeding, measure_feeding
from kdprof.progress import Progress
from kdprof.reports.doctor import print_findings
from kdprof.reports.feeding import print_feeding
from kdprof.resolve import ResolvedStudy

CPU = torch.device("cpu")


def look(hardware=None):
    found = findings(CPU, hardware or CpuHardware())
    assert len({finding.what for finding in found}) == len(found)
    return {finding.what: finding for finding in found}


def test_every_row_says_what_was_found_and_what_is_missing_costs():
    found = [*look().values(), *look(replayed("consumer")).values()]
    assert all(finding.found for finding in found)
    missing = [finding for finding in found if finding.found.startswith("none:")]
    assert len(missing) > 5
    assert [finding for finding in missing if not finding.costs] == []


def test_a_machine_without_a_gpu():
    rows = look()
    assert rows["device"].found.startswith("cpu: ")
    assert rows["GPU"].found.startswith("none:")
    assert "CPU" in rows["GPU"].costs
    assert rows["clock"].found == "perf_counter"
    assert rows["resumed training"].costs == ""
    assert {"torch", "timm", "fvcore", "nvidia-ml-py", "CPU cores", "free memory"} <= set(rows)


def test_a_healthy_gpu_lacks_nothing():
    rows = look(replayed("healthy"))
    assert rows["driver_version"].found == "570.86.15"
    assert rows["sm_clock_mhz"].found == "1980"
    assert rows["throttle_reasons"].found == "idle"
    assert rows["other_processes"].found == "none"
    assert rows["ecc_enabled"].found == "on"
    assert rows["mig_enabled"].found == "off"
    assert rows["power_limit_w"].found == "700"
    assert rows["energy"].found.startswith("NVML total energy counter")
    assert [row for row in rows.values() if "NVML" in row.found and row.costs] == []


def test_a_shared_and_throttled_gpu():
    gpu = replayed("throttled_shared")
    for _ in range(2):
        gpu.state()
    rows = look(gpu)
    assert rows["throttle_reasons"].found == (
        "power cap, software thermal slowdown (it is slowed down now)"
    )
    assert rows["other_processes"].found == "2, 12.0 GiB"


def test_each_missing_reading_has_its_reason_and_its_cost():
    rows = look(replayed("consumer"))
    assert rows["power_w"].found == "none: NVML: Not Supported"
    assert "cross-check" in rows["power_w"].costs
    assert rows["ecc_enabled"].costs == doctor.RECORDED_ONLY
    assert rows["energy"].found == "none: NVML: Not Supported"
    assert "joules" in rows["energy"].costs
    rows = look(replayed("no_permission"))
    assert "Insufficient Permissions" in rows["other_processes"].found
    assert "other processes" in rows["other_processes"].costs


def test_a_driver_that_is_not_loaded_takes_one_row():
    rows = look(replayed("healthy", nvmlInit={"error": 9}))
    assert "Driver Not Loaded" in rows["state of the device"].found
    assert "throttling" in rows["state of the device"].costs
    assert "sm_clock_mhz" not in rows


def test_a_system_without_proc(tmp_path):
    no = tmp_path / "no"
    rows = look(CpuHardware(proc=no, cpu=no, powercap=no))
    assert "not noticed" in rows["cpu_busy_s"].costs
    assert rows["threads"].costs == ""
    assert "no RAPL package" in rows["energy"].found


@pytest.mark.parametrize(("mebibytes", "warned"), [(64, True), (8192, False)])
def test_shared_memory_of_a_container(tmp_path, monkeypatch, mebibytes, warned):
    usage = SimpleNamespace(free=mebibytes * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    finding = doctor._shared_memory(tmp_path)
    assert finding.found == f"{mebibytes} MiB free"
    assert ("--shm-size" in finding.costs) == warned
    assert "data_settings.workers = 0" in doctor._shared_memory(tmp_path / "no").costs


@pytest.mark.parametrize(
    ("most", "warned"), [(256, True), (4096, False), (resource.RLIM_INFINITY, False)]
)
def test_open_files(monkeypatch, most, warned):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (most, most))
    assert bool(doctor._open_files().costs) == warned


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    finding = doctor._compiler(CPU)
    assert finding.found == "none: it needs a C++ compiler, such as g++"
    assert finding.costs == "a compiled step fails"
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert doctor._compiler(CPU) == doctor.Finding("torch.compile", "possible")


def test_memory_that_nobody_can_tell(monkeypatch):
    monkeypatch.setattr(doctor, "available_bytes", lambda device: None)
    assert "not refused" in doctor._free_memory(CPU).costs


def test_the_table_is_printed(capsys):
    print_findings(findings_here(), Console(width=160))
    printed = capsys.readouterr().out
    for text in ("what is lost without it", "torch", "energy", "torch.compile"):
        assert text in printed


# Whether the loader keeps up


def rates(**changes) -> Feeding:
    found = {
        "decoding": 100, "reading": 900, "lookup": 80, "lookup_cached": 1000, "augmentation": 5000,
        "loader": 80, "step": 200, "cache": "none", "workers": 1, "cores": 16,
        "on_cpu": False,
    }  # fmt: skip
    return Feeding(**{**found, **changes})


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (rates(loader=640), "the loader delivers 3.2 x what the step uses"),
        (
            rates(loader=640, augmentation=800, on_cpu=True),
            "the loader delivers 3.2 x what the step uses; on a CPU augmentation adds 25% "
            "to the step",
        ),
        (
            rates(),
            'the loader delivers 0.4 x what the step uses; set data_settings.cache = "disk"',
        ),
        (
            rates(workers=0, step=2000),
            "the loader delivers 0.04 x what the step uses; set data_settings.cache = "
            '"disk" and data_settings.workers = 3',
        ),
        (
            rates(lookup_cached=81),
            "the loader delivers 0.4 x what the step uses; set data_settings.workers = 3",
        ),
        (
            rates(lookup=900, cache="disk", step=30_000),
            "the loader delivers 0.0027 x what the step uses; set "
            "data_settings.workers = 16, which are all 16 cores and still too few",
        ),
        (
            rates(lookup=900, cache="memory", workers=8, augmentation=150, loader=149),
            "the loader delivers 0.74 x what the step uses; augmentation alone makes "
            "150 images/s; no setting helps",
        ),
    ],
)
def test_verdict_on_the_loader(found, verdict):
    assert found.verdict() == verdict


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_the_input_of_a_study(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.setattr(feeding, "TIMED_S", 0.02)
    study = ResolvedStudy(
        small_study(
            data_settings__cache=cache,
            data_settings__cache_folder=str(tmp_path / "cache"),
            data_settings__workers=1,
        )
    )
    found = measure_feeding(study, Progress(None))
    assert all(value > 0 for value in vars(found).values() if isinstance(value, float))
    assert (found.cache, found.workers) == (cache, 1)
    assert found.loader <= 1.5 * found.augmentation
    kept = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert sorted(kept) == ([".cache", ".lock"] if cache == "disk" else [])  # no trial is left
    print_feeding(found, Console(width=160))
    printed = capsys.readouterr().out
    assert f'data_settings.cache = "{cache}"' in printed
    assert printed.splitlines()[-1] == found.verdict()


def test_what_the_system_lacks_is_shown_with_the_way_round(monkeypatch, tmp_path):
    def fail(error):
        def failing(*arguments, **keywords):
            raise error

        return failing

    monkeypatch.setattr("fcntl.flock", fail(OSError(38, "Function not implemented")))
    monkeypatch.setattr("socket.getaddrinfo", fail(OSError(-2, "Name or service not known")))
    monkeypatch.setattr("pwd.getpwuid", fail(KeyError("getpwuid()")))
    monkeypatch.delenv("HOME")
    found = {one.what: one for one in doctor._surroundings(tmp_path)}
    assert set(found) == {
        "locks", "host name", "account", "home folder", "temporary folder", "output"
    }  # fmt: skip
    for what in ("locks", "host name", "account", "home folder"):
        assert found[what].costs, what
    monkeypatch.setattr("tempfile.NamedTemporaryFile", fail(OSError(28, "No space left")))
    assert "TMPDIR" in doctor._temporary().costs
