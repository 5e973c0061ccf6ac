"""Render the files of a job on a Slurm cluster from the job's request and the site file.

All functions are pure. All values are assigned in one block of quoted assignments; the
rest of the script is the same for every job. The site's `setup` lines are code and are
copied unchanged. Paths of the run are arguments of `sbatch`, not part of the script.
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
from lorafleet.jobs.sites.slurm import NodeType, SlurmSite
from lorafleet.jobs.text import make_printable

JOB, NODE = "job.sbatch", "node.sh"
_MAX_OBJECT_STORE_BYTES = 2**31
"""Maximum size of Ray's object store on a node, in bytes. Trials exchange little data through
it.
"""
_MIN_OBJECT_STORE_BYTES = 100 * 2**20
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class ScriptContext:
    """Inputs of a job's script besides the site."""

    title: str
    """Title of the script, on one line."""
    nodes: int
    """Number of nodes for trials. A separate head node is not included."""
    verb: str = "exec --trust"
    """Command of `lorafleet` to run in the allocation, with the run's folder as its argument."""
    programs: str = ""
    """Folder of lorafleet's programs, for sites without `setup` lines and without a container."""
    exports: dict[str, str] = field(default_factory=dict)
    """Environment variables for every process: caches, offline switches."""
    folders: tuple[str, ...] = ()
    """Folders that must be visible inside a container."""
    version: str = ""
    """Version of lorafleet."""
    names_setup: bool = False
    """Name the set-up line that fails. Only if each of the lines is a command of its own: others
    must not be separated.
    """
    stage: bool = True
    """Copy models to the nodes' own disks, if the site sets `scratch_dir`."""


def render(
    site: SlurmSite, script: ScriptContext, templates: dict[str, str] | None = None
) -> dict[str, str]:
    """Render the job's files by name.

    Args:
        templates: The user's own templates by file name, used instead of the built-in ones.

    Raises:
        PlacementRefused: jinja2 cannot render a template.
    """
    setup = [*_build_path_lines(site, script), *site.setup]
    context = {
        "title": _quote_title(script.title),
        "version": _quote_title(script.version),
        "site": site.model_dump(mode="json"),
        "options": build_options(site, script.nodes),
        "setup": setup,
        "setup_texts": [shlex.quote(line.strip()) for line in setup] if script.names_setup else [],
        "values": _build_values(site, script.nodes, stage=script.stage),
        "exports": {
            name: shlex.quote(value) for name, value in _build_exports(site, script).items()
        },
        "step": [*_build_step_command(site, script), *_build_pyxis_options(site, script)],
        "plain_step": _build_step_command(site, script),
        "uses_pyxis": site.container is not None and site.container.kind == "pyxis",
        "inside": _build_inside_command(site, script),
        "lead": _build_lead_command(site, script),
        "verb": script.verb,
        "caches": _load_template("caches.sh").rstrip(),
    }
    rendered = {}
    for name in (JOB, NODE):
        text = (templates or {}).get(name) or _load_template(name)
        try:
            rendered[name] = _ENVIRONMENT.from_string(text).render(context)
        except Exception as error:  # the expressions come from the template and may raise anything
            raise PlacementRefused(
                f"the template of site {site.name} cannot be rendered: {type(error).__name__}: "
                f"{error}"
            ) from error
    return rendered


class _Sandbox(ImmutableSandboxedEnvironment):
    """Sandbox for templates.

    Templates read values and write text. They cannot reach the objects behind a value or create
    text without limit.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply numbers, or repeat short texts. Raise SecurityError for anything larger."""
        for value, times in ((left, right), (right, left)):
            # `'x' * 10**9` would fill the memory of whoever runs `plan`.
            repeats = isinstance(value, str | list | tuple) and isinstance(times, int)
            if operator == "**" or (repeats and len(value) * times > _MAX_REPEATED_CHARS):
                raise SecurityError(f"{operator} creates more text than a template may")
        return super().call_binop(context, operator, left, right)


