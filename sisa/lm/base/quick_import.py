"""Import torch and transformers in half of the time, in a process that runs one command and ends.

These imports spend most of their time on code that such a process never uses. It is left out here:

    hidden         SciPy, accelerate, tensors that are sharded over machines: transformers works without
                   (a process that trains keeps accelerate, and hides SciPy from transformers alone and
                   boto3 from accelerate alone)
    placeholders   for torch's compiler, its export, and its Python kernels for tensors without data; the
                   first access to one of them loads all
    read once      the files of transformers' 500 models, which it searches for names twice
    compiled late  the 1,200 patterns by which transformers rewrites the names of weights

Answers are the same to the bit. Hidden modules stay hidden, so only a process that runs one command may
call this.

    import_quickly()
    from transformers import AutoModelForCausalLM
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

HIDDEN = ("accelerate", "scipy")
COMPILER, EXPORT, META_KERNELS = "torch._dynamo", "torch.export", "torch._meta_registrations"
TRANSFORM = f"{COMPILER}._trace_wrapped_higher_order_op"  # transformers imports a class from it
PLACEHOLDERS = (META_KERNELS, EXPORT, COMPILER, TRANSFORM)  # in the order in which they can be loaded


def import_quickly(*, trains: bool = False) -> None:
    """Leave out what answering does not use when this process imports torch and transformers.

    With `trains`, keep what training also uses.
    """
    sys.meta_path.insert(0, _Finder(trains=trains))


class _Finder(MetaPathFinder):
    """Change some modules when they are imported; load what a placeholder's submodule belongs to."""

    def __init__(self, *, trains: bool) -> None:
        self._hidden = () if trains else HIDDEN

    def find_spec(self, name: str, path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name == "torch":
            _put_placeholders(META_KERNELS, EXPORT)
        elif name == "transformers":
            _hide(*self._hidden)
        elif name in _CHANGES:
            return _changed(PathFinder.find_spec(name, path), _CHANGES[name])
        elif isinstance(sys.modules.get(name.rpartition(".")[0]), _Placeholder):
            _load()
            loaded = sys.modules.get(name)
            return ModuleSpec(name, _Loaded(loaded)) if loaded else importlib.util.find_spec(name)
        return None


def _hide(*names: str) -> None:
    import torch

    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules.update(dict.fromkeys(names))  # None makes an import fail as if there were no module
    torch.distributed.is_available = lambda: False
    # Generators need what the import of these kernels does.
    if isinstance(sys.modules.get(META_KERNELS), _Placeholder):
        base = importlib.import_module("torch._opaque_base")
        torch._C._set_generator_metaclass(base.OpaqueBaseMeta)
    if COMPILER not in sys.modules:
        _put_placeholders(COMPILER, TRANSFORM)


def _put_placeholders(*names: str) -> None:
    sys.modules.update({name: _Placeholder(name) for name in names if name not in sys.modules})


def _load() -> None:
    """Load all modules that have a placeholder."""
    names = [name for name in PLACEHOLDERS if isinstance(sys.modules.get(name), _Placeholder)]
    for name in names:
        del sys.modules[name]
    for name in names:
        importlib.import_module(name)


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return the decorated function, or this decorator where it was called with options."""
    return function or _unchanged


class _Placeholder(ModuleType):
    """A placeholder for a module. For the compiler's, decorators return functions as they are."""

    disable = allow_in_graph = assume_constant_result = staticmethod(_unchanged)
    graph_break = staticmethod(_unchanged)  # optimizers call it, and nothing is compiled

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    @staticmethod
    def TransformGetItemToIndex() -> Any:
        _load()
        return sys.modules[TRANSFORM].TransformGetItemToIndex()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _load()
        return getattr(sys.modules[self.__name__], name)


class _Loaded(Loader):
    """A loader that returns a module which is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, _module: ModuleType) -> None:
        pass


def _changed(spec: ModuleSpec | None, change: Callable[[Any], None]) -> ModuleSpec | None:
    """Return the spec of a module that is changed after its import."""
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _read_once(import_utils: Any) -> None:
    import_utils.is_scipy_available = lambda: False
    scan, names = import_utils.create_import_structure_from_path, import_utils.fetch__all__
    import_utils.create_import_structure_from_path = functools.cache(scan.__wrapped__)
    import_utils.fetch__all__ = lambda text: names(text[max(0, text.rfind("\n__all__")) :])


def _leave_boto3(imports: Any) -> None:
    imports.is_boto3_available = lambda: False


def _compile_late(core_model_loading: Any) -> None:
    core_model_loading.re = SimpleNamespace(**{**vars(re), "compile": _Pattern})


class _Pattern:
    """A regular expression that is compiled at its first use."""

    def __init__(self, *given: Any) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(re.compile(*self._given), name)


_CHANGES: dict[str, Callable[[Any], None]] = {
    "accelerate.utils.imports": _leave_boto3,
    "transformers.core_model_loading": _compile_late,
    "transformers.utils.import_utils": _read_once,
}
