"""What was fetched is what is used: a changed byte, a lost file, a cache of somebody else are told
before training.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lorafleet.jobs import files
from lorafleet.jobs.data import verified_files as verified
from lorafleet.jobs.data.hub import resolve_model_revision
from lorafleet.jobs.data.verified_files import (
    check_cache,
    check_unchanged,
    compute_content_hash,
    record_fetched_files,
)
from lorafleet.jobs.errors import AssetError, RunError


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    verified._find_cache_writer.cache_clear()


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "thing"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    record_fetched_files(folder)
    return folder


@pytest.mark.parametrize("damage", ["bytes", "size", "lost", "same look"])
def test_what_has_changed_is_not_used(fetched: Path, damage: str) -> None:
    check_unchanged(fetched)
    path, before = fetched / "model.safetensors", (fetched / "model.safetensors").stat()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(b"Weights" if damage != "size" else b"more weights")
    if damage == "same look":  # which only a whole look sees
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        check_unchanged(fetched)
    with pytest.raises(AssetError, match="delete the folder, and run `lorafleet fetch` again"):
        check_unchanged(fetched, read_all=damage == "same look")


def test_what_only_looks_otherwise_is_read_once(
    fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(fetched / "model.safetensors", (0, 0))
    read = []
    whole = files.compute_sha256
    monkeypatch.setattr(files, "compute_sha256", lambda path: read.append(path.name) or whole(path))
    check_unchanged(fetched)
    check_unchanged(fetched)
    assert read == ["model.safetensors"]


def test_what_is_fetched_anew_is_looked_at_anew(fetched: Path) -> None:
    fetched.rename(fetched.with_name("old"))
    fetched.mkdir()
    (fetched / "config.json").write_text("other")
    check_unchanged(fetched)
    with pytest.raises(AssetError, match="contains other files than those that were fetched"):
        check_unchanged(fetched, content=compute_content_hash(fetched.with_name("old")))
    check_unchanged(
        fetched.with_name("old"), content=compute_content_hash(fetched.with_name("old"))
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot as the hub's client keeps it: links to blobs that are named by their hash."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    small, large = b"{}", b"weights"
    names = {
        "config.json": (hashlib.sha1(b"blob 2\0" + small).hexdigest(), small),
        "model.safetensors": (hashlib.sha256(large).hexdigest(), large),
    }
    for name, (blob, data) in names.items():
        (repository / "blobs" / blob).write_bytes(data)
        (snapshot / name).symlink_to(repository / "blobs" / blob)
    return snapshot


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_the_hubs_files_are_known_by_their_names(hub: Path, name: str) -> None:
    """Even where they were changed before this machine first looked."""
    assert resolve_model_revision("org/name", None) == "a" * 40
    (hub / name).resolve().write_bytes(b"[]changed")
    with pytest.raises(AssetError, match=f"{name} differs from the fetched file"):
        resolve_model_revision("org/name", None)
    for note in (hub.parents[3] / "state").rglob("*.json"):
        note.unlink()
    with pytest.raises(AssetError, match=f"{name} differs from the fetched file"):
        resolve_model_revision("org/name", None)


def test_a_cache_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    check_cache(cache)
    verified._find_cache_writer.cache_clear()
    cache.chmod(0o777)
    with pytest.raises(AssetError, match="can be written by every user, so the cache"):
        check_cache(cache)
    verified._find_cache_writer.cache_clear()
    monkeypatch.setenv("LORAFLEET_TRUSTED_FOLDERS", f"/else:{cache}")
    check_cache(cache)


# --- locks and lines


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "dangling"])
def test_a_lock_is_never_followed_or_emptied(tmp_path: Path, kind: str) -> None:
    victim, lock = tmp_path / "thesis.tex", tmp_path / "x.lock"
    victim.write_text("words")
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "dangling":
        lock.symlink_to(tmp_path / "made-by-us")
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises((RunError, IsADirectoryError)), files.hold_lock(tmp_path / "x"):
        pass
    assert victim.read_text() == "words"
    assert not (tmp_path / "made-by-us").exists()


def test_a_lock_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text("somebody's notes")
    with (
        files.hold_lock(tmp_path / "x") as held,
        files.hold_lock(tmp_path / "x", wait=False) as second,
    ):
        assert (held, second) == (True, False)
    assert (tmp_path / "x.lock").read_text() == "somebody's notes"


def test_a_line_is_not_added_behind_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("words")
    (tmp_path / "events.jsonl").symlink_to(victim)
    with pytest.raises(RunError, match="remove it"):
        files.append_jsonl(tmp_path / "events.jsonl", {"a": 1})
    assert victim.read_text() == "words"
    os.mkfifo(tmp_path / "fifo.jsonl")
    with pytest.raises(RunError, match="remove it"):
        files.append_jsonl(tmp_path / "fifo.jsonl", {"a": 1})
    files.append_jsonl(tmp_path / "a.jsonl", {"a": 1})
    files.append_jsonl(tmp_path / "a.jsonl", {"a": 2})
    assert [row["a"] for row in files.read_jsonl(tmp_path / "a.jsonl")] == [1, 2]
