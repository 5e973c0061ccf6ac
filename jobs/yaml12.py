"""Read a strict subset of YAML 1.2, with the line of every key.

PyYAML implements YAML 1.1: it reads `no` as false, `1:00:00` as 3600 and `2e-4` as
text. This module uses PyYAML's parser only, and reads the scalars by YAML 1.2's core
schema. Duplicate keys, tags, merge keys and aliases that multiply are problems, not
silent surprises. Job files, site files, the user's config and command-line overrides
are all read with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from lorafleet.jobs.errors import Problem

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_CHARACTERS = 1_000_000
_MAX_NODES = 20_000
_MAX_DEPTH = 50


@dataclass
class Document:
    """A YAML document as plain values, with the line (from 1) of each dotted key.

    Errors are collected in `problems` and not raised, so that a loader can report all of
    them at once. If there are any, `value` may be None or incomplete.
    """

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse_scalar(text: str) -> bool | int | float | str | None:
    """Parse a plain scalar by YAML 1.2's core schema (section 10.3.2).

    `2e-4` is a number; `no` and `1:00:00` are text. Only unquoted scalars may be passed: a
    quoted one is always text.

    Returns:
        The value; the text itself if it is no other scalar. `.inf` and `.nan` become
            floats, which the schema of the file must refuse where they make no sense.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    # Python refuses to convert more than 4,300 digits to an integer. Numbers longer than any real
    # setting are therefore read as floats below.
    if _INT.fullmatch(text) and len(text) <= 30:
        return int(text)
    # YAML 1.2 writes octal numbers as 0o17. In YAML 1.1, 017 was octal; here it is 17.
    if text.startswith(("0x", "0o")):
        try:
            return int(text, 0)
        except ValueError:
            return text
    if _FLOAT.fullmatch(text) or _SPECIAL.fullmatch(text):
        return float(
            text.replace(".inf", "inf")
            .replace(".Inf", "inf")
            .replace(".INF", "inf")
            .replace(".nan", "nan")
            .replace(".NaN", "nan")
            .replace(".NAN", "nan")
        )
    return text


def parse_document(text: str) -> Document:
    """Parse one YAML document.

    Args:
        text: The text of the file, or the value of an override.

    Returns:
        The document. If its `problems` is not empty, do not use its value. Nothing is
            raised, whatever the text is.
    """
    document = Document(None)
    if len(text) > _MAX_CHARACTERS:
        document.problems.append(
            Problem(
                "",
                (
                    f"the file has {len(text):,} characters, but a job file may have at most "
                    "1,000,000"
                ),
            )
        )
        return document
    try:
        # Compose only: the nodes keep their line, their quotes and their repeated keys, which
        # `yaml.safe_load` drops.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(str(part) for part in (error.context, error.problem) if part)
        document.problems.append(
            Problem("", f"not valid YAML: {message}", mark.line + 1 if mark else None)
        )
        return document
    # PyYAML's composer is recursive: very deep nesting ends in a RecursionError before `_MAX_DEPTH`
    # is checked.
    except (yaml.YAMLError, RecursionError) as error:
        document.problems.append(Problem("", f"not valid YAML: {str(error).splitlines()[0]}"))
        return document
    _Builder(document).build(node)
    return document


class _StopReading(Exception):
    """Raised when a document must not be read further.

    The problem has been added to the document by then; `_Builder.build` catches it.
    """


class _Builder:
    """Builds plain values from PyYAML's nodes.

    PyYAML represents an alias by the node that it refers to, so a few nested aliases can
    stand for billions of values. The builder therefore counts the values that it creates,
    and stops at `_MAX_NODES`.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def build(self, node: yaml.Node | None) -> None:
        try:
            self.document.value = None if node is None else self._build_value(node, "", 0)
        except _StopReading:
            self.document.value = None

    def _build_value(self, node: yaml.Node, path: str, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES or depth > _MAX_DEPTH:
            self._add_problem(
                path, "the file is too deeply nested, or its aliases expand too far", node
            )
            raise _StopReading
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, path, "tag:yaml.org,2002:map")
            return self._build_mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, path, "tag:yaml.org,2002:seq")
            return [self._build_value(child, path, depth + 1) for child in node.value]
        assert isinstance(node, yaml.ScalarNode)  # the third and last kind of node
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith(
            "tag:yaml.org,2002:python/"
        ):
            self._add_problem(
                path,
                f"the tag {node.tag.removeprefix('tag:yaml.org,2002:')} is not supported: leave it "
                "out",
                node,
            )
        # A style means that the scalar is quoted or a block scalar: it is text, whatever it looks
        # like. The tag that PyYAML resolved for a plain scalar follows YAML 1.1 and is ignored.
        return parse_scalar(node.value) if node.style is None else node.value

    def _check_tag(self, node: yaml.Node, path: str, expected: str) -> None:
        if node.tag != expected:
            self._add_problem(
                path,
                f"the tag {node.tag.removeprefix('tag:yaml.org,2002:')} is not supported: leave it "
                "out",
                node,
            )

    def _build_mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._add_problem(
                    path, "a key must be a single word, not a list or block", key_node
                )
                continue
            key = str(key_node.value)
            if key == "<<":
                self._add_problem(
                    path, "merge keys (<<) are not supported: repeat the keys", key_node
                )
                continue
            inner = f"{path}.{key}" if path else key
            # PyYAML would let the last of two equal keys win without notice.
            if key in mapping:
                first = self.document.lines[inner]
                self._add_problem(
                    inner,
                    f"{inner} occurs twice, first in line {first}: keep one of the two",
                    key_node,
                )
            self.document.lines.setdefault(inner, key_node.start_mark.line + 1)
            mapping[key] = self._build_value(value_node, inner, depth + 1)
        return mapping

    def _add_problem(self, path: str, sentence: str, node: yaml.Node) -> None:
        self.document.problems.append(Problem(path, sentence, node.start_mark.line + 1))
