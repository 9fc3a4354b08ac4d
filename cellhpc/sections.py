"""What the job file and the site file share: frozen, documented sections of TOML, and what is wrong with them."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from cellhpc.errors import UsageError


class Settings(BaseModel):
    """Base of every section: frozen, documented by its fields' docstrings, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Document = TypeVar("Document", bound=Settings)


def expand_variables(text: str) -> str:
    """Put the environment's values in the place of `${VARIABLES}`; a ValueError names one that is not set."""
    unset = [name for name in re.findall(r"\$\{(\w+)\}", text) if name not in os.environ]
    if unset:
        raise ValueError(f"the environment variable {unset[0]} is not set; type: export {unset[0]}=...")
    return os.path.expandvars(text)


def expand_path(value: object) -> object:
    """Make a path of a string absolute, with `~` and variables replaced; anything else stays."""
    return Path(expand_variables(value)).expanduser().absolute() if isinstance(value, str) else value


UserPath = Annotated[Path, BeforeValidator(expand_path)]
"""A path as users write it."""


def load(root: type[Document], path: Path | str, what: str, examples: str, overrides: Sequence[str] = ()) -> Document:
    """Read a TOML file into the class of its sections; `what` it is and where `examples` lie go into messages.

    Raises
    ------
    UsageError
        The file is missing or not TOML, a key is unknown (the valid ones are listed), or a value is not allowed.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such {what}. {examples}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UsageError(f"{path}: not a TOML file: {fault}") from None
    except OSError as fault:
        raise UsageError(f"{path}: can't be read: {fault.strerror}") from None
    for override in overrides:
        _apply_override(document, override)
    return parse(root, document, str(path))


def parse(root: type[Document], document: dict[str, Any], source: str) -> Document:
    """Validate nested dictionaries; `source` names them in messages."""
    try:
        return root.model_validate(document)
    except ValidationError as fault:
        raise UsageError("\n".join(_explain(root, error, document, source) for error in fault.errors())) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value` of `--set`; the value is TOML, or a bare word for a string.

    Raises
    ------
    UsageError
        There is no key or no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text}: expected KEY=VALUE, for instance --set train.epochs=5")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    *sections, name = [part.strip() for part in key.split(".")]
    if not sections or not name:
        raise UsageError(f"--set {override}: expected section.key=value, for instance --set train.epochs=5")
    table = document
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {section} is not a section")
    table[name] = value


def _explain(root: type[Settings], error: Any, document: dict[str, Any], source: str) -> str:
    """One line on one pydantic error: where, what was found, what is allowed."""
    location = [str(part) for part in error["loc"]]
    if len(location) > 1 and location[1] in _tags(root, location[0]):
        del location[1]
    where = f"{source}: {'.'.join(location)}: " if location else f"{source}: "
    match error["type"]:
        case "extra_forbidden":
            valid = _section(root, location[:-1], document).model_fields
            return f"{where}unknown {'key' if len(location) > 1 else 'section'}. Valid here: {', '.join(valid)}."
        case "missing":
            field = _section(root, location[:-1], document).model_fields.get(location[-1])
            return f"{where}missing. {((field and field.description) or '').replace(chr(10), ' ')}".rstrip()
        case "union_tag_invalid" | "union_tag_not_found":
            key = error["ctx"]["discriminator"].strip("'")
            found = document.get(location[0], {}).get(key, "nothing")
            return f"{where}{key} is {found!r}. Allowed: {', '.join(map(repr, _tags(root, location[0])))}."
        case "tuple_type":
            found = error["input"]
            return f"{where}found {found!r}. A list is wanted, in square brackets: [{json.dumps(found, default=str)}]."
        case _:
            found = "" if isinstance(error["input"], dict | BaseModel) else f"found {error['input']!r}. "
            message = error["msg"].removeprefix("Value error, ")
            return f"{where}{found}{message}."


def _tags(root: type[Settings], section: str) -> dict[str, type[Settings]]:
    """Kinds of a section that has several, by the value of the key that tells them apart; else nothing."""
    field = root.model_fields.get(section)
    if field is None or not isinstance(field.discriminator, str):
        return {}
    kinds = get_args(field.annotation)
    return {get_args(kind.model_fields[field.discriminator].annotation)[0]: kind for kind in kinds}


def _section(root: type[Settings], path: Sequence[str], document: dict[str, Any]) -> type[BaseModel]:
    """Class of the section at a path."""
    model: Any = root
    for number, part in enumerate(path):
        field = model.model_fields[part]
        kinds = _tags(root, part) if number == 0 else {}
        if kinds:
            stated = document.get(part, {}).get(field.discriminator)
            model = kinds.get(stated, list(kinds.values())[-1])
        else:
            model = next((kind for kind in get_args(field.annotation) if isinstance(kind, type)), field.annotation)
    return model
