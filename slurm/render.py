"""The files of a job on a Slurm cluster, from what it asks and what the site says. Pure.

The values of both stand in one block of quoted assignments; the text around them is the same for every job, and the
site's `setup` lines, which are code, stand as they are. Paths of the run are arguments of `sbatch`, not in the script.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.sites.slurm import SlurmSite
from lorafleet.jobs.text import printable

JOB, NODE = "job.sbatch", "node.sh"
_OBJECTS = 2**31
"""Bytes of Ray's object store on a node at most: trials exchange little through it."""
_LEAST_OBJECTS = 100 * 2**20
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Script:
    """What a job's script depends on beside the site."""

    title: str
    """One line that says what it is."""
    nodes: int
    """Nodes for trials; a head of its own comes on top."""
    verb: str = "exec --trust"
    """What `lorafleet` does in the allocation, with the run's folder as its argument."""
    programs: str = ""
    """Folder of lorafleet's programs, for sites without `setup` lines and container."""
    exports: dict[str, str] = field(default_factory=dict)
    """Variables for every process: caches, offline switches."""
    folders: tuple[str, ...] = ()
    """Folders that a container must see."""
    version: str = ""
    """Lorafleet's."""
    stage: bool = True
    """Whether models are brought to the nodes' own disks, where the site names one."""


def render(site: SlurmSite, script: Script, templates: dict[str, str] | None = None) -> dict[str, str]:
    """The job's files by name. `templates` are the user's own in the place of ours.

    Raises PlacementRefused for a template that jinja2 cannot render.
    """
    context = {
        "title": _one_line(script.title),
        "version": _one_line(script.version),
        "site": site.model_dump(mode="json"),
        "options": options(site, script.nodes),
        "setup": [*_programs(site, script), *site.setup],
        "values": _values(site, script.nodes, stage=script.stage),
        "exports": {name: shlex.quote(value) for name, value in _exports(site, script).items()},
        "step": _step(site, script),
        "inside": _inside(site, script),
        "lead": _lead(site, script),
        "verb": script.verb,
        "caches": _template("caches.sh").rstrip(),
    }
    rendered = {}
    for name in (JOB, NODE):
        text = (templates or {}).get(name) or _template(name)
        try:
            rendered[name] = _ENVIRONMENT.from_string(text).render(context)
        except Exception as error:  # the expressions are the template's own, and may fail in any way
            raise PlacementRefused(
                f"the template of site {site.name} cannot be rendered: {type(error).__name__}: {error}"
            ) from error
    return rendered


class _Sandbox(ImmutableSandboxedEnvironment):
    """Templates read values and write text: they reach no object behind a value, and make no text without end."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply numbers, and repeat short texts. Raises SecurityError."""
        for value, times in ((left, right), (right, left)):
            repeats = isinstance(value, str | list | tuple) and isinstance(times, int)
            if operator == "**" or (repeats and len(value) * times > _LONGEST_TEXT):
                raise SecurityError(f"{operator} makes more than a template may")
        return super().call_binop(context, operator, left, right)


_LONGEST_TEXT = 100_000


def _one_line(text: str) -> str:
    """A text as one quoted word that a comment can hold too: a line break would end the comment."""
    return shlex.quote(" ".join(printable(text).split()))


_ENVIRONMENT = _Sandbox(
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
    comment_start_string="<#",  # bash has ${#name}
    comment_end_string="#>",
)
_ENVIRONMENT.filters["quote"] = lambda value: shlex.quote(str(value))


def _template(name: str) -> str:
    return (resources.files("lorafleet.slurm") / "templates" / f"{name}.j2").read_text(encoding="utf-8")


def options(site: SlurmSite, nodes: int) -> list[str]:
    """The #SBATCH lines, each one option; the parts of a heterogeneous job with `hetjob` between them."""
    least = site.smallest
    common = [f"--time={site.time_limit}", f"--signal=B:USR1@{site.requeue.signal_seconds}", "--open-mode=append"]
    common += ["--requeue" if site.requeue.policy == "requeue" else "--no-requeue"]
    common += [f"--{name}={value}" for name in ("account", "qos") if (value := getattr(site, name))]
    workers = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={least.cpus_per_node}"]
    workers += [f"--mem={_mib(least.memory_gb_per_node)}M", *_gpu_request(site, nodes)]
    workers += [f"--{name}={value}" for name in ("partition", "constraint") if (value := getattr(site, name))]
    extra = [line.strip() for line in site.extra_sbatch]
    # A lost worker node must not end the job: the trials on it begin again on the others.
    alone = ["--no-kill"] if nodes > 1 and not site.head else []
    parts = [[*workers, *common, *alone, *extra]]
    if site.head:
        head = ["--nodes=1", "--ntasks-per-node=1", f"--cpus-per-task={site.head.cpus}"]
        head += [f"--mem={_mib(site.head.memory_gb)}M"]
        for name in ("partition", "constraint"):
            value = getattr(site.head, name) or (site.partition if name == "partition" else None)
            head += [f"--{name}={value}"] if value else []
        parts.insert(0, [*head, *common, *extra])
    lines: list[str] = []
    for part in parts:
        lines += (["hetjob"] if lines else []) + [_option(line) for line in part]
    return lines


def _option(line: str) -> str:
    """An option of sbatch as its own parser reads it: like a shell's word, but nothing is expanded."""
    name, equals, value = line.partition("=")
    return f"{name}{equals}{shlex.quote(value)}" if equals else line


def _gpu_request(site: SlurmSite, nodes: int) -> list[str]:
    gpus = site.smallest.gpus_per_node
    if not gpus:
        return []
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    if site.gpu_request == "gres":
        return [f"--gres=gpu:{kind}{gpus}"]
    if site.gpu_request == "gpus":
        return [f"--gpus={kind}{gpus * nodes}"]
    return [f"--gpus-per-node={kind}{gpus}"]


