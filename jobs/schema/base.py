"""Define the base class of everything that a job file or a run directory holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Spec(BaseModel):
    """Base of all models of job files and run directories.

    Models are frozen. They refuse unknown keys, values of another type, and numbers that
    are NaN or infinite. The docstring below a field is its description: the pages of
    docs/ and the JSON schema are generated from these docstrings.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        # `use_attribute_docstrings` would parse the source of every class in every command, which
        # took a fifth of the time of `validate`. `describe_fields` parses it when it is needed.
        # Fields such as `model_name_or_path` would clash with pydantic's own prefix `model_`.
        protected_namespaces=(),
    )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Create from an object that was read from a JSON file.

        JSON has no tuples and no enums: strict validation accepts them only from JSON text.

        Raises:
            pydantic.ValidationError: The object has other fields or types.
        """
        return cls.model_validate_json(json.dumps(record))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON schema, with the docstrings of the fields as their descriptions."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, description in describe_fields(cls).items():
            if name in properties:
                properties[name].setdefault("description", description)
        return schema


@cache
def describe_fields(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring of each field of a model, those of its base classes included."""
    import ast
    import inspect
    import textwrap

    descriptions: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # an installation without sources
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                descriptions[statement.target.id] = inspect.cleandoc(following.value.value)
    return descriptions


# Not strict: YAML has only lists, and strict validation refuses a list for a tuple.
Texts = Annotated[tuple[str, ...], Field(strict=False)]
