"""Fields of the configuration from pydantic's locations of errors, which also hold the tags of unions; these are read
off the unions themselves.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

Location = tuple[str | int, ...]


def fields_at(model: type[BaseModel], location: Location) -> tuple[Location, list[str]]:
    """The fields that a location of pydantic's leads through, and the names of those that are valid below it.

    A location also holds which member of a union was tried: the tag of a tagged one, a type's name of another.
    """
    path: list[str | int] = []
    current: Any = model
    for part in location:
        current = _given(current)
        members = union_members(current)
        if part in members:
            current = members[str(part)]
            continue
        if not _holds_others(current):
            break
        path.append(part)
        current = _inside(current, part)
    models = _models(current)
    return tuple(path), list(models[0].model_fields) if len(models) == 1 else []


def union_members(annotation: Any) -> dict[str, type[BaseModel]]:
    """Members of a union of models by their tags, the one value that a field of theirs can have; of others none."""
    models = _models(annotation)
    return {_tag(model)[1]: model for model in models} if len(models) > 1 else {}


def discriminators(annotation: Any) -> set[str]:
    """Names of the fields that tell members of unions apart, wherever a specification has unions."""
    models = _models(annotation)
    found = {_tag(model)[0] for model in models} if len(models) > 1 else set()
    inner = [field.annotation for model in models for field in model.model_fields.values()]
    return found.union(*map(discriminators, [*inner, *(get_args(annotation) if not models else ())]))


def _tag(member: type[BaseModel]) -> tuple[str, str]:
    """Name and value of the field whose value is fixed."""
    fixed = {
        name: get_args(field.annotation)
        for name, field in member.model_fields.items()
        if _is_fixed(field.annotation)
    }
    ((name, (value,)),) = fixed.items()
    return name, value


def _is_fixed(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value may be one of: the annotated one, all members of a union, or none."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for member in get_args(annotation) for model in _models(member)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _given(annotation: Any) -> Any:
    """An annotation without its metadata and without None."""
    if get_origin(annotation) is Annotated:
        return _given(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [member for member in get_args(annotation) if member is not type(None)]
        return _given(others[0]) if len(others) == 1 else annotation
    return annotation


def _holds_others(annotation: Any) -> bool:
    return bool(_models(annotation)) or get_origin(annotation) in (tuple, dict)


def _inside(annotation: Any, part: str | int) -> Any:
    """The annotation of a field, an element or a value; None where there is none."""
    models, values = _models(annotation), get_args(annotation)
    if models:
        fields = models[0].model_fields
        return fields[part].annotation if len(models) == 1 and part in fields else None
    if get_origin(annotation) is dict:
        return values[1]
    return (
        values[part] if isinstance(part, int) and part < len(values) and values[-1] is not ... else values[0]
    )
