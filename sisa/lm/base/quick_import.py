"""Import transformers in a third of the time, in a process that asks a model once and ends.

Most of the time that importing transformers takes goes to what such a process never uses: SciPy, for the
losses of object detectors; tensors that are sharded over machines; and torch's compiler. transformers
works on machines without the first two, so they are hidden from it. It imports the compiler everywhere,
so a module stands for it, whose decorators return functions as they are. The compiler itself is loaded
once anything else is asked of it. Answers are the same to the bit.

What is hidden stays hidden, so only a process that runs one command may call this.

    import_quickly()
    from transformers import AutoModelForCausalLM
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
MANY_OBJECTS = 2_000_000  # more than imports make, so that no garbage is collected during them
TRANSFORM = f"{COMPILER}._trace_wrapped_higher_order_op"  # transformers imports a class from it


def import_quickly() -> None:
    """Hide what answering does not use, once this process imports transformers."""
    gc.set_threshold(MANY_OBJECTS)
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Notice which modules are imported; find those of the compiler after loading it."""

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name == "transformers":
            _hide()
        elif name.startswith(f"{COMPILER}.") and isinstance(sys.modules[COMPILER], _Compiler):
            _load_compiler()
            held = sys.modules.get(name)
            return ModuleSpec(name, _Held(held)) if held else importlib.util.find_spec(name)
        return None


def _hide() -> None:
    import torch

    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules["scipy"] = None  # makes an import fail as if there were no module
    torch.distributed.is_available = lambda: False
    if COMPILER not in sys.modules:
        sys.modules.update({name: _Compiler(name) for name in (COMPILER, TRANSFORM)})


def _load_compiler() -> None:
    for name in (COMPILER, TRANSFORM):
        if isinstance(sys.modules.get(name), _Compiler):
            del sys.modules[name]
    importlib.import_module(TRANSFORM)


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return the decorated function, or this decorator where it was called with options."""
    return function or _unchanged


class _Compiler(ModuleType):
    """A module that stands for one of the compiler's."""

    disable = allow_in_graph = assume_constant_result = staticmethod(_unchanged)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    @staticmethod
    def TransformGetItemToIndex() -> Any:
        _load_compiler()
        return sys.modules[TRANSFORM].TransformGetItemToIndex()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _load_compiler()
        return getattr(sys.modules[self.__name__], name)


class _Held(Loader):
    """Return a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, _module: ModuleType) -> None:
        pass
