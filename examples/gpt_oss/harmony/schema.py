"""Tools as the TypeScript-like text that gpt-oss was trained on.

The text follows the reference renderer to the character, also where it departs from TypeScript: an
array of a union has no parentheses, only the first line of a property's description gets a comment
mark, an object's own description stands before its brace, `anyOf`, `allOf` and `$ref` become `any`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_oss.harmony.messages import Tool

MAX_DEPTH = 64
"""Deepest nesting of a schema; deeper ones are refused."""


def render_tools(tools: Sequence[Tool], namespace: str = "functions") -> str:
    """The `## functions` section of the developer message.

    Raises:
      ValueError: a schema nests deeper than MAX_DEPTH.
    """
    functions = "".join(f"{_function(tool)}\n\n" for tool in tools)
    return f"## {namespace}\n\nnamespace {namespace} {{\n\n{functions}}} // namespace {namespace}"


def _function(tool: Tool) -> str:
    comment = "".join(f"// {line}\n" for line in _lines(tool.description))
    if tool.parameters is None:
        return f"{comment}type {tool.name} = () => any;"
    try:
        argument = _type(tool.parameters, "", MAX_DEPTH)
    except RecursionError:
        raise ValueError(
            f"tool {tool.name!r}: expected a schema of at most {MAX_DEPTH} levels"
        ) from None
    return f"{comment}type {tool.name} = (_: {argument}) => any;"


def _type(schema: Any, indent: str, depth: int) -> str:
    """The type of one schema; its continuation lines start with `indent`."""
    if depth == 0:
        raise RecursionError
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(_variants(schema["oneOf"], indent, depth, _nested_default))
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_scalar(k) for k in kind if isinstance(k, str)) or "any"
    if kind == "object":
        return _object(schema, indent, depth)
    if kind == "array":
        if "items" not in schema:
            return "Array<any>"
        return f"{_type(schema['items'], indent, depth - 1)}[]"
    if kind == "string":
        return " | ".join(f'"{v}"' for v in _strings(schema.get("enum"))) or "string"
    return _scalar(kind) if kind in ("number", "integer", "boolean") else "any"


def _scalar(kind: str) -> str:
    return "number" if kind == "integer" else kind


def _object(schema: Mapping[str, Any], indent: str, depth: int) -> str:
    description = _description(schema)
    comment = f"{indent}// {description}\n" if description is not None else ""
    properties = schema.get("properties")
    required = _strings(schema.get("required"))
    fields = ""
    if isinstance(properties, Mapping):
        for name, field in properties.items():
            mark = "" if name in required else "?"
            fields += _property(f"{name}{mark}", field, indent, depth - 1)
    return f"{comment}{{\n{fields}{indent}}}"


def _property(name: str, schema: Any, indent: str, depth: int) -> str:
    """The lines of one property: comments, then its name and type."""
    if not isinstance(schema, Mapping):
        return f"{indent}{name}: any,\n"
    comments = _comments(schema, indent)
    if isinstance(schema.get("oneOf"), list):
        variants = _variants(schema["oneOf"], indent, depth, _default, _description(schema))
        return f"{comments}{indent}{name}:{''.join(variants)}\n{indent},\n"
    kind = _nullable(schema, _type(schema, indent + "    ", depth))
    default = _default(schema)
    return f"{comments}{indent}{name}: {kind},{' // ' + default if default else ''}\n"


def _comments(schema: Mapping[str, Any], indent: str) -> str:
    """The lines above a property. A union lists its examples before the description."""
    title, examples, description = schema.get("title"), schema.get("examples"), _description(schema)
    lines = [f"// {title}", "//"] if isinstance(title, str) else []
    described = [f"// {description}"] if description is not None else []
    shown = [f'// - "{example}"' for example in _strings(examples)]
    if isinstance(examples, list) and examples:
        shown = ["// Examples:", *shown]
    if isinstance(schema.get("oneOf"), list):
        default = _default(schema)
        if schema["oneOf"] and _description(schema["oneOf"][0]) == description:
            described = []
        lines += [*shown, *described, *([f"// {default}"] if default else [])]
    else:
        lines += [*described, *shown]
    return "".join(f"{indent}{line}\n" for line in lines)


def _variants(
    schemas: Sequence[Any],
    indent: str,
    depth: int,
    default: Callable[[Mapping[str, Any]], str | None],
    above: str | None = None,
) -> list[str]:
    """One line a variant of a union.

    Where the union's own description stands `above`, the first variant and every one that repeats
    it go without theirs.
    """
    lines = []
    for i, schema in enumerate(schemas):
        kind = _type(schema, indent + "   ", depth - 1)
        notes = ""
        if isinstance(schema, Mapping):
            kind = _nullable(schema, kind)
            description = _description(schema)
            if above is not None and (i == 0 or description == above):
                description = None
            words = [word for word in (description, default(schema)) if word is not None]
            notes = f" // {' '.join(words)}" if words else ""
        lines.append(f"\n{indent} | {kind}{notes}")
    return lines


def _nullable(schema: Mapping[str, Any], kind: str) -> str:
    return f"{kind} | null" if schema.get("nullable") is True and "null" not in kind else kind


def _description(schema: Any) -> str | None:
    text = schema.get("description") if isinstance(schema, Mapping) else None
    return text if isinstance(text, str) else None


def _default(schema: Mapping[str, Any]) -> str | None:
    """`default: <value>`; a string stands in quotes unless the schema is an enum."""
    if "default" not in schema:
        return None
    value = schema["default"]
    if not isinstance(value, str):
        return f"default: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
    return f"default: {value}" if schema.get("enum") else f'default: "{value}"'


def _nested_default(schema: Mapping[str, Any]) -> str | None:
    """As `_default`, for the variants of a union inside a type: an enum has quotes there too."""
    if isinstance(schema.get("default"), str) and schema.get("enum"):
        return f"default: {json.dumps(schema['default'], ensure_ascii=False)}"
    return _default(schema)


def _strings(values: Any) -> list[str]:
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
