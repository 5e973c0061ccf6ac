"""Find, complete and check site files.

`sites/NAME.yaml` is searched for in ~/.config/lorafleet/sites, then
/etc/lorafleet/sites, then ./sites; a path works too. A site file may extend an
administrator's file, which can lock keys: users then get good defaults and cannot
change what the administrator has fixed. The fields of each kind of site are in
`jobs/sites/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorafleet.jobs import files, yaml12
from lorafleet.jobs.errors import JobFileError, Problem, UserError
from lorafleet.jobs.loading.job_file import find_line, read_text
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.validation_messages import list_problems
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.ray import RayClusterSite
from lorafleet.jobs.sites.slurm import SlurmSite

ClusterSite = SlurmSite | KubernetesSite | RayClusterSite
_KINDS: dict[str, type[ClusterSite]] = {
    "slurm": SlurmSite,
    "kubernetes": KubernetesSite,
    "ray": RayClusterSite,
}
_MAX_EXTENDS_DEPTH = 5
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class LoadedSite:
    """A site and the files that it was loaded from.

    Created by `load_site`. The methods apply command-line options, and refuse those that an
    administrator's file has locked.
    """

    site: ClusterSite
    files: tuple[Path, ...]
    """The file itself, then those that it extends. Their set-up lines are code, so the user is
    shown these files.
    """
    locked: tuple[str, ...] = ()
    """Keys that an administrator's file has fixed."""

    def check_nodes(self, nodes: int | None) -> None:
        """Raise UserError if `--nodes` differs from a number that an administrator has fixed."""
        fixed = getattr(self.site, "nodes", None)
        if nodes is not None and "nodes" in self.locked and nodes != fixed:
            raise UserError(f"--nodes is {nodes}, but {self.files[-1]} fixes nodes at {fixed}")

    def apply_chain(self, max_jobs: int) -> LoadedSite:
        """Return the site with the requeue policy `chain` and at most `max_jobs` jobs.

        Args:
            max_jobs: Value of `--max-walltime-chain`.

        Raises:
            UserError: The requeue policy is fixed, the site is not a Slurm site, or it launches
                job arrays.
        """
        fixed = [
            key
            for key in self.locked
            if key in ("requeue", "requeue.policy", "requeue.max_walltime_chain")
        ]
        if fixed:
            raise UserError(
                f"--max-walltime-chain is {max_jobs}, but {self.files[-1]} fixes {fixed[0]}"
            )
        if not isinstance(self.site, SlurmSite):
            raise UserError(
                f"--max-walltime-chain is {max_jobs}, but site {self.site.name} is not a Slurm site"
            )
        if self.site.launch == "array":
            raise UserError(
                f"--max-walltime-chain is {max_jobs}, but site {self.site.name} has launch: array, "
                "whose tasks cannot be chained"
            )
        requeue = self.site.requeue.model_copy(
            update={"policy": "chain", "max_walltime_chain": max_jobs}
        )
        return replace(self, site=self.site.model_copy(update={"requeue": requeue}))


def list_site_folders() -> tuple[Path, ...]:
    """Return the folders that are searched for site files, in this order."""
    home = os.environ.get("XDG_CONFIG_HOME") or files.expand_home("~/.config")
    return (Path(home) / "lorafleet" / "sites", Path("/etc/lorafleet/sites"), Path("sites"))


def find_site(name: str, site_folders: Iterable[Path] | None = None) -> Path:
    """Return the file of a site.

    Args:
        name: Name of a site, or path of a file. A path is returned unchecked.
        site_folders: Folders to search instead of the usual ones.

    Raises:
        JobFileError: There is no such site; the message lists the existing ones.
    """
    if name.endswith(_SUFFIXES) or "/" in name:
        return files.expand_home(name)
    site_folders = tuple(site_folders if site_folders is not None else list_site_folders())
    for folder in site_folders:
        for suffix in _SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    names = sorted({path.stem for folder in site_folders for path in folder.glob("*.y*ml")})
    suggestion = fields.find_closest(name, names)
    hint = (
        f"; did you mean {suggestion}?"
        if suggestion
        else f"; the known sites are {', '.join(names)}"
        if names
        else ""
    )
    where = ", ".join(map(str, site_folders))
    raise JobFileError(name, [Problem("", f"there is no site file of this name in {where}{hint}")])


