"""A run that is handed over as texts: made once, whole, by the version that submitted it."""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cluster.remote.transfer import Unpacker, list_record_files
from lorafleet.cluster.remote.transfer import pack as pack_record
from lorafleet.jobs import files
from lorafleet.jobs.errors import CommandFailed, RunError
from lorafleet.jobs.runs.bundle import pack, unpack
from lorafleet.jobs.runs.run import Run, RunState

TEXTS = {"job.yaml": "name: x\n", "resolved.json": "{}\n", "plan.json": '{"schema_version": 1}\n'}


def mounted(folder: Path, **changes: str) -> Path:
    folder.mkdir()
    for name, text in (pack("x", TEXTS) | changes).items():
        (folder / name).write_text(text)
    return folder / "run.json"


def test_the_folder_is_made_once(tmp_path: Path) -> None:
    document = mounted(tmp_path / "etc")
    run = unpack(tmp_path / "runs" / "x-a1b2c3", document)
    assert {name: (run.path / name).read_text() for name in TEXTS} == TEXTS
    assert (run.state, run.read_status().name) == (RunState.PENDING, "x")
    run.set_state(RunState.RUNNING)
    assert unpack(run.path, document).state is RunState.RUNNING
    assert [path.name for path in run.path.parent.iterdir()] == ["x-a1b2c3"]


def test_of_many_at_once_one_makes_it(tmp_path: Path) -> None:
    document = mounted(tmp_path / "etc")
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: unpack(tmp_path / "runs" / "x-a1b2c3", document), range(8)))
    assert {run.state for run in runs} == {RunState.PENDING}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x-a1b2c3"]


def test_a_users_stop_holds_until_the_run_is_submitted_again(tmp_path: Path) -> None:
    """Another attempt at the same submission is stopped as well; the next submission is not."""
    first = mounted(tmp_path / "first")
    run = unpack(tmp_path / "x-a1b2c3", first)
    (run.path / "stop").write_text("asked for by a user\n")
    unpack(run.path, first)
    assert (run.path / "stop").exists()
    second = mounted(tmp_path / "second", **pack("x", TEXTS, 2))
    unpack(run.path, second)
    assert not (run.path / "stop").exists()
    (run.path / "stop").write_text("asked for by a user\n")
    unpack(run.path, second)
    assert (run.path / "stop").exists()


def test_another_version_is_refused(tmp_path: Path) -> None:
    document = mounted(
        tmp_path / "etc", **{"run.json": json.dumps({"lorafleet": "9.9.9", "name": "x"})}
    )
    with pytest.raises(
        RunError, match=r"submitted by lorafleet 9.9.9, but this image has .*: use an image"
    ):
        unpack(tmp_path / "x-a1b2c3", document)
    assert not (tmp_path / "x-a1b2c3").exists()


def test_what_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="is not a packed run"):
        unpack(tmp_path / "x-a1b2c3", tmp_path / "run.json")


