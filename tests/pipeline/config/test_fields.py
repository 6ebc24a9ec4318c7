"""Every field of the configuration, with type, bounds and default, is on record: a change of one is a decision."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from tropd.pipeline.config.schema import Config

RECORD = Path(__file__).with_name("fields.txt")


def test_the_fields_are_those_on_record(on_record: Callable[[Path, list[str]], None]) -> None:
    on_record(RECORD, field_lines())


def field_lines() -> list[str]:
    """``path: type = default`` of each field; the kinds of rules and estimators follow, each once."""
    kinds: dict[str, type[BaseModel]] = {}
    lines = list(_fields(Config, None, "", kinds))
    done: set[str] = set()
    while left := sorted(kinds.keys() - done):
        for tag in left:
            lines += ["", f"[{tag}]", *_fields(kinds[tag], None, "", kinds)]
            done.add(tag)
    return lines


def _fields(
    spec: type[BaseModel], instance: BaseModel | None, prefix: str, kinds: dict[str, type[BaseModel]]
) -> Iterator[str]:
    for name, info in spec.model_fields.items():
        path = f"{prefix}{name}"
        value = getattr(instance, name) if instance is not None else _default(info)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, value if value is not ... else None, f"{path}.", kinds)
            continue
        default = "required" if value is ... else f"= {json.dumps(_plain(value), ensure_ascii=False)}"
        yield f"{path}: {_type_of(info)} {default}"
        many = "[]" if "tuple[" in str(info.annotation) else ""
        for inner in _models_in(info.annotation):
            if tag := _tag(inner):
                kinds[tag] = inner
            else:
                yield from _fields(inner, None, f"{path}{many}.", kinds)


def _default(info: FieldInfo) -> Any:
    return ... if info.is_required() else info.get_default(call_default_factory=True)


def _plain(value: Any) -> Any:
    return TypeAdapter(Any).dump_python(value, mode="json")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _tag(spec: type[BaseModel]) -> str:
    """``field = "kind"`` of a model that is one of several, where the field has one possible value; else nothing."""
    for name, info in spec.model_fields.items():
        if get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1:
            return f"{name} = {json.dumps(get_args(info.annotation)[0])}"
    return ""


def _type_of(info: FieldInfo) -> str:
    schema = TypeAdapter(info.rebuild_annotation()).json_schema(mode="validation")
    return _type_text(schema, schema.get("$defs", {}))


def _type_text(schema: dict[str, Any], named: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _type_text(named[schema["$ref"].removeprefix("#/$defs/")], named)
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(_type_text(option, named) for option in options)
    kind = schema.get("type", "anything")
    if kind in ("integer", "number"):
        return kind + _bounds(schema)
    if kind == "array":
        inner = schema.get("prefixItems") or [schema.get("items", {})]
        return f"list of ({', '.join(_type_text(item, named) for item in inner)})"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"table of ({_type_text(schema['additionalProperties'], named)})"
    if kind == "object":
        return _kind_of_table(schema)
    return kind + "".join(
        f" {name}={schema[name]}" for name in ("format", "minLength", "pattern") if name in schema
    )


def _kind_of_table(schema: dict[str, Any]) -> str:
    kinds = [value["const"] for value in schema.get("properties", {}).values() if "const" in value]
    return json.dumps(kinds[0]) if kinds else "table"


def _bounds(schema: dict[str, Any]) -> str:
    low = f"[{schema['minimum']}" if "minimum" in schema else f"({schema.get('exclusiveMinimum', '-∞')}"
    high = f"{schema['maximum']}]" if "maximum" in schema else f"{schema.get('exclusiveMaximum', '∞')})"
    return f" {low}, {high}"
