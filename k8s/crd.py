"""A RayJob held against the schema of its CustomResourceDefinition, as an API server does with strict validation.

The structural part: unknown fields, int-or-string, nullable, defaults before `required`, formats, lists that are maps
or sets (kubernetes.io, "Extend the Kubernetes API with CustomResourceDefinitions"). CEL rules are not evaluated here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lorafleet.jobs.errors import UserError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DROPPED = ("default", "nullable", "example", "description")
_INT_OR_STRING, _KEEPS, _EMBEDDED = (
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-embedded-resource",
)


class Schema:
    """The schema of one version of a custom resource."""

    def __init__(self, tree: dict[str, Any]) -> None:
        from jsonschema import Draft7Validator, FormatChecker

        checker = FormatChecker(formats=())
        for bits in (32, 64):
            checker.checks(f"int{bits}")(_fits(bits))
        self.tree = tree
        self.validator = Draft7Validator(_json_schema(tree, root=True), format_checker=checker)

    @classmethod
    def of(cls, definition: dict[str, Any], version: str = "v1") -> Schema:
        """Of a CustomResourceDefinition. Raises UserError when it does not serve the version."""
        names = definition.get("spec", {}).get("names", {}) if isinstance(definition, dict) else {}
        if names.get("kind") != "RayJob":
            raise UserError("that is no definition of RayJob (`kubectl get crd rayjobs.ray.io -o json` prints it)")
        for known in (definition.get("spec") or {}).get("versions") or []:
            if known.get("name") == version and known.get("served"):
                return cls(known["schema"]["openAPIV3Schema"])
        raise UserError(f"the cluster's RayJob has no version {version}; KubeRay 1.0 or newer has")

    @classmethod
    def read(cls, path: Path) -> Schema:
        """From a file with the CustomResourceDefinition, JSON or YAML. Raises UserError."""
        try:
            text = path.read_text()
            tree = json.loads(text) if text.lstrip().startswith("{") else yaml.load(text, Loader=_LOADER)  # nosec B506  # a SafeLoader
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"the schema of RayJob cannot be read from {path}: {error}") from error
        return cls.of(tree)

    def errors(self, given: dict[str, Any]) -> list[str]:
        """What a server would refuse: `path: sentence`, by path."""
        value = _with_defaults(self.tree, copy.deepcopy(given))
        found = sorted(self.validator.iter_errors(value), key=lambda error: (error.json_path, error.message))
        said = [f"{error.json_path.removeprefix('$.')}: {error.message[:200]}" for error in found]
        return said + [f"{path.removeprefix('.')}: {what}" for path, what in _lists(self.tree, value, "")]


def _fits(bits: int) -> Any:
    def check(value: object) -> bool:
        return not isinstance(value, int) or isinstance(value, bool) or -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)

    return check


def _json_schema(node: dict[str, Any], *, root: bool = False) -> dict[str, Any]:
    """A structural schema as JSON schema that is closed to unknown fields."""
    made = {key: value for key, value in node.items() if not key.startswith("x-kubernetes-") and key not in _DROPPED}
    if node.get(_INT_OR_STRING):
        text = {"type": "string"} | ({"pattern": made.pop("pattern")} if "pattern" in made else {})
        made = {key: value for key, value in made.items() if key not in ("type", "anyOf")}
        made["anyOf"] = [{"type": "integer"}, text]
    open_ended = bool(node.get(_KEEPS)) or "additionalProperties" in node
    if "properties" in node:
        made["properties"] = {key: _json_schema(value) for key, value in node["properties"].items()}
        if root:
            made["properties"]["metadata"] = {"type": "object"}  # the core rules for metadata are not in a CRD
        if node.get(_EMBEDDED):
            for key in ("apiVersion", "kind", "metadata"):
                made["properties"].setdefault(key, {})
        if not open_ended:
            made["additionalProperties"] = False
    elif node.get("type") == "object" and not open_ended and not node.get(_EMBEDDED) and set(node) != {"type"}:
        made["additionalProperties"] = False
    if isinstance(node.get("additionalProperties"), dict):
        made["additionalProperties"] = _json_schema(node["additionalProperties"])
    if "items" in node:
        made["items"] = _json_schema(node["items"])
    return {"anyOf": [{"type": "null"}, made]} if node.get("nullable") else made


def _with_defaults(node: dict[str, Any], value: Any) -> Any:
    """A value with what the schema adds, which the server does before it validates."""
    if isinstance(value, dict):
        for key, inner in (node.get("properties") or {}).items():
            if key not in value and "default" in inner:
                value[key] = copy.deepcopy(inner["default"])
            if key in value:
                _with_defaults(inner, value[key])
        rest = node.get("additionalProperties")
        if isinstance(rest, dict):
            for inner in value.values():
                _with_defaults(rest, inner)
    elif isinstance(value, list):
        for inner in value:
            _with_defaults(node.get("items", {}), inner)
    return value


def _lists(node: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Lists that are maps or sets, and have something twice."""
    if isinstance(value, dict):
        for key, inner in (node.get("properties") or {}).items():
            if key in value:
                yield from _lists(inner, value[key], f"{path}.{key}")
        rest = node.get("additionalProperties")
        if isinstance(rest, dict):
            for key, inner in value.items():
                yield from _lists(rest, inner, f"{path}.{key}")
    elif isinstance(value, list):
        kind, seen = node.get("x-kubernetes-list-type"), set()
        for index, inner in enumerate(value):
            if kind in ("map", "set"):
                keys = node.get("x-kubernetes-list-map-keys") if kind == "map" else None
                named = {key: inner.get(key) for key in keys} if keys and isinstance(inner, dict) else inner
                mark = json.dumps(named, sort_keys=True)
                if mark in seen:
                    yield f"{path}[{index}]", f"{mark} stands there twice"
                seen.add(mark)
            yield from _lists(node.get("items", {}), inner, f"{path}[{index}]")