def load_site(name: str, site_folders: Iterable[Path] | None = None) -> LoadedSite:
    """Find, complete and check a site file.

    No cluster is contacted.

    Args:
        name: Name of a site, or path of a file.
        site_folders: Folders to search instead of the usual ones.

    Raises:
        JobFileError: With every problem found, each with its line.
    """
    path = find_site(name, site_folders)
    tree, lines, paths, locked = _load_extended(path, ())
    tree.setdefault("name", path.stem)
    # The kind selects the model, so it must be checked before pydantic can report anything useful.
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        prefix = f"kind is {kind!r}, but must be" if kind else "kind is missing: must be"
        message = f"{prefix} {' or '.join(_KINDS)}"
        raise JobFileError(str(path), [Problem("kind", message, lines.get("kind"))])
    try:
        site = _KINDS[kind].model_validate(tree)
    except ValidationError as error:
        problems = [
            Problem(problem.path, problem.sentence, find_line(lines, problem.path))
            for problem in list_problems(error, valid_keys=_list_keys(_KINDS[kind], ""))
        ]
        raise JobFileError(str(path), problems) from None
    return LoadedSite(site, tuple(paths), tuple(sorted(locked)))


def _load_extended(
    path: Path, visited: tuple[Path, ...]
) -> tuple[dict[str, Any], dict[str, int], list[Path], set[str]]:
    """Load a file, merged over the file that it extends.

    Args:
        path: The file.
        visited: Files that extend this one, outermost first, with links resolved. A file
            that occurs twice would be read for ever.

    Returns:
        The tree, the lines of this file, the files read, and the locked keys.

    Raises:
        JobFileError: If a file cannot be read, extends itself, or changes a locked key.
    """
    # Links are resolved, so that files which extend each other through links are noticed too.
    if files.resolve_links(path) in visited or len(visited) >= _MAX_EXTENDS_DEPTH:
        raise JobFileError(
            str(path),
            [
                Problem(
                    "extends",
                    (
                        "extends refers back to a file that is being read, or to too many files in "
                        "a row"
                    ),
                )
            ],
        )
    document = yaml12.parse_document(read_text(path))
    if not document.problems and not isinstance(document.value, dict):
        document.problems.append(Problem("", "a site file must be a block of keys (`key: value`)"))
    if document.problems:
        raise JobFileError(str(path), document.problems)
    tree: dict[str, Any] = dict(document.value)
    base_path = tree.pop("extends", None)
    locked_keys = tree.pop("locked", [])
    for key, value, expected_type in (
        ("extends", base_path, str | None),
        ("locked", locked_keys, list),
    ):
        if not isinstance(value, expected_type):
            expected = "the path of a file" if key == "extends" else "a list of keys"
            message = f"{key} is {value!r}, but must be {expected}"
            raise JobFileError(str(path), [Problem(key, message, document.lines.get(key))])
    if base_path is None:
        return tree, document.lines, [path], {str(key) for key in locked_keys}
    # A relative path in `extends` starts at the folder of the file that has it.
    base, _, paths, locked = _load_extended(
        (path.parent / files.expand_home(base_path)).absolute(),
        (*visited, files.resolve_links(path)),
    )
    problems = [
        Problem(
            key,
            f"{key} is fixed by {paths[0]}, and cannot be changed here: leave it out",
            find_line(document.lines, key),
        )
        for key in sorted(locked)
        if _has_different_value(tree, base, key)
    ]
    if problems:
        raise JobFileError(str(path), problems)
    return (
        _merge_blocks(base, tree),
        document.lines,
        [path, *paths],
        # A file can add locks for those that extend it, but never remove one.
        locked | {str(key) for key in locked_keys},
    )


def _merge_blocks(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees: blocks are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = (
            _merge_blocks(inner, value)
            if isinstance(inner, dict) and isinstance(value, dict)
            else value
        )
    return merged


def _has_different_value(tree: dict[str, Any], base: dict[str, Any], path: str) -> bool:
    """Return whether a tree differs from its base at a key, or removes the block around it.

    A tree that does not set the key, or repeats its value, does not differ.

    Args:
        tree: The values of the extending file.
        base: The values of the extended file.
        path: Dotted key.
    """
    value: Any = tree
    for part in path.split("."):
        if not isinstance(value, dict):
            return True
        if part not in value:
            return False
        value = value[part]
    return bool(value != fields.get_value(base, path))


def _list_keys(model: type[Spec], prefix: str) -> list[str]:
    """Return every dotted key that a site file may have."""
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        keys.append(f"{prefix}{name}")
        if isinstance(inner, type) and issubclass(inner, Spec):
            keys += _list_keys(inner, f"{prefix}{name}.")
    return keys
