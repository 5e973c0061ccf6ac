"""A real Slurm of several nodes on this machine: each node has a network, host name, /dev/shm and
processes of its own.

Needs root, and Debian's slurm-wlm, munge and iproute2 (`scripts/test-packages`). Memory and devices
are not enforced (no cgroups); GPUs are names without devices behind them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

NODE = Path(__file__).with_name("node.sh")
ENTER = Path(__file__).with_name("enter.sh")
PROJECT = Path(__file__).parents[2]
_NETWORK = "10.77.0"
_BRIDGE = "lfslurm"
_PROGRAMS = (
    "sacct sacctmgr sbatch scancel scontrol sinfo slurmctld slurmd squeue srun sstat".split()
)
"""Programs that a rig with another Debian takes from there."""
_PACKAGES = "slurm-wlm,munge,iproute2,procps,libffi8,libsqlite3-0,libgomp1,libexpat1"
"""Slurm, and what this machine's Python needs in a job."""
_COMMANDS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter", "setpriv")


def missing() -> str | None:
    """Why there can be no rig here, or None."""
    lacks = [command for command in _COMMANDS if shutil.which(command) is None]
    if os.geteuid() != 0:
        return "a rig needs root (network namespaces)"
    if lacks:
        return f"no {', '.join(lacks)} (apt-get install slurm-wlm munge iproute2)"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else "this machine gives no network namespaces"


class Unavailable(Exception):
    """A rig that cannot be made on this machine."""


