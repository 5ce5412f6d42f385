"""Read the weights of a model on the meta device when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hf_prune.calibration.block_sequence import replaced_forward
from hf_prune.conversion.streaming.meta_model import MetaModel

_DEVICE = Tensor.device.__get__  # the function that a TorchFunctionMode sees for ``tensor.device``
_SHAPES = ("expand_as", "reshape_as", "type_as", "view_as")  # functions that look at the shape or dtype of an argument


class LazyWeights:
    """A context in which a model on the meta device can run: its weights are read while they are needed.

    The weights of a module are read when it is called and dropped afterwards, so that a batch takes the memory of one
    module; the operating system's cache makes it cheap to read them again for the next batch. Of an embedding only the
    rows that are looked up are read. A weight that is used outside of the module that holds it, as that of the
    convolution in a Mamba layer, is read when it is used. An output embedding that is not pruned is not read at all:
    its output is a tensor on the meta device.

    Args:
        meta_model: The model.
        read: Reads a parameter by its name in the model.
        read_rows: Reads some rows of a parameter.
        targets: Names of the parameters that are pruned.
        skip_head: Whether the output embedding may be skipped.
    """

    def __init__(
        self,
        meta_model: MetaModel,
        read: Callable[[str], Tensor],
        read_rows: Callable[[str, Sequence[int]], Tensor],
        targets: Iterable[str] = (),
        skip_head: bool = False,
    ) -> None:
        self.model = meta_model.model
        self._read = read
        self.read_rows = read_rows
        self._empty = {name: p for name, p in self.model.named_parameters() if p.is_meta}
        self.names = {id(parameter): name for name, parameter in self._empty.items()}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._empty}
        self._of: dict[nn.Module, list[str]] = {}
        for module in self.model.modules():
            for attribute, parameter in module._parameters.items():
                if id(parameter) in self.names:
                    self._places[self.names[id(parameter)]].append((module, attribute))
                    self._of.setdefault(module, []).append(self.names[id(parameter)])
        for name, module in self.model.named_modules():
            # What holds modules may be used by the one around it without being called; vectors are read with that one.
            if name and module in self._of and any(module.children()):
                vectors = [own for own in self._of[module] if self._empty[own].dim() <= 1]
                self._of.setdefault(self.model.get_submodule(name.rpartition(".")[0]), []).extend(vectors)
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        spare = isinstance(head, nn.Linear) and not set(self._of.get(head, ())) & set(targets)
        self._head = head if skip_head and spare else None
        self._loaded: set[str] = set()
        self._held: set[str] = set()
        self._lent: set[str] = set()  # to others than the modules that hold them
        self._users: dict[str, int] = {}
        self._context = ExitStack()

    def __enter__(self) -> LazyWeights:
        for module in self._of:
            if module is self._head:
                self._context.enter_context(replaced_forward(module, partial(_shape_only, module.out_features)))
            elif not isinstance(module, nn.Embedding):
                self._context.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                self._context.callback(module.register_forward_hook(self._after).remove)
        self._context.enter_context(_Absent(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.close()
        self.release()

    def release(self) -> None:
        """Drop all weights."""
        self.hold(())
        self._users.clear()

    def hold(self, names: Iterable[str]) -> None:
        """Put exactly these weights into the model, and drop all others. These stay when their modules have run."""
        names = self._held = set(names)
        self._lent.clear()
        for name in self._loaded - names:
            self._put(name, self._empty[name])
        self._loaded &= names
        for name in names:
            self._load(name)

    def hold_for_gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        """:meth:`hold` these weights, and return them by name: the parameters in the model, which require gradients."""
        names = list(names)
        self.hold(names)
        return {name: self._parameter(name).requires_grad_() for name in names}

    def __getitem__(self, name: str) -> Tensor:
        """A weight that is in the model."""
        return self._parameter(name).detach()

    def _parameter(self, name: str) -> Tensor:
        module, attribute = self._places[name][0]
        parameter = module._parameters[attribute]
        assert parameter is not None
        return parameter

    def names_in(self, module: nn.Module) -> list[str]:
        """Names of the weights inside a module, whether they are there or not."""
        return list(dict.fromkeys(name for inner in module.modules() for name in self._of.get(inner, ())))

    def weight_of(self, x: Tensor) -> Tensor | None:
        """What a tensor on the meta device stands for, read if need be; None unless it is a weight, or a view of one.

        The weights stay in the model until those of another module are asked for.
        """
        base = x if x._base is None else x._base
        if (name := self.names.get(id(base))) is None or self._empty[name] is not base:
            return None
        owner = name.rpartition(".")[0]
        if any(other.rpartition(".")[0] != owner for other in self._lent):
            lent, self._lent = self._lent, set()
            for other in lent:
                self._drop(other)
        self._load(name)
        self._lent.add(name)
        module, attribute = self._places[name][0]
        weight = module._parameters[attribute]
        assert weight is not None
        return weight if base is x else weight.as_strided(x.size(), x.stride(), x.storage_offset())

    def _load(self, name: str) -> None:
        if name not in self._loaded:
            self._put(name, nn.Parameter(self._read(name), requires_grad=False))
            self._loaded.add(name)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        for module, attribute in self._places[name]:
            module._parameters[attribute] = parameter

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if any(isinstance(x, Tensor) and x.is_meta for x in (*args, *kwargs.values())):
            raise NotImplementedError(f"the input of a {type(module).__name__} is on the meta device")
        for name in self._of[module]:
            self._users[name] = self._users.get(name, 0) + 1
            self._load(name)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        for name in self._of[module]:
            self._users[name] -= 1
            self._drop(name)

    def _drop(self, name: str) -> None:
        """Drop a weight that nobody needs any more."""
        if not self._users.get(name) and name in self._loaded - self._held - self._lent:
            self._put(name, self._empty[name])
            self._loaded.discard(name)


def _shape_only(outputs: int, x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs), device="meta")


class _Absent(TorchFunctionMode):
    """Reads weights that are used outside of the modules that hold them; of an embedding only rows that it looks up.

    Some functions of torch take a tensor on the meta device together with one that is there, and return memory that
    nobody has written. So a weight is read before it is used that way, and anything else on the meta device is refused.
    """

    def __init__(self, lazy: LazyWeights) -> None:
        super().__init__()
        self._lazy = lazy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE and id(args[0]) in self._lazy.names:
            return torch.device("cpu")
        if func is nn.functional.embedding and len(args) > 1 and id(args[1]) in self._lazy.names and args[1].is_meta:
            ids, weight = args[:2]
            rows, where = ids.unique(return_inverse=True)
            return self._lazy.read_rows(self._lazy.names[id(weight)], rows.tolist())[where]
        given = list(_tensors((*args, *kwargs.values())))
        absent = {id(x): x for x in given if x.is_meta}
        if not absent or all(x.is_meta for x in given):
            return func(*args, **kwargs)
        found = {key: weight for key, x in absent.items() if (weight := self._lazy.weight_of(x)) is not None}
        if found:
            args, kwargs = tree_map(lambda x: found.get(id(x), x), (args, kwargs))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if len(found) < len(absent) and name not in _SHAPES and not all(x.is_meta for x in _tensors((result,))):
            raise NotImplementedError(f"an input of {name} is on the meta device")
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (x for x in value if isinstance(x, Tensor))
