"""A Slurm cluster of one node, this machine: real daemons, a configuration of its own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
CONFIGURATION = """
ClusterName=kdprof
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=30
MinJobAge=300
ReturnToService=2
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "only root can start a cluster for the test"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"no {', '.join(lacking)}: install slurm-wlm and munge" if lacking else None


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Running daemons; ``environment`` lets commands find them."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        controller, node = free_ports(2)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(host=self.host, folder=folder, controller=controller, node=node)
        )
        self.environment = {**os.environ, "SLURM_CONF": str(configuration)}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.folder}/munge.socket", f"--log-file={self.folder}/munged.log",
            f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        self.wait(lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D", "-N", self.host)
        return self

    def __exit__(self, *_) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", check=False)
        for name in ("slurmd", "slurmctld", "munged"):
            self.stop(name)

    def _start(self, name: str, *options: str) -> None:
        log = (self.folder / f"{name}.out").open("a")
        self._daemons[name] = subprocess.Popen(
            [name, *options], env=self.environment, stdout=log, stderr=log
        )

    def has_node(self) -> bool:
        """Wait until the node takes jobs; say whether it came to that."""
        deadline = time.monotonic() + 60
        while not self.takes_jobs() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.takes_jobs()

    def takes_jobs(self) -> bool:
        return self.node_state().startswith(("idle", "mix", "alloc"))

    def start_node_again(self) -> None:
        """Start it after it was down."""
        self._start("slurmd", "-D", "-N", self.host)
        self.run("scontrol", "update", f"nodename={self.host}", "state=resume")
        self.wait(self.takes_jobs)

    def kill_node(self) -> None:
        """End the node at once with all that runs on it, and nothing of another cluster."""
        self.stop("slurmd", signal.SIGKILL)
        for pid in self._on_node():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"nodename={self.host}", "state=down", "reason=test")
        self.wait(lambda: not self.running())

    def _on_node(self) -> list[int]:
        """Return the step daemons of this cluster, which are no children of slurmd, and what they
        started."""
        ours, job = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(), b"SLURMD_NODENAME="
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                variables = (process / "environ").read_bytes().split(b"\0")
                step = b"slurmstepd" in (process / "cmdline").read_bytes()
                if ours in variables and (step or any(v.startswith(job) for v in variables)):
                    found.append(int(process.name))
        return found

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a daemon."""
        daemon = self._daemons[name]
        daemon.send_signal(number)
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()

    def node_state(self) -> str:
        return self.run("sinfo", "--noheader", "--format=%t", check=False).strip()

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=check, timeout=60
        )
        return done.stdout

    def queue(self) -> dict[str, str]:
        """States of the jobs in the queue, by id."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def running(self) -> list[str]:
        return [job for job, state in self.queue().items() if state == "RUNNING"]

    def wait(self, happened, timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.1)

    def told(self) -> str:
        """The daemons' last words."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in logs)