def make_debian(suite: str) -> Path:
    """The root folder of a Debian with its Slurm, made once by debootstrap.

    Raises Unavailable if it cannot be made here.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafleet-tests"
    root = base / suite
    if (root / ".complete").is_file():
        return root
    if Path(sys.base_prefix) == Path("/usr"):
        raise Unavailable("this Python is Debian's own, and does not run in another Debian")
    if shutil.which("debootstrap") is None:
        raise Unavailable("no debootstrap (apt-get install debootstrap)")
    shutil.rmtree(root, ignore_errors=True)
    base.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", suite, str(root)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if done.returncode:
        raise Unavailable(
            f"debootstrap made no {suite}: {(done.stdout + done.stderr).strip()[-300:]}"
        )
    (root / ".complete").touch()
    return root


@dataclass
class Rig:
    """A cluster in a folder with a short absolute path."""

    folder: Path
    nodes: int = 2
    cpus: int = 4
    gpus: int = 2
    root: Path | None = None
    """Root folder of another Debian, whose Slurm is used."""
    started: list[int] = field(default_factory=list)
    """Process numbers of what is to be ended, in the order of their start."""
    parents: dict[int, int] = field(default_factory=dict)
    """Of each node: the process outside that takes the node with it."""

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster and no other."""
        variables = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        if self.root is not None:
            variables["PATH"] = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return os.environ | variables

    def up(self) -> None:
        """Start it, and wait until every node is idle."""
        for name in ("state", "log", "munge", "dev", *(f"spool/node{n}" for n in self._numbers())):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)  # munged wants the way to its socket open to all
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for number in range(self.gpus):  # device nodes of /dev/null
            os.mknod(self.folder / "dev" / f"nvidia{number}", 0o020666, os.makedev(1, 3))
        self._write_configuration()
        if self.root is not None:
            self._write_programs(self.root)
        self._clear_links()  # of a rig whose process was killed
        self._run("ip", "link", "add", _BRIDGE, "type", "bridge")
        self._run("ip", "addr", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
        self._run("ip", "link", "set", _BRIDGE, "up")
        self._start_daemons()
        for number in self._numbers():
            self._start_node(number)
        deadline = time.monotonic() + 60
        while self.asked("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() != str(
            self.nodes
        ):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the rig did not come up: {self.asked('sinfo', '-Nel')}")
            time.sleep(0.1)

    def _numbers(self) -> range:
        return range(1, self.nodes + 1)

    def _write_configuration(self) -> None:
        rig, host = self.folder, socket.gethostname()
        names = "\n".join(f"NodeName=node{n} NodeAddr={_NETWORK}.{10 + n}" for n in self._numbers())
        (rig / "slurm.conf").write_text(f"""\
ClusterName=rig
SlurmctldHost={host}({_NETWORK}.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={rig}/munge/sock
CredType=cred/munge
StateSaveLocation={rig}/state
SlurmdSpoolDir={rig}/spool/%n
SlurmctldPidFile={rig}/slurmctld.pid
SlurmdPidFile={rig}/slurmd.%n.pid
SlurmctldLogFile={rig}/log/slurmctld.log
SlurmdLogFile={rig}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={rig}/log/jobcomp.txt
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
{"" if self.root else "SwitchType=switch/none"}
ReturnToService=2
JobRequeue=1
MinJobAge=3600
FirstJobId=10
KillWait=30
InactiveLimit=0
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=DEFAULT CPUs={self.cpus} RealMemory=8000 Gres=gpu:{self.gpus} State=UNKNOWN
{names}
PartitionName=main Nodes=node[1-{self.nodes}] Default=YES MaxTime=1:00:00 DefaultTime=10:00 PriorityTier=10 State=UP
PartitionName=low Nodes=node[1-{self.nodes}] MaxTime=1:00:00 DefaultTime=10:00 PriorityTier=1 GraceTime=60 State=UP
""")
        devices = f"{rig}/dev/nvidia[0-{self.gpus - 1}]"
        (rig / "gres.conf").write_text(f"NodeName=node[1-{self.nodes}] Name=gpu File={devices}\n")
        nodes = [f"{_NETWORK}.{10 + n} node{n}" for n in self._numbers()]
        (rig / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", f"{_NETWORK}.1 {host}", *nodes]) + "\n"
        )

    def _write_programs(self, root: Path) -> None:
        """Programs that run those of another Debian, and the folders that these see."""
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        folders = [Path("/dev"), Path("/proc"), Path("/sys"), Path("/tmp"), Path.home(), PROJECT]
        folders += [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
        kept = [
            folder
            for folder in dict.fromkeys(folders)
            if not any(other in folder.parents for other in folders)
        ]
        (self.folder / "binds").write_text("".join(f"{folder}\n" for folder in kept))
        (self.folder / "bin").mkdir()
        for name in _PROGRAMS:
            program = self.folder / "bin" / name
            program.write_text(f'#!/bin/bash\nexec {ENTER} {root} {self.folder} {name} "$@"\n')
            program.chmod(0o755)

    def _start_daemons(self) -> None:
        munge = self.folder / "munge"
        daemons = (
            ["munged", f"--key-file={munge}/key", f"--socket={munge}/sock", f"--log-file={munge}/log",
             f"--seed-file={munge}/seed", f"--pid-file={munge}/pid", "--num-threads=2", "--foreground"],
            ["slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf")],
        )  # fmt: skip
        for command in daemons:
            self._spawn(command, self.folder / "log" / f"{command[0]}.out")
            deadline = time.monotonic() + 10
            while (
                command[0] == "munged"
                and not (munge / "sock").exists()
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)

    def _start_node(self, number: int) -> None:
        inside, outside = f"lfp{number}", f"lfv{number}"
        self._run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
        self._run("ip", "link", "set", outside, "master", _BRIDGE, "up")
        spaces = (
            "--net",
            "--pid",
            "--uts",
            "--ipc",
            "--mount",
            "--fork",
            "--kill-child",
            "--mount-proc",
        )
        node = [
            str(NODE),
            f"node{number}",
            str(self.folder),
            f"{_NETWORK}.{10 + number}",
            f"{_NETWORK}.1",
        ]
        parent = self._spawn(["unshare", *spaces, *node], self.folder / "log" / f"node{number}.out")
        self.parents[number] = parent
        children = Path(f"/proc/{parent}/task/{parent}/children")
        deadline = time.monotonic() + 10
        while not children.read_text().split() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._run(
            "ip", "link", "set", inside, "netns", children.read_text().split()[0], "name", "eth0"
        )

    def _spawn(self, command: list[str], log: Path) -> int:
        with log.open("ab") as out:
            # A test run that is killed takes its rig along.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=self.environment,
            )
        self.started.append(process.pid)
        return process.pid

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, env=self.environment)

    def asked(self, *command: str) -> str:
        """What one of Slurm's commands says, whatever its exit code."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=self.environment
        )
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a script; returns the job's number."""
        path = self.folder / f"job-{time.monotonic_ns()}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        command = [
            "sbatch",
            "--parsable",
            f"--output={self.folder}/log/%j.out",
            *options,
            str(path),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=self.environment
        )
        return done.stdout.strip()

    @property
    def local(self) -> Path:
        """Each node's own disk."""
        return Path("/tmp/disk")

    def on(self, number: int, *command: str, check: bool = True) -> str:
        """What a command says that is run inside a node."""
        inside = (
            Path(f"/proc/{self.parents[number]}/task/{self.parents[number]}/children")
            .read_text()
            .split()[0]
        )
        spaces = ("--mount", "--net", "--pid", "--uts", "--ipc")
        line = ["nsenter", f"--target={inside}", *spaces, *command]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=60, check=check, env=self.environment
        )
        return done.stdout

    def processes(self, number: int) -> list[str]:
        """Command lines of what runs in a node, beside its own daemons."""
        lines = self.on(number, "ps", "-eo", "args", "--no-headers").splitlines()
        return [
            line
            for line in lines
            if not line.startswith(("/bin/bash " + str(NODE), "slurmd", "ps ", "slurmstepd"))
        ]

    def lose_node(self, number: int) -> None:
        """A node dies: its machine is gone at once, with all that ran on it."""
        parent = self.parents.pop(number)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        self.started.remove(parent)

    def bring_back(self, number: int) -> None:
        """A dead node comes back, empty."""
        subprocess.run(["ip", "link", "del", f"lfv{number}"], capture_output=True, check=False)
        self._start_node(number)
        deadline, seen = time.monotonic() + 150, [""]
        while seen[-1] not in (
            "idle",
            "mixed",
        ):  # Slurm may count the cores of a step that died with it for some time
            state = self.asked(
                "sinfo", "-h", "-n", f"node{number}", "-p", "main", "-o", "%T"
            ).strip()
            if state != seen[-1]:
                seen.append(state)
            if time.monotonic() > deadline:
                log = (self.folder / "log" / "slurmctld.log").read_text().splitlines()[-20:]
                raise RuntimeError(
                    "\n".join([f"node{number} did not come back, but was {seen}", *log])
                )
            time.sleep(0.2)

    def down(self) -> None:
        """End every process of it and take the network away."""
        for pid in reversed(
            self.started
        ):  # the nodes first: their process 1 takes all that runs in them along
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._clear_links()
        with suppress(OSError):
            self.local.rmdir()

    def _clear_links(self) -> None:
        for link in [_BRIDGE, *(f"lfv{number}" for number in self._numbers())]:
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
