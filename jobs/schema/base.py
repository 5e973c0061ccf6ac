"""Define the base class of everything that a job file or a run directory holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """Base of all models of job files and run directories.

    Models are frozen. They refuse unknown keys, values of another type, and numbers that
    are NaN or infinite. The docstring below a field becomes its description: the pages of
    docs/ and the JSON schema are generated from these docstrings.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
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


# Not strict: YAML has only lists, and strict validation refuses a list for a tuple.
Texts = Annotated[tuple[str, ...], Field(strict=False)]
