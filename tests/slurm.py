"""A real Slurm of one node in a temporary folder: no munge, no systemd, no cgroups, nothing
installed into the system. Debian or Ubuntu, as root."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

CONFIG = """\
ClusterName=mini
SlurmctldHost={node}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# How long a requeued job waits, too; 5 is the least.
AuthInfo=cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
PluginDir={plugins}
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# The time between SIGTERM and the end is the longer of GraceTime and these two together.
KillWait=10
MessageTimeout=5
MinJobAge=300
ReturnToService=2
PropagateResourceLimits=NONE
NodeName={node} NodeAddr=127.0.0.1 CPUs=2 CoresPerSocket=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={node} Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes={node} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def unpack(prefix: Path) -> Path:
    """Download Slurm's packages and unpack them below `prefix`, once."""
    if any(prefix.glob("usr/sbin/slurmctld*")):
        return prefix
    archives = prefix.with_name(prefix.name + ".debs")
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "--download-only",
           "-o", f"Dir::Cache::archives={archives}", *PACKAGES]  # fmt: skip
    if subprocess.run(get, env=env, capture_output=True).returncode:
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=True)
        subprocess.run(get, env=env, check=True)
    half = Path(tempfile.mkdtemp(dir=prefix.parent))
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(archive), str(half)], check=True)
    half.rename(prefix)
    shutil.rmtree(archives)
    return prefix


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Slurm:
    """Controller and node daemon, between `with` and its end. Partition `high` preempts `low`.

    Args:
        prefix: where `unpack` has put the packages.
    """

    def __init__(self, prefix: Path):
        # Not pytest's folder: the daemons' sockets are in it, and a socket's path is at most 108.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        library = f"{prefix}/usr/lib/{os.uname().machine}-linux-gnu"
        plugins = f"{library}/slurm-wlm"
        own = ("SLURM_", "SBATCH_", "SRUN_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        self.env |= {
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "PATH": f"{prefix}/usr/bin:{prefix}/usr/sbin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{library}:{plugins}",
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir()
        (self.folder / "plugstack.conf").touch()
        self.node = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(CONFIG.format(
            node=self.node, ports=(free_port(), free_port()), folder=self.folder, plugins=plugins,
        ))  # fmt: skip

    def __enter__(self) -> Slurm:
        try:
            self._daemon("slurmctld", "-D")
            self._daemon("slurmd", "-D", "-N", self.node, "-d", self._tool("slurmstepd"))
            self.wait(lambda: self.run("sinfo", "-h", "-p", "low", "-o", "%T") == "idle", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel jobs, end the daemons, and kill what they have left, by process id."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            self.wait(lambda: not self.run("squeue", "-h"), 20)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0") and int(path.parts[2]) != os.getpid():
                    os.kill(int(path.parts[2]), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tool(self, name: str) -> str:
        for each in (name, f"{name}-wlm"):  # Debian's daemons carry the suffix
            found = shutil.which(each, path=self.env["PATH"])
            if found:
                return found
        raise FileNotFoundError(name)

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "wb") as out:
            self.daemons[name] = subprocess.Popen(
                [self._tool(name), *arguments], env=self.env, cwd=self.folder, stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, name: str, *arguments: str, cwd: Path | None = None) -> str:
        """One of Slurm's commands; what it prints."""
        done = subprocess.run(
            [self._tool(name), *arguments], env=self.env, cwd=cwd or self.folder, text=True,
            capture_output=True, timeout=30, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{name} {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path) -> str:
        """`sbatch`; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", number)))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait(self, ready: Callable[[], Any], seconds: float) -> None:
        """Until `ready()`.

        Raises:
            TimeoutError: with the ends of the daemons' logs.
        """
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = sorted((self.folder / "log").iterdir())
                tails = (f"== {f.name}\n{f.read_text(errors='replace')[-2000:]}" for f in logs)
                raise TimeoutError(f"waited {seconds} s\n" + "\n".join(tails))
            time.sleep(0.3)
