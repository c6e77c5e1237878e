"""`DEQConfig` reads options from whatever holds them, and changes nothing."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import types
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from torchdeq import DEQConfig, get_deq

NESTED = {"lr": [1, 2]}


@dataclasses.dataclass
class Plain:
    f_tol: float = 1e-4
    nested: Any = dataclasses.field(default_factory=lambda: NESTED)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    f_tol: float = 1e-4
    nested: Any = dataclasses.field(default_factory=lambda: NESTED)


class Defaults:
    f_tol = 1e-4
    nested = NESTED
    _private = 1
    limits: ClassVar[tuple[int, ...]] = (1, 2)

    def method(self) -> int:
        return 1

    @property
    def asked(self) -> int:
        raise AssertionError("a property is not read")

    @staticmethod
    def static() -> int:
        return 1


class Derived(Defaults):
    f_solver = "anderson"

    def __init__(self) -> None:
        self.f_tol = 1e-5


class Slots:
    __slots__ = ("f_tol", "nested", "unset")

    def __init__(self) -> None:
        self.f_tol, self.nested = 1e-4, NESTED


class DictLike:
    """As configuration libraries have it: keys, items and attributes, and no Mapping."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["_content"] = values

    def keys(self) -> Iterator[str]:
        return iter(self._content)

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __getattr__(self, key: str) -> Any:
        return self._content[key]


HOLDERS = {
    "namespace": argparse.Namespace(f_tol=1e-4, nested=NESTED),
    "dict": {"f_tol": 1e-4, "nested": NESTED},
    "ordered": OrderedDict(f_tol=1e-4, nested=NESTED),
    "proxy": MappingProxyType({"f_tol": 1e-4, "nested": NESTED}),
    "simple": SimpleNamespace(f_tol=1e-4, nested=NESTED),
    "dataclass": Plain(),
    "slots dataclass": Frozen(),
    "named tuple": namedtuple("Options", "f_tol nested")(1e-4, NESTED),
    "object": Defaults(),
    "class": Defaults,
    "slots": Slots(),
    "dictionary-like": DictLike(f_tol=1e-4, nested=NESTED),
    "config": DEQConfig({"f_tol": 1e-4, "nested": NESTED}),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_options_are_read_and_values_are_not_copied(name: str) -> None:
    config = DEQConfig(HOLDERS[name])
    assert config.get("f_tol") == 1e-4
    assert config.get("nested") is NESTED
    assert config.get("b_tol") is None
    assert config.get("b_tol", 3) == 3
    assert get_deq(HOLDERS[name]).f_tol == 1e-4


@pytest.mark.parametrize("name", HOLDERS)
def test_the_original_is_not_changed(name: str) -> None:
    original = HOLDERS[name]
    config = DEQConfig(original)
    config.update(f_tol=0.5, new=1)
    assert config.get("f_tol") == 0.5
    assert config.get("new") == 1
    again = DEQConfig(original)
    assert again.get("f_tol") == 1e-4
    assert again.get("new") is None
    assert NESTED == {"lr": [1, 2]}


def test_defaults_of_a_class_are_options_and_its_methods_are_not() -> None:
    assert DEQConfig(Derived()).config == {
        "f_tol": 1e-5,
        "nested": NESTED,
        "limits": (1, 2),
        "f_solver": "anderson",
    }


def test_a_module_of_python_and_a_configuration_of_none() -> None:
    module = types.ModuleType("settings")
    module.f_tol = 1e-4
    assert DEQConfig(module).config == {"f_tol": 1e-4}
    assert DEQConfig().config == DEQConfig(None).config == {}
    assert DEQConfig(argparse.Namespace()).config == {}
    assert DEQConfig({}).config == {}


def test_copies_and_printing() -> None:
    config = DEQConfig(f := {"f_tol": 1e-4})
    assert copy.deepcopy(config).config == f
    assert repr(config) == "DEQConfig({'f_tol': 0.0001})"


@pytest.mark.parametrize(
    "wrong",
    ["f_tol=1e-4", b"x", ["f_tol"], ("f_tol", 1), {"f_tol"}, 3, 2.5, True, len, print, dict, object(), int],
)
def test_what_holds_no_options_is_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a configuration is an argparse.Namespace"):
        DEQConfig(wrong)


def test_functions_and_tensors_are_no_configuration() -> None:
    for wrong in (lambda z: z, torch.ones(2)):
        with pytest.raises(TypeError, match="a configuration is"):
            DEQConfig(wrong)


def test_a_dataclass_is_given_as_an_instance() -> None:
    """Of the class itself, the options without a default would be missing without a word."""
    with pytest.raises(TypeError, match=r"instance: Plain\(\)"):
        DEQConfig(Plain)