_MAX_REPEATED_CHARS = 100_000


def _quote_title(text: str) -> str:
    """Return a text as one quoted word on one line.

    A script comment can contain it; a line break would end the comment.
    """
    return shlex.quote(" ".join(make_printable(text).split()))


_ENVIRONMENT = _Sandbox(
    # A misspelt name in a user's template must be an error and not an empty text.
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
    comment_start_string="<#",  # bash has ${#name}
    comment_end_string="#>",
)
_ENVIRONMENT.filters["quote"] = lambda value: shlex.quote(str(value))


def _load_template(name: str) -> str:
    return (resources.files("lorafleet.slurm") / "templates" / f"{name}.j2").read_text(
        encoding="utf-8"
    )


def build_options(site: SlurmSite, nodes: int) -> list[str]:
    """Return the options of the #SBATCH lines.

    The components of a heterogeneous job are separated by `hetjob`. Every option is in its
    long form and quoted for sbatch's parser.

    Args:
        site: The site; sizes are those of its smallest node.
        nodes: Nodes for trials, without a separate head.
    """
    smallest = site.smallest_node
    common = [
        f"--time={site.time_limit}",
        # `B:` signals the batch script alone: Ray's processes must live until the trials are saved.
        # A requeued job must append to its log, not replace it.
        f"--signal=B:USR1@{site.requeue.signal_seconds}",
        "--open-mode=append",
    ]
    # Always explicit, because the default is a setting of the cluster.
    common += ["--requeue" if site.requeue.policy == "requeue" else "--no-requeue"]
    common += [f"--{name}={value}" for name in ("account", "qos") if (value := getattr(site, name))]
    workers = [
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={smallest.cpus_per_node}",
    ]
    workers += [*_build_memory_request(site, smallest), *_build_gpu_request(site, nodes)]
    workers += [
        f"--{name}={value}"
        for name in ("partition", "constraint")
        if (value := getattr(site, name))
    ]
    # For administrators, in squeue and scontrol. The site's own lines come later, and win.
    common.append("--comment=lorafleet")
    extra = [line.strip() for line in site.extra_sbatch]
    # The loss of a worker node must not end the job: its trials are restarted on the other nodes.
    no_kill = ["--no-kill"] if nodes > 1 and not site.head else []
    components = [[*workers, *common, *no_kill, *extra]]
    if site.head:
        head = ["--nodes=1", "--ntasks-per-node=1", f"--cpus-per-task={site.head.cpus}"]
        if site.memory_request != "none":
            head += [f"--mem={_to_mib(site.head.memory_gb)}M"]
        for name in ("partition", "constraint"):
            value = getattr(site.head, name) or (site.partition if name == "partition" else None)
            head += [f"--{name}={value}"] if value else []
        components.insert(0, [*head, *common, *extra])
    lines: list[str] = []
    for component in components:
        lines += (["hetjob"] if lines else []) + [_quote_option(line) for line in component]
    return lines


def _quote_option(line: str) -> str:
    """Quote an option for sbatch's parser, which splits like a shell but expands nothing."""
    name, equals, value = line.partition("=")
    return f"{name}{equals}{shlex.quote(value)}" if equals else line


def _build_gpu_request(site: SlurmSite, nodes: int) -> list[str]:
    gpus = site.smallest_node.gpus_per_node
    if not gpus:
        return []
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    if site.gpu_request == "gres":
        return [f"--gres=gpu:{kind}{gpus}"]
    if site.gpu_request == "gpus":
        return [f"--gpus={kind}{gpus * nodes}"]
    return [f"--gpus-per-node={kind}{gpus}"]


def _build_memory_request(site: SlurmSite, node: NodeType) -> list[str]:
    """Return the option that requests the memory of a node for trials."""
    memory = _to_mib(node.memory_gb_per_node)
    match site.memory_request:
        case "mem":
            return [f"--mem={memory}M"]
        case "mem-per-cpu":
            return [f"--mem-per-cpu={memory // node.cpus_per_node}M"]
        case "mem-per-gpu":
            return [f"--mem-per-gpu={memory // node.gpus_per_node}M"]
        case "all":
            return ["--mem=0"]
    return []


