"""Chat templates as they ship with checkpoints, written by jinja in a sandbox.

They are written for transformers, and may use what it adds to jinja: loop controls, the tag
`generation`, a `tojson` that escapes no HTML, and `raise_exception`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what a model says; here it writes it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _json(value: Any, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **more)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _json
    return environment.from_string(template)


def write(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    *,
    answer: bool = True,
) -> str:
    """Messages {"role", "content"} as text, up to where the assistant begins if `answer`.

    Args:
        special: {"bos_token": "<s>", ...}.

    Raises:
        ValueError: the template cannot be read, or fails on these messages.
    """
    try:
        return _compiled(template).render(
            messages=messages, add_generation_prompt=answer, **special
        )
    except (
        *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
        *(AttributeError, RecursionError),
    ) as error:
        raise ValueError(f"the chat template cannot write these messages: {error}") from error
