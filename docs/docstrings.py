"""For the documentation build: how this project writes docstrings and classes, put as griffe wants it."""

from __future__ import annotations

import importlib
import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?P<indent>^[ \t]*)>>> .*(?:\n(?P=indent)\S.*|\n(?P=indent)[ \t]+\S.*)*", re.M)
SHARED = re.compile(r"^(?P<indent> {4})(?P<names>\w+(?:, \w+)+)(?P<text>: .*(?:\n(?P=indent) +.*)*)", re.M)


class Docstrings(griffe.Extension):
    """Puts a fence around each doctest, writes out arguments that share one description, and finds classes that
    are made by a function, which reading the source does not show."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for every object that has been read."""
        if obj.docstring:
            obj.docstring.value = SHARED.sub(_one_by_one, DOCTEST.sub(_fenced, obj.docstring.value))

    def on_module_members(self, *, mod: griffe.Module, agent: object, **kwargs: Any) -> None:
        """Called when all of a module has been read."""
        made = [name for name, member in mod.members.items() if _is_made_class(mod, name, member)]
        if made and isinstance(agent, griffe.Visitor):
            seen = griffe.inspect(
                mod.name, filepath=mod.filepath, parent=mod.parent, extensions=agent.extensions
            )
            for name in made:
                mod.set_member(name, seen.members[name])


def _is_made_class(module: griffe.Module, name: str, member: Any) -> bool:
    if name.startswith("_") or member.is_alias or not member.is_attribute:
        return False
    if not isinstance(member.value, griffe.ExprCall):
        return False
    return isinstance(getattr(importlib.import_module(module.path), name), type)


def _fenced(match: re.Match[str]) -> str:
    indent = match["indent"]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"


def _one_by_one(match: re.Match[str]) -> str:
    names = match["names"].split(", ")
    return "\n".join(f"{match['indent']}{name}{match['text']}" for name in names)