def _mib(gigabytes: float) -> int:
    return int(gigabytes * 1e9 / 2**20)


def _values(site: SlurmSite, nodes: int, *, stage: bool) -> dict[str, str]:
    """Names of the script's variables and what is assigned to them, as bash."""
    least = site.smallest
    memory = int(least.memory_gb_per_node * 1e9)
    objects = _objects(least.memory_gb_per_node)
    scratch = bash_path(site.scratch_dir or "/tmp")  # nosec B108  # mkdir -m 700
    return {
        "nodes": str(nodes + (1 if site.head else 0)),
        "cpus": str(least.cpus_per_node),
        "memory": str(max(_LEAST_OBJECTS, memory - objects)),
        "objects": str(objects),
        "head_objects": str(_objects(site.head.memory_gb) if site.head else objects),
        "head_works": "0" if site.head else "1",
        "interface": shlex.quote(site.network_interface or ""),
        "scratch": scratch,
        "keep": f"{scratch}/lorafleet-$(id -u)" if site.scratch_dir else "''",
        "stage": "1" if site.scratch_dir and stage else "''",
        "policy": site.requeue.policy,
        "max_restarts": str(site.requeue.max_restarts),
        "signal_seconds": str(site.requeue.signal_seconds),
        "time_limit": str(site.time_limit_seconds),
    }


def _quoted(word: str) -> str:
    """A word as bash; one with a comma is quoted too, so that no reader takes it for a list."""
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def _objects(memory_gb: float) -> int:
    """Bytes of Ray's object store on a node."""
    return max(_LEAST_OBJECTS, min(_OBJECTS, int(memory_gb * 1e8)))


def bash_path(text: str) -> str:
    """A path as bash: a leading ~ or variable is the node's, and everything else stands for itself."""
    if text == "~" or text.startswith("~/"):
        return '"$HOME"' + (shlex.quote(text[1:]) if text[1:] else "")
    found = _VARIABLE.match(text)
    if not found:
        return shlex.quote(text)
    rest = text[found.end() :]
    return f'"${{{found[1] or found[2]}:?}}"' + (shlex.quote(rest) if rest else "")


def _exports(site: SlurmSite, script: Script) -> dict[str, str]:
    given = dict(script.exports)
    if site.network_interface:
        given |= {"NCCL_SOCKET_IFNAME": site.network_interface, "GLOO_SOCKET_IFNAME": site.network_interface}
    return given | site.environment


def _programs(site: SlurmSite, script: Script) -> list[str]:
    """Without set-up lines the job uses the programs that submitted it."""
    if site.setup or site.container or not script.programs:
        return []
    return [f"export PATH={shlex.quote(script.programs)}:$PATH"]


def _step(site: SlurmSite, script: Script) -> list[str]:
    """An srun step of one task on each node, beside others that run."""
    # Since 22.05 srun does not take --cpus-per-task over from sbatch, and would bind a task to one core.
    words = ["srun", "--overlap", "--export=ALL", "--mpi=none", "--cpu-bind=none"]
    if site.head:
        words.append(_quoted("--het-group=0,1"))
    else:
        words += [f"--nodes={script.nodes}", f"--ntasks={script.nodes}", "--ntasks-per-node=1"]
    return words + _pyxis(site, script)


def _pyxis(site: SlurmSite, script: Script) -> list[str]:
    if site.container is None or site.container.kind != "pyxis":
        return []
    mounts = [f"{folder}:{folder}" for folder in script.folders] + list(site.container.mounts)
    others = _quoted("".join(f",{mount}" for mount in mounts)) if mounts else ""
    own = '"$run:$run,$scratch:$scratch,/tmp:/tmp"' if site.scratch_dir else '"$run:$run,/tmp:/tmp"'
    return [_quoted(f"--container-image={site.container.image}"), f"--container-mounts={own}{others}"]


def _inside(site: SlurmSite, script: Script) -> list[str]:
    """What stands before every program that runs in a node's task, as bash."""
    if site.container is None or site.container.kind != "apptainer":
        return ["env"]
    words = ["apptainer", "exec"] + (["--nv"] if site.gpus_per_node else [])
    words += ["--bind", '"$run"', "--bind", '"$scratch"']
    for folder in (*script.folders, *site.container.mounts):
        words += ["--bind", _quoted(folder)]
    return [*words, _quoted(site.container.image)]


def _lead(site: SlurmSite, script: Script) -> list[str]:
    """What stands before every program that runs beside the batch script."""
    pyxis = _pyxis(site, script)
    if not pyxis:
        return _inside(site, script)
    group = ["--het-group=0"] if site.head else []
    return ["srun", "--overlap", "--export=ALL", "--mpi=none", "--nodes=1", "--ntasks=1", *group, *pyxis]


def array_of(site: SlurmSite, tasks: int) -> str:
    """`--array`'s value."""
    return f"0-{tasks - 1}" + (f"%{site.array.max_running}" if site.array.max_running else "")


def submission(
    script: Path, run: Path, name: str, number: int, *, after: str | None = None, array: str | None = None
) -> list[str]:
    """The `sbatch` command; run it with an environment of its own, which is what `--export=ALL` hands on."""
    words = ["sbatch", "--parsable", "--export=ALL", f"--job-name={name}", f"--chdir={run}"]
    log = "slurm/%A_%a.out" if array else "slurm/%j.out"
    words += [f"--output={log}", f"--error={log}"]
    if array:
        words.append(f"--array={array}")
    if after:
        words += [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"]
    return [*words, str(script), str(run), str(number)]