def _to_mib(gigabytes: float) -> int:
    return int(gigabytes * 1e9 / 2**20)


def _build_values(site: SlurmSite, nodes: int, *, stage: bool) -> dict[str, str]:
    """Return the script's variables and their values, quoted for bash."""
    smallest = site.smallest_node
    memory = int(smallest.memory_gb_per_node * 1e9)
    objects = _compute_object_store_bytes(smallest.memory_gb_per_node)
    scratch = quote_path(site.scratch_dir or "/tmp")  # nosec B108  # mkdir -m 700
    return {
        "nodes": str(nodes + (1 if site.head else 0)),
        "cpus": str(smallest.cpus_per_node),
        "memory_gb": f"{smallest.memory_gb_per_node:g}",
        "gpus": str(smallest.gpus_per_node),
        "gpu_memory_gb": f"{smallest.gpu_memory_gb:g}",
        # Ray does not count the object store as part of --memory.
        "memory": str(max(_MIN_OBJECT_STORE_BYTES, memory - objects)),
        "objects": str(objects),
        "head_objects": str(
            _compute_object_store_bytes(site.head.memory_gb) if site.head else objects
        ),
        "head_works": "0" if site.head else "1",
        "whole_nodes": "1" if site.requests_whole_nodes else "''",
        "interface": shlex.quote(site.network_interface or ""),
        "scratch": scratch,
        "keep": f"{scratch}/lorafleet-$(id -u)" if site.scratch_dir else "''",
        "stage": "1" if site.scratch_dir and stage else "''",
        "policy": site.requeue.policy,
        "max_restarts": str(site.requeue.max_restarts),
        "signal_seconds": str(site.requeue.signal_seconds),
        "time_limit": str(site.time_limit_seconds),
    }


def _quote_word(word: str) -> str:
    """Quote a word for bash.

    A word with a comma is always quoted, so that it is not read as a list.
    """
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def _compute_object_store_bytes(memory_gb: float) -> int:
    """Return the size of Ray's object store on a node, in bytes.

    It is a tenth of the memory, but at least 100 MiB and at most 2 GiB. Ray's own default
    is 30 % of the whole machine, not of the job.
    """
    return max(_MIN_OBJECT_STORE_BYTES, min(_MAX_OBJECT_STORE_BYTES, int(memory_gb * 1e8)))


def quote_path(text: str) -> str:
    """Quote a path for bash.

    A leading ~ or variable is expanded on the node; everything else is literal.
    """
    if text == "~" or text.startswith("~/"):
        return '"$HOME"' + (shlex.quote(text[1:]) if text[1:] else "")
    match = _VARIABLE.match(text)
    if not match:
        return shlex.quote(text)
    suffix = text[match.end() :]
    # `:?` ends the job with a message on a node that does not define the variable.
    return f'"${{{match[1] or match[2]}:?}}"' + (shlex.quote(suffix) if suffix else "")


def _build_exports(site: SlurmSite, script: ScriptContext) -> dict[str, str]:
    variables = dict(script.exports)
    if site.network_interface:
        variables |= {
            "NCCL_SOCKET_IFNAME": site.network_interface,
            "GLOO_SOCKET_IFNAME": site.network_interface,
        }
    return variables | site.environment


def _build_path_lines(site: SlurmSite, script: ScriptContext) -> list[str]:
    """Return the line that puts the submitter's programs on the PATH.

    The list is empty for sites with set-up lines or a container.
    """
    if site.setup or site.container or not script.programs:
        return []
    return [f"export PATH={shlex.quote(script.programs)}:$PATH"]