def test_exported_models_come_when_they_are_wanted(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    for name in (
        "export/onnx/model.onnx.data",
        "export/onnx/parity.json",
        "export/export.json",
        "status.json",
    ):
        files.write_text(run.path / name, "{}")
    assert {path.name for path in list_record_files(run)} == {
        "parity.json",
        "export.json",
        "status.json",
    }
    assert {path.name for path in list_record_files(run, "all")} == {
        "parity.json",
        "export.json",
        "status.json",
    }
    assert "model.onnx.data" in {path.name for path in list_record_files(run, "exports")}


def stream(*members: tuple[str, bytes, bytes]) -> bytes:
    """A compressed tar of (name, kind, content) as a sender that is not honest may make it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def record_here(folder: Path) -> dict[str, str]:
    """A record on the user's side, and its texts."""
    own = {
        "plan.json": "own",
        "site.json": "own",
        "stop": "own",
        "job.yaml": "own",
        "attempts/1.json": "own",
    }
    for name, text in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return own


OUT_OF_PLACE = ("trials/../plan.json", "trials/./../site.json", "./plan.json", "//plan.json", "trials//../stop",
                "../x-other/plan.json", "/etc/motd", "trials/..", "logs/../attempts/2.json", ".reserve",
                "trials/.hidden", "trials/a\\..\\b", "logs/\x1b[2J.log", "logs/a\nb", "a/" * 20 + "b")  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_a_name_that_leads_elsewhere_stops_the_transfer(tmp_path: Path, name: str) -> None:
    """As a whole, and before anything is written: the honest file beside it is not taken either."""
    own = record_here(tmp_path / "x")
    unpacker = Unpacker(tmp_path / "x")
    unpacker.add_block(
        stream(("status.json", tarfile.REGTYPE, b"{}"), (name, tarfile.REGTYPE, b"theirs"))
    )
    with pytest.raises(CommandFailed, match="nothing was unpacked"):
        unpacker.finish()
    held = {
        str(path.relative_to(tmp_path)): path.read_text()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert held == {f"x/{name}": text for name, text in own.items()}


@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "", "trials", "plan.json", "stop", "arms", "a", "site.json"]),
        max_size=6,
    )
)
def test_no_name_changes_what_belongs_to_this_side(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("side") / "x"
    own = record_here(folder)
    unpacker = Unpacker(folder)
    unpacker.add_block(stream(("/".join(parts), tarfile.REGTYPE, b"theirs")))
    try:
        unpacker.finish()
    except CommandFailed:
        assert len(list(folder.rglob("*"))) == len(own) + 1  # and the folder of attempts
    assert {name: (folder / name).read_text() for name in own} == own
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


def test_what_is_no_part_of_a_record_stays_where_it_is(tmp_path: Path) -> None:
    own = record_here(tmp_path / "x")
    (tmp_path / "x" / "arms" / "a").mkdir(parents=True)
    unpacker = Unpacker(tmp_path / "x")
    links = [(f"logs/{number}", kind, b"") for number, kind in enumerate([tarfile.SYMTYPE, tarfile.LNKTYPE,
             tarfile.CHRTYPE, tarfile.FIFOTYPE])]  # fmt: skip
    files_ = [(name, tarfile.REGTYPE, b"theirs") for name in (*own, "tune/x.pkl", "evil.sh", "arms/a/stop",
              "arms/a/attempts/1.json", "arms/a/plan.json", "trials/t/params.json")]  # fmt: skip
    unpacker.add_block(stream(*links, *files_))
    assert unpacker.finish() == 2
    theirs = {
        str(path.relative_to(tmp_path / "x"))
        for path in (tmp_path / "x").rglob("*")
        if path.is_file()
    }
    assert theirs - set(own) == {"arms/a/plan.json", "trials/t/params.json"}
    assert {name: (tmp_path / "x" / name).read_text() for name in own} == own


def test_what_a_run_sends_is_taken(tmp_path: Path) -> None:
    """Every file of docs/run-directory.md that travels."""
    there, here = Run(tmp_path / "there"), Run(tmp_path / "here")
    names = ["status.json", "facts.json", "events.jsonl", "environment.json", "trials/0a/params.json",
             "logs/driver.log",
             "trials/0a/adapter/adapter_model.safetensors", "report/report.html", "arms/lora/plan.json",
             "arms/lora/trials/0b/metrics.jsonl", "arms/lora/judged/7/test.json", "arms/lora/pace.json",
             "export/onnx/parity.json", "export/export.json", "exported.json", "ratings/ann.jsonl",
             "slurm/history.jsonl", "wandb/offline-run-1/run.wandb", "findings.json"]  # fmt: skip
    for name in names:
        files.write_text(there.path / name, "{}")
    here.path.mkdir()
    out = io.BytesIO()
    pack_record(there, {}, "all", out, include_wandb=True)
    unpacker = Unpacker(here.path)
    unpacker.add_block(out.getvalue())
    assert unpacker.finish() == len(names)
    assert {
        str(path.relative_to(here.path)) for path in here.path.rglob("*") if path.is_file()
    } == set(names)
