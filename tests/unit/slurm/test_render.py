"""Batch scripts: the same bytes as ever for five sites, bash that a linter accepts, values that
cannot break out.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cluster.execution.node import choose_ports
from lorafleet.jobs.errors import PlacementRefused
from lorafleet.jobs.loading.site_file import load_site
from lorafleet.jobs.runs.stale_folders import remove_orphans
from lorafleet.jobs.sites.placement import choose_node_count
from lorafleet.jobs.sites.slurm import SlurmSite
from lorafleet.slurm.backend import _are_single_commands
from lorafleet.slurm.render import (
    JOB,
    NODE,
    ScriptContext,
    build_options,
    build_submit_command,
    quote_path,
    render,
)
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "slurm"
EXPORTS = {"HF_HUB_OFFLINE": "1", "LORAFLEET_CACHE": "/shared/cache", "WANDB_MODE": "offline"}
BARE = {"kind": "slurm", "name": "bare", "cpus_per_node": 4, "memory_gb_per_node": 16.0}
"""Nothing but what must be said."""
PYXIS = BARE | {
    "name": "pyxis",
    "gpus_per_node": 2,
    "gpu_memory_gb": 40.0,
    "container": {"kind": "pyxis", "image": "registry/lorafleet:0.1.0", "mounts": ["/data:/data"]},
    "requeue": {"policy": "none"},
    "nodes": 2,
}


def sites() -> dict[str, SlurmSite]:
    loaded = {
        path.stem: load_site(str(path)).site
        for path in sorted((ROOT / "examples" / "sites").glob("*.yaml"))
    }
    examples = {name: site for name, site in loaded.items() if isinstance(site, SlurmSite)}
    return examples | {
        "bare": SlurmSite.model_validate(BARE),
        "pyxis": SlurmSite.model_validate(PYXIS),
    }


def rendered(site: SlurmSite) -> dict[str, str]:
    script = ScriptContext(
        title=f"lorafleet sweep: quickstart, on site {site.name}",
        nodes=choose_node_count(site, None, 1),
        programs="/opt/lorafleet/bin",
        exports=EXPORTS,
        folders=("/shared/runs", "/shared/cache"),
        version="0.1.0",
        names_setup=True,
    )
    return render(site, script)


@pytest.mark.parametrize("name", sites())
def test_golden_scripts(name: str) -> None:
    """LORAFLEET_WRITE_GOLDEN=1 writes them anew; the difference is for a reviewer's eyes."""
    for file, text in rendered(sites()[name]).items():
        golden = GOLDEN / name / file if file == JOB else GOLDEN / file
        if os.environ.get("LORAFLEET_WRITE_GOLDEN"):
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(text)
        assert golden.read_text() == text


def test_there_are_five() -> None:
    assert len(sites()) == 5