def _build_step_command(site: SlurmSite, script: ScriptContext) -> list[str]:
    """Return the srun command of a step with one task per node, which overlaps other steps."""
    # Without --overlap a step waits until the step of Ray ends. Without --mpi=none libraries find
    # PMI variables and try to join MPI ranks that do not exist.
    # Since 22.05 srun does not inherit --cpus-per-task from sbatch, and would bind a task to one
    # core.
    command = ["srun", "--overlap", "--export=ALL", "--mpi=none", "--cpu-bind=none"]
    if site.head:
        command.append(_quote_word("--het-group=0,1"))
    else:
        command += [f"--nodes={script.nodes}", f"--ntasks={script.nodes}", "--ntasks-per-node=1"]
    return command


def _build_pyxis_options(site: SlurmSite, script: ScriptContext) -> list[str]:
    if site.container is None or site.container.kind != "pyxis":
        return []
    mounts = [f"{folder}:{folder}" for folder in script.folders] + list(site.container.mounts)
    extra_mounts = _quote_word("".join(f",{mount}" for mount in mounts)) if mounts else ""
    run_mounts = (
        '"$run:$run,$scratch:$scratch,/tmp:/tmp"' if site.scratch_dir else '"$run:$run,/tmp:/tmp"'
    )
    return [
        _quote_word(f"--container-image={site.container.image}"),
        # Its name is new after a requeue: a start that was killed may have left half of one.
        # The default is for a site's own template.
        '"--container-name=${container:-lf-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}}"',
        f"--container-mounts={run_mounts}{extra_mounts}",
    ]


def _build_inside_command(site: SlurmSite, script: ScriptContext) -> list[str]:
    """Return the prefix of every program that runs in a node's task, quoted for bash."""
    if site.container is None or site.container.kind != "apptainer":
        return ["env"]
    command = ["apptainer", "exec"] + (["--nv"] if site.gpus_per_node else [])
    command += ["--bind", '"$run"', "--bind", '"$scratch"']
    for folder in (*script.folders, *site.container.mounts):
        command += ["--bind", _quote_word(folder)]
    return [*command, _quote_word(site.container.image)]


def _build_lead_command(site: SlurmSite, script: ScriptContext) -> list[str]:
    """Return the prefix of every program that runs next to the batch script."""
    pyxis = _build_pyxis_options(site, script)
    # Only pyxis needs srun to enter its container. Everything else starts directly beside the batch
    # script, which is on the first node.
    if not pyxis:
        return _build_inside_command(site, script)
    group = ["--het-group=0"] if site.head else []
    return [
        "srun",
        "--overlap",
        "--export=ALL",
        "--mpi=none",
        "--nodes=1",
        "--ntasks=1",
        # The token and the job's private folder are on this node alone.
        '"--nodelist=$SLURMD_NODENAME"',
        "--job-name=lf-driver",
        *group,
        *pyxis,
    ]


def format_array(site: SlurmSite, tasks: int) -> str:
    """Return the value of `--array`."""
    return f"0-{tasks - 1}" + (f"%{site.array.max_running}" if site.array.max_running else "")


def build_submit_command(
    script: Path,
    run: Path,
    name: str,
    number: int,
    *,
    after: str | None = None,
    array: str | None = None,
) -> list[str]:
    """Return the `sbatch` command.

    Run it with a minimal environment (see `client.build_job_environment`): `--export=ALL`
    passes it on to the job. The folder `slurm/` of the run must exist: Slurm fails a job
    whose output cannot be created, and nothing says why.

    Args:
        script: The batch script.
        run: Folder of the run, the job's working directory.
        name: Name of the job.
        number: Number of the submission, an argument of the script.
        after: Job whose end this one waits for, whatever that end is.
        array: Value of `--array`; None for a single job.
    """
    command = ["sbatch", "--parsable", "--export=ALL", f"--job-name={name}", f"--chdir={run}"]
    log = "slurm/%A_%a.out" if array else "slurm/%j.out"
    command += [f"--output={log}", f"--error={log}"]
    if array:
        command.append(f"--array={array}")
    if after:
        # By default a job whose dependency can never be met stays in the queue for ever.
        command += [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"]
    return [*command, str(script), str(run), str(number)]
