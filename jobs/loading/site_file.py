"""A site file on its way to a site: found by name, completed by the administrator's file that it extends, checked.

`sites/NAME.yaml` is looked for in ~/.config/lorafleet/sites, then /etc/lorafleet/sites, then ./sites; a path works too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafleet.jobs import files
from lorafleet.jobs.errors import JobFileError, Problem, UserError
from lorafleet.jobs.loading import yaml12
from lorafleet.jobs.loading.job_file import line_of, read_text
from lorafleet.jobs.schema import field_paths as fields
from lorafleet.jobs.schema.base import Spec
from lorafleet.jobs.schema.validation_messages import sentences
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.jobs.sites.ray import RayClusterSite
from lorafleet.jobs.sites.slurm import SlurmSite
from pydantic import ValidationError

ClusterSite = SlurmSite | KubernetesSite | RayClusterSite
_KINDS: dict[str, type[ClusterSite]] = {"slurm": SlurmSite, "kubernetes": KubernetesSite, "ray": RayClusterSite}
_MOST_EXTENDED = 5
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class LoadedSite:
    """A site and where it came from."""

    site: ClusterSite
    files: tuple[Path, ...]
    """The file itself, then those that it extends: their set-up lines are code, so a user is told."""
    locked: tuple[str, ...] = ()
    """Keys that an administrator's file has fixed."""

    def check_nodes(self, nodes: int | None) -> None:
        """Raise UserError when `--nodes` says otherwise than a number of nodes that an administrator has fixed."""
        fixed = getattr(self.site, "nodes", None)
        if nodes is not None and "nodes" in self.locked and nodes != fixed:
            raise UserError(f"--nodes is {nodes}, but nodes is fixed at {fixed} by {self.files[-1]}")

    def chained(self, jobs: int) -> LoadedSite:
        """The site with a chain of so many jobs in the place of what it does at a job's end. Raises UserError."""
        fixed = [key for key in self.locked if key in ("requeue", "requeue.policy", "requeue.max_walltime_chain")]
        if fixed:
            raise UserError(f"--max-walltime-chain is {jobs}, but {fixed[0]} is fixed by {self.files[-1]}")
        if not isinstance(self.site, SlurmSite):
            raise UserError(f"--max-walltime-chain is {jobs}, but site {self.site.name} is no Slurm")
        if self.site.launch == "array":
            raise UserError(f"--max-walltime-chain is {jobs}, but launch of site {self.site.name} is array")
        requeue = self.site.requeue.model_copy(update={"policy": "chain", "max_walltime_chain": jobs})
        return replace(self, site=self.site.model_copy(update={"requeue": requeue}))


def folders() -> tuple[Path, ...]:
    """Where a site's name is looked for, in this order."""
    home = os.environ.get("XDG_CONFIG_HOME") or files.in_home("~/.config")
    return (Path(home) / "lorafleet" / "sites", Path("/etc/lorafleet/sites"), Path("sites"))


def find_site(name: str, places: Iterable[Path] | None = None) -> Path:
    """The file of a site. Raises JobFileError with what there is."""
    if name.endswith(_ENDINGS) or "/" in name:
        return files.in_home(name)
    places = tuple(places if places is not None else folders())
    for place in places:
        for ending in _ENDINGS:
            if (place / f"{name}{ending}").is_file():
                return place / f"{name}{ending}"
    known = sorted({path.stem for place in places for path in place.glob("*.y*ml")})
    near = fields.closest(name, known)
    hint = f"; did you mean {near}?" if near else f"; there are {', '.join(known)}" if known else ""
    where = ", ".join(map(str, places))
    raise JobFileError(name, [Problem("", f"there is no site of this name in {where}{hint}")])


def load_site(name: str, places: Iterable[Path] | None = None) -> LoadedSite:
    """Find, complete and check a site file. Raises JobFileError with every problem found."""
    path = find_site(name, places)
    tree, lines, read, locked = _extended(path, ())
    tree.setdefault("name", path.stem)
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        told = f"kind is {kind!r}, but must be" if kind else "kind is missing: must be"
        sentence = f"{told} {' or '.join(_KINDS)}"
        raise JobFileError(str(path), [Problem("kind", sentence, lines.get("kind"))])
    try:
        site = _KINDS[kind].model_validate(tree)
    except ValidationError as error:
        problems = [
            Problem(problem.path, problem.sentence, line_of(lines, problem.path))
            for problem in sentences(error, known=_keys(_KINDS[kind], ""))
        ]
        raise JobFileError(str(path), problems) from None
    return LoadedSite(site, tuple(read), tuple(sorted(locked)))


def _extended(path: Path, through: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, int], list[Path], set[str]]:
    """(tree, lines of this file, files read, locked keys) of a file laid over what it extends."""
    if files.real(path) in through or len(through) >= _MOST_EXTENDED:
        raise JobFileError(str(path), [Problem("extends", "extends goes round in a circle, or through too many files")])
    document = yaml12.read(read_text(path))
    if not document.problems and not isinstance(document.value, dict):
        document.problems.append(Problem("", "a site file is a block of keys"))
    if document.problems:
        raise JobFileError(str(path), document.problems)
    tree: dict[str, Any] = dict(document.value)
    above = tree.pop("extends", None)
    own_locks = tree.pop("locked", [])
    for key, value, right in (("extends", above, str | None), ("locked", own_locks, list)):
        if not isinstance(value, right):
            what = "the path of a file" if key == "extends" else "a list of keys"
            sentence = f"{key} is {value!r}, but must be {what}"
            raise JobFileError(str(path), [Problem(key, sentence, document.lines.get(key))])
    if above is None:
        return tree, document.lines, [path], {str(key) for key in own_locks}
    base, _, read, locked = _extended((path.parent / files.in_home(above)).absolute(), (*through, files.real(path)))
    problems = [
        Problem(key, f"{key} is fixed by {read[0]}, and must not be set here", line_of(document.lines, key))
        for key in sorted(locked)
        if _changes(tree, base, key)
    ]
    if problems:
        raise JobFileError(str(path), problems)
    return _merged(base, tree), document.lines, [path, *read], locked | {str(key) for key in own_locks}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Blocks are merged key by key; everything else is replaced."""
    both = dict(base)
    for key, value in over.items():
        inner = both.get(key)
        both[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def _changes(tree: dict[str, Any], base: dict[str, Any], path: str) -> bool:
    """Whether a tree says otherwise than the one below it at a key, or takes the block away that the key is in."""
    value: Any = tree
    for part in path.split("."):
        if not isinstance(value, dict):
            return True
        if part not in value:
            return False
        value = value[part]
    return bool(value != fields.get(base, path))


def _keys(model: type[Spec], prefix: str) -> list[str]:
    """Every dotted key that a site file may have."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        found.append(f"{prefix}{name}")
        if isinstance(inner, type) and issubclass(inner, Spec):
            found += _keys(inner, f"{prefix}{name}.")
    return found