@pytest.mark.parametrize("name", sites())
def test_a_linter_and_bash_accept_them(name: str, tmp_path: Path) -> None:
    for file, text in rendered(sites()[name]).items():
        (tmp_path / file).write_text(text)
        subprocess.run(["bash", "-n", tmp_path / file], check=True)
        linter = Path(sys.executable).with_name("shellcheck")
        done = subprocess.run(
            [linter, "--shell=bash", "--exclude=SC1090,SC1091", tmp_path / file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def test_the_page_for_administrators_is_about_this_script() -> None:
    """It names every step, its site file is one, bash accepts its lines, and it is short."""
    page = (ROOT / "docs" / "slurm-admins.md").read_text()
    texts = [text for site in sites().values() for text in rendered(site).values()]
    steps = {name for text in texts for name in re.findall(r"--job-name=(lf-[a-z]+)", text)}
    assert steps == set(re.findall(r"^\| step `(lf-[a-z]+)`", page, re.MULTILINE))
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    site = yaml.safe_load(text)
    locked = site.pop("locked")
    assert set(locked) <= set(SlurmSite.model_fields)
    SlurmSite.model_validate({"name": "all", **site})
    (range_text,) = re.findall(r"between (\d+) and (\d+)", page)
    blocks = [choose_ports([], 4, job) for job in range(1000)]
    assert tuple(map(int, range_text)) == (min(blocks)[0], max(blocks)[1] + 1)
    for script in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        subprocess.run([SHELLCHECK, "--shell=bash", "-"], input=script, text=True, check=True)
        for pattern in re.findall(r"^pkill .*'(.*)'$", script, re.MULTILINE):
            re.compile(pattern)
    assert len(page.splitlines()) <= 250


word = st.text(
    st.characters(blacklist_categories=("Zs", "Zl", "Zp", "Cc", "Cs")), min_size=1, max_size=12
)
nasty = st.sampled_from(["$(touch "
                         "OOPS)", "`touch${IFS}OOPS`", "';touch${IFS}OOPS;'", "$HOME", "a'b",
                         "\\", "${x:?}", "&", "#", "日本", "--x", "*", "!!", "{{nodes}}", "{%", "~"])  # fmt: skip
words = st.one_of(word, nasty).filter(
    lambda text: re.fullmatch(r"[^\s\x00-\x1f\x7f]+", text) is not None
)
values = st.one_of(
    nasty,
    st.text(
        st.characters(blacklist_characters="\n\0\r", blacklist_categories=("Cs",)), max_size=20
    ),
)


@given(
    partition=words,
    account=words,
    interface=words,
    image=words,
    value=values,
    folder=values,
    cache=values,
)
def test_no_value_breaks_out(
    tmp_path_factory: pytest.TempPathFactory, partition: str, account: str, interface: str, image: str, value: str,
    folder: str, cache: str,
) -> None:  # fmt: skip
    """What bash makes of the script's assignments is what the site said, and nothing was run."""
    scratch = "/s" + re.sub(r"[\x00-\x1f\x7f]", "", folder)
    site = SlurmSite.model_validate(
        BARE
        | {
            "partition": partition,
            "account": account,
            "network_interface": interface,
            "scratch_dir": scratch,
            "environment": {"MINE": value},
            "container": {"kind": "apptainer", "image": image, "mounts": [f"/a:{image}"]},
        }
    )
    text = render(
        site,
        ScriptContext(
            title="t", nodes=1, exports={"CACHE": cache}, folders=(scratch,), version="1"
        ),
    )[JOB]
    block, marker, _ = text.partition("# --- From here on")
    assert marker
    lines = [line for line in block.splitlines() if line.startswith("#SBATCH ")]
    assert [shlex.split(line.removeprefix("#SBATCH ")) for line in lines] == [
        [option] for option in _plain_options(site)
    ]
    place = tmp_path_factory.mktemp("place")
    show = r"""printf '%s\0' "$run" "$interface" "$scratch" "$MINE" "$CACHE" "${inside[@]}" """
    done = subprocess.run(
        ["/bin/bash", "-c", f"{block}\n{show}", "job", "/runs/x"],
        capture_output=True, cwd=place, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}, check=True,
    )  # fmt: skip
    expected = ["/runs/x", interface, scratch, value, cache, "apptainer", "exec"]
    for bound in ("/runs/x", scratch, scratch, f"/a:{image}"):
        expected += ["--bind", bound]
    expected.append(image)
    assert done.stdout.split(b"\0")[:-1] == [text.encode() for text in expected]
    assert list(place.iterdir()) == []


def _plain_options(site: SlurmSite) -> list[str]:
    return [shlex.split(option)[0] for option in build_options(site, 1)]


def test_paths_of_nodes_are_expanded_there_and_nothing_else() -> None:
    said = {
        "$TMPDIR/a b": "/t/a b",
        "${TMPDIR}": "/t",
        "~/x y": "/h/x y",
        "~": "/h",
        "/a/$TMPDIR": "/a/$TMPDIR",
    }
    for path, expected in said.items():
        command = f"printf %s {quote_path(path)}"
        done = subprocess.run(
            ["bash", "-c", command],
            env={"TMPDIR": "/t", "HOME": "/h"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == expected


@pytest.mark.parametrize(
    ("lines", "single"),
    [
        (["module load cuda/12.8", "source /x/bin/activate"], True),
        (['eval "$(conda shell.bash hook)"', "export A='x y'  # a comment"], True),
        (["mods=(a", "b)"], False),
        (["false && # wait", "cmd"], False),
        (["cat <<E", "x", "E"], False),
        (["cmd \\", "--option"], False),
        (["if a", "then b", "fi"], False),
        (["f() {", "}"], False),
    ],
)
def test_lines_that_need_each_other_are_not_separated(lines: list[str], single: bool) -> None:
    assert _are_single_commands(tuple(lines)) is single


@pytest.mark.parametrize(
    ("lines", "code", "problem"),
    [
        (["export A=1", "[ -f /nope ] && source /nope"], 0, "the setup line `[ -f /nope ] && source "
         "/nope` failed with code 1: "),
        (["export A=1", "true"], 0, ""),
        (["load() { echo 'no cuda/99' >&2; return 4; }", "load cuda/99", "false"], 0,
         "the setup line `load cuda/99` failed with code 4: no cuda/99"),
        (["set -e", "ls /nowhere"], 2, "the setup line `ls /nowhere` ended the job with code 2: ls: cannot"),
        (["echo 'no licence' >&2", "exit 5"], 5, "the setup line `exit 5` ended the job with code 5: no licence"),
        (["if true", "then exit 6", "fi"], 6, "a setup line ended the job with code 6: "),
    ],
)  # fmt: skip
def test_what_a_job_keeps_of_a_setup_line_that_fails(
    lines: list[str], code: int, problem: str, tmp_path: Path
) -> None:
    site = SlurmSite.model_validate(BARE | {"setup": lines})
    script = ScriptContext(
        title="t", nodes=1, version="1", names_setup=_are_single_commands(site.setup)
    )
    block = render(site, script)[JOB].partition("# --- Values of the job")[0]
    (tmp_path / "slurm").mkdir()
    with (tmp_path / "job.out").open("a") as output:  # as Slurm opens it
        done = subprocess.run(
            ["/bin/bash", "-c", block, "job", str(tmp_path)],
            stdout=output, stderr=output, check=False,
            env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "LC_ALL": "C"},
        )  # fmt: skip
    assert done.returncode == code
    kept = tmp_path / "slurm" / "problem-7"
    text = kept.read_text() if kept.exists() else ""
    assert text.startswith(problem) if problem else text == ""


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("mem", "--mem=15258M"),
        ("mem-per-cpu", "--mem-per-cpu=3814M"),
        ("mem-per-gpu", "--mem-per-gpu=7629M"),
        ("all", "--mem=0"),
        ("none", None),
    ],
)
def test_the_forms_in_which_memory_is_requested(form: str, expected: str | None) -> None:
    values = {"cpus_per_node": 4, "memory_gb_per_node": 16, "gpus_per_node": 2}
    site = SlurmSite.model_validate(BARE | values | {"memory_request": form})
    found = [option for option in _plain_options(site) if option.startswith("--mem")]
    assert found == ([] if expected is None else [expected])


