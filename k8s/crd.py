"""Validate a RayJob against the schema of its CustomResourceDefinition.

This does what an API server does with strict validation: unknown fields, int-or-string,
nullable, defaults before `required`, formats, and lists that are maps or sets
(kubernetes.io, "Extend the Kubernetes API with CustomResourceDefinitions"). CEL rules
are not evaluated.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lorafleet.jobs.errors import UserError

# The definition has 1.4 MB of YAML: 0.7 s with the C loader, 3.7 s with the pure one (measured).
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_IGNORED_KEYS = ("default", "nullable", "example", "description")
_INT_OR_STRING, _PRESERVE_UNKNOWN, _EMBEDDED = (
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-embedded-resource",
)


class Schema:
    """Schema of one version of a custom resource.

    Creating it for RayJob takes about a second and each check of a manifest a few tenths of
    one, so create it once for several checks.
    """

    def __init__(self, tree: dict[str, Any]) -> None:
        from jsonschema import Draft7Validator, FormatChecker

        checker = FormatChecker(formats=())
        for bits in (32, 64):
            checker.checks(f"int{bits}")(_make_range_check(bits))
        self.tree = tree
        self.validator = Draft7Validator(
            _build_json_schema(tree, root=True), format_checker=checker
        )

    @classmethod
    def from_definition(cls, definition: dict[str, Any], version: str = "v1") -> Schema:
        """Create the schema from a CustomResourceDefinition.

        Args:
            definition: The definition, as `kubectl get crd rayjobs.ray.io -o json` prints it.
            version: Version of the API that must be served.

        Raises:
            UserError: It does not define RayJob, or does not serve the version.
        """
        names = definition.get("spec", {}).get("names", {}) if isinstance(definition, dict) else {}
        if names.get("kind") != "RayJob":
            raise UserError(
                "this is not the definition of RayJob (print it with `kubectl get crd "
                "rayjobs.ray.io -o json`)"
            )
        for served_version in (definition.get("spec") or {}).get("versions") or []:
            if served_version.get("name") == version and served_version.get("served"):
                return cls(served_version["schema"]["openAPIV3Schema"])
        raise UserError(
            f"the cluster's RayJob does not have version {version}: KubeRay 1.0 or newer is needed"
        )

    @classmethod
    def read(cls, path: Path) -> Schema:
        """Read a CustomResourceDefinition from a JSON or YAML file. Raises UserError."""
        try:
            text = path.read_text()
            if text.lstrip().startswith("{"):
                tree = json.loads(text)
            else:
                tree = yaml.load(text, Loader=_LOADER)  # nosec B506  # a safe loader
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"the schema of RayJob cannot be read from {path}: {error}") from error
        return cls.from_definition(tree)

    def list_errors(self, rayjob: dict[str, Any]) -> list[str]:
        """Return what an API server would refuse, as `path: message`, sorted by path.

        The object itself is not changed: defaults are added to a copy. Rules in CEL and rules
        for metadata are not checked.
        """
        value = _apply_defaults(self.tree, copy.deepcopy(rayjob))
        schema_errors = sorted(
            self.validator.iter_errors(value), key=lambda error: (error.json_path, error.message)
        )
        messages = [
            f"{error.json_path.removeprefix('$.')}: {error.message[:200]}"
            for error in schema_errors
        ]
        return messages + [
            f"{path.removeprefix('.')}: {message}"
            for path, message in _find_duplicates(self.tree, value, "")
        ]


def _make_range_check(bits: int) -> Any:
    """Return a check whether a value fits a signed integer of so many bits."""

    def is_in_range(value: object) -> bool:
        return (
            not isinstance(value, int)
            or isinstance(value, bool)
            or -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)
        )

    return is_in_range


def _build_json_schema(node: dict[str, Any], *, root: bool = False) -> dict[str, Any]:
    """Convert a structural schema to a JSON schema that refuses unknown fields."""
    schema = {
        key: value
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and key not in _IGNORED_KEYS
    }
    if node.get(_INT_OR_STRING):
        text = {"type": "string"} | (
            {"pattern": schema.pop("pattern")} if "pattern" in schema else {}
        )
        schema = {key: value for key, value in schema.items() if key not in ("type", "anyOf")}
        schema["anyOf"] = [{"type": "integer"}, text]
    allows_unknown = bool(node.get(_PRESERVE_UNKNOWN)) or "additionalProperties" in node
    if "properties" in node:
        schema["properties"] = {
            key: _build_json_schema(value) for key, value in node["properties"].items()
        }
        if root:
            schema["properties"]["metadata"] = {"type": "object"}  # a CRD has no rules for metadata
        if node.get(_EMBEDDED):
            for key in ("apiVersion", "kind", "metadata"):
                schema["properties"].setdefault(key, {})
        # A server drops unknown fields silently. Strict validation refuses them, which finds
        # misspelt names.
        if not allows_unknown:
            schema["additionalProperties"] = False
    elif (
        node.get("type") == "object"
        and not allows_unknown
        and not node.get(_EMBEDDED)
        # `type: object` alone is the metadata of pod templates, whose fields the definition does
        # not list.
        and set(node) != {"type"}
    ):
        schema["additionalProperties"] = False
    if isinstance(node.get("additionalProperties"), dict):
        schema["additionalProperties"] = _build_json_schema(node["additionalProperties"])
    if "items" in node:
        schema["items"] = _build_json_schema(node["items"])
    return {"anyOf": [{"type": "null"}, schema]} if node.get("nullable") else schema


def _apply_defaults(node: dict[str, Any], value: Any) -> Any:
    """Add the defaults of the schema to a value, in place, and return it.

    The server does this before it validates.
    """
    if isinstance(value, dict):
        for key, inner in (node.get("properties") or {}).items():
            if key not in value and "default" in inner:
                value[key] = copy.deepcopy(inner["default"])
            if key in value:
                _apply_defaults(inner, value[key])
        extra_schema = node.get("additionalProperties")
        if isinstance(extra_schema, dict):
            for inner in value.values():
                _apply_defaults(extra_schema, inner)
    elif isinstance(value, list):
        for inner in value:
            _apply_defaults(node.get("items", {}), inner)
    return value


def _find_duplicates(node: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for duplicates in lists that are maps or sets."""
    if isinstance(value, dict):
        for key, inner in (node.get("properties") or {}).items():
            if key in value:
                yield from _find_duplicates(inner, value[key], f"{path}.{key}")
        extra_schema = node.get("additionalProperties")
        if isinstance(extra_schema, dict):
            for key, inner in value.items():
                yield from _find_duplicates(extra_schema, inner, f"{path}.{key}")
    elif isinstance(value, list):
        list_type, marks = node.get("x-kubernetes-list-type"), set()
        for index, inner in enumerate(value):
            if list_type in ("map", "set"):
                keys = node.get("x-kubernetes-list-map-keys") if list_type == "map" else None
                key_fields = (
                    {key: inner.get(key) for key in keys}
                    if keys and isinstance(inner, dict)
                    else inner
                )
                mark = json.dumps(key_fields, sort_keys=True)
                if mark in marks:
                    yield f"{path}[{index}]", f"{mark} occurs twice"
                marks.add(mark)
            yield from _find_duplicates(node.get("items", {}), inner, f"{path}[{index}]")