def test_memory_for_each_gpu_needs_gpus() -> None:
    with pytest.raises(ValueError, match="memory_request is mem-per-gpu, but gpus_per_node is 0"):
        SlurmSite.model_validate(BARE | {"memory_request": "mem-per-gpu"})


def test_the_forms_in_which_gpus_are_asked_for() -> None:
    for form, expected in (
        ("gpus-per-node", "--gpus-per-node=a100:4"),
        ("gres", "--gres=gpu:a100:4"),
        ("gpus", "--gpus=a100:12"),
    ):
        site = SlurmSite.model_validate(
            BARE | {"gpus_per_node": 4, "gpu_type": "a100", "gpu_request": form}
        )
        assert [
            option for option in build_options(site, 3) if "gpu" in option or "gres" in option
        ] == [expected]


def test_a_head_of_its_own_is_the_first_part_of_a_heterogeneous_job() -> None:
    site = SlurmSite.model_validate(
        BARE | {"partition": "gpu", "head": {"cpus": 2, "memory_gb": 8.0}, "gpus_per_node": 1}
    )
    lines = build_options(site, 3)
    head, workers = lines[: lines.index("hetjob")], lines[lines.index("hetjob") + 1 :]
    assert {"--nodes=1", "--cpus-per-task=2", "--mem=7629M", "--partition=gpu"} <= set(head)
    assert {"--nodes=3", "--cpus-per-task=4", "--gpus-per-node=1", "--partition=gpu"} <= set(
        workers
    )
    assert not any("gpu" in option for option in head if "partition" not in option)


def test_how_many_nodes_a_job_has() -> None:
    site = SlurmSite.model_validate(BARE | {"nodes": 2, "max_nodes": 4})
    assert (choose_node_count(site, None, 1), choose_node_count(site, 3, 2)) == (2, 3)
    with pytest.raises(
        PlacementRefused, match="nodes of site bare is 2, but each trial needs 3 nodes"
    ):
        choose_node_count(site, None, 3)
    with pytest.raises(
        PlacementRefused, match="the job would have 5 nodes, but max_nodes of site bare is 4"
    ):
        choose_node_count(site, 5, 1)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    site = SlurmSite.model_validate(BARE)
    script = ScriptContext(title="t", nodes=1)
    own = (
        "#!/bin/bash\n{% for line in options %}\n#SBATCH {{ line }}\n{% endfor %}\necho {{ "
        "values.cpus }}\n"
    )
    made = render(site, script, {JOB: own})
    assert made[JOB].endswith("echo 4\n")
    assert made[NODE] == render(site, script)[NODE]
    assert (
        "'a; b'"
        in render(site, script, {JOB: "{{ 'a; b' | quote }} {{ site.cpus_per_node }}"})[JOB]
    )
    for wrong in ("{{ nothing }}", "{% for %}", "{{ 1 / 0 }}", "{{ none.x }}", "{{ 'a' + 1 }}"):
        with pytest.raises(PlacementRefused, match="template of site bare cannot be rendered"):
            render(site, script, {JOB: wrong})


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch EVIL').read() }}",
    "{{ lipsum.__globals__['os'].system('touch EVIL') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (site | attr('__class__')).__base__ }}",
    "{{ options.append('x') }}",
    "{{ values.update({'cpus': 'x'}) }}",
    "{{ site.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'x' * 1000000000 }}",
    "{% for a in range(10000000) %}{% endfor %}",
)


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_reaches_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `plan` renders starts nothing, reads no file and changes no value."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlacementRefused, match="template of site bare cannot be rendered"):
        render(SlurmSite.model_validate(BARE), ScriptContext(title="t", nodes=1), {JOB: text})
    assert not list(tmp_path.iterdir())


NO_COMMENT = [
    "x\ntouch EVIL",
    "x\r\n#SBATCH --wrap=x",
    "$(touch EVIL)",
    "`id`",
    "'; id; '",
    "\x1b[2J",
]


@pytest.mark.parametrize("hostile", NO_COMMENT)
def test_no_value_of_a_comment_leaves_it(hostile: str) -> None:
    site = SlurmSite.model_validate(BARE)
    plain = render(site, ScriptContext(title="t", nodes=1, version="1"))[JOB].splitlines()
    made = render(site, ScriptContext(title=hostile, nodes=1, version=hostile))[JOB].splitlines()
    assert len(made) == len(plain)
    assert [line for line, other in zip(made, plain, strict=True) if line != other] == made[1:3]
    assert all(line.startswith("# ") and line.isprintable() for line in made[1:3])


def test_paths_of_the_run_are_arguments_and_not_in_the_script() -> None:
    run = Path("/runs/a b/$(x)")
    line = build_submit_command(run / "slurm" / JOB, run, "name-1", 2, after="17")
    assert line[-3:] == [str(run / "slurm" / JOB), str(run), "2"]
    assert "--dependency=afterany:17" in line
    assert all("/runs" not in text for text in rendered(SlurmSite.model_validate(BARE)).values())


def test_a_token_that_was_not_taken_goes_with_its_step(tmp_path: Path) -> None:
    (tmp_path / NODE).write_text(rendered(sites()["bare"])[NODE])
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "ip"  # asked for an address before the token is taken
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexec sleep 60\n")
    slow.chmod(0o755)
    names = {
        "SLURM_NODEID": "1",
        "SLURMD_NODENAME": "n2",
        "LF_INTERFACE": "eth9",
        "LF_KEEP": "",
        "LF_STAGE": "",
    }
    names |= {
        "LF_RUN": str(tmp_path),
        "LF_HERE": str(tmp_path / "lf-1-ab"),
        "PATH": f"{slow.parent}:{os.defpath}",
    }
    subprocess.run(
        ["bash", NODE, "token"], cwd=tmp_path, env=names, input="secret\n", text=True, check=True
    )
    assert (tmp_path / "lf-1-ab-token-n2" / "token").read_text() == "secret"
    step = subprocess.Popen(["bash", NODE, "ray"], cwd=tmp_path, env=names, start_new_session=True)
    while not (tmp_path / "asked").exists():
        assert step.poll() is None
        time.sleep(0.02)
    os.killpg(step.pid, signal.SIGTERM)
    assert step.wait(20) != 0
    assert not list(tmp_path.glob("lf-*"))


def test_a_token_that_no_step_came_for_is_cleared_away(tmp_path: Path) -> None:
    old, new, other = (
        tmp_path / name for name in ("lf-1-ab-token-n1", "lf-2-cd-token-n1", "of-somebody-token-n1")
    )
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "token").touch()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    remove_orphans(tmp_path)
    assert sorted(tmp_path.iterdir()) == [new, other]
