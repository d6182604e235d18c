"""Opening checkpoints of other code without running anything that they hold."""

from __future__ import annotations

import json
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from priors.errors import PriorError

_DEPTH = 64
"""Containers within each other; real files have about five."""

_ALLOWANCE = (8, 64 * 2**20)
"""Bytes of tensors that a file may claim: so many times its own (tensors may share memory), and so many."""

_SKIPPED = ("omegaconf.", "ml_collections.", "pathlib.", "numpy.", "pytorch_lightning.", "lightning.")
_SKIPPED_NAMES = frozenset(
    {
        "argparse.Namespace",
        "types.SimpleNamespace",
        "collections.defaultdict",
        "typing.Any",
        *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    }
)
"""Classes that stand beside the weights in training checkpoints (settings, numbers of numpy, paths). An empty
stand-in takes the place of each: neither they nor their constructors are called, and what they held is
dropped."""

_DATA = (
    "torch._utils._rebuild_",
    "torch._tensor._rebuild_",
    "torch.nn.parameter.",
    "collections.",
    "_codecs.",
)
_DATA_NAMES = frozenset(
    {
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        *(f"builtins.{name}" for name in ("bytearray", "complex", "set")),
    }
)


def open_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint into nested dicts and lists of tensors, numbers and strings.

    Parameters
    ----------
    path
        A file of ``torch.save`` (``.pt``, ``.pth``, ``.ckpt``, ``.bin``, of either format), or safetensors.
        What it is is told by its content; a name that ends in ``.safetensors`` must hold that.

    Returns
    -------
    Any
        Tensors are dense, on the CPU, without gradients; those of a ``torch.save`` file lie in the file and
        are read when they are used. Tuples have become lists. What is neither of all this is None: the
        settings of a training, for instance, where they were kept as objects.

    Raises
    ------
    PriorError
        If the file holds code, is damaged, or is no checkpoint.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise PriorError(f"{path} cannot be read: {error.strerror or error}") from None
    if not start:
        raise PriorError(f"{path} is empty")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        content: Any = _open_safetensors(path)
    elif start.startswith(b"PK\x03\x04"):
        _check_archive(path)
        content = _torch_load(path, mmap=True)
    elif start.startswith(b"\x80"):
        content = _torch_load(path, mmap=False)
    else:
        raise PriorError(f"{path} is not a checkpoint: neither a file of torch.save nor safetensors")
    return _Plain(path, size).copy(content, "")


def read_config(config: object) -> dict[str, Any]:
    """What the user knows beside the checkpoint: a mapping as it is, or the JSON file of that name.

    Raises
    ------
    PriorError
        If there is no such file, or it does not hold one JSON object.
    """
    if config is None:
        return {}
    if isinstance(config, str | Path):
        try:
            values = json.loads(Path(config).read_text(encoding="utf-8"))
        except OSError as error:
            raise PriorError(f"{config} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise PriorError(f"{config} is not JSON: {error}") from None
    else:
        values = config
    try:
        named = {key: values[key] for key in values.keys()}  # noqa: SIM118 - any mapping
    except (AttributeError, TypeError, KeyError):
        what = f"{config} holds" if isinstance(config, str | Path) else "config= is"
        raise PriorError(
            f"{what} {type(values).__name__}; the arguments of a constructor come as a JSON object or dict"
        ) from None
    if not all(isinstance(key, str) for key in named):
        raise PriorError("config= has names that are no strings")
    return named


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PriorError(f"{path} is not a safetensors file: {error}") from None


def _check_archive(path: Path) -> None:
    """See that every byte of a ``torch.save`` archive is as it was written.

    Its tensors are used where they lie in the file, so that one claiming to be larger than its record cannot
    reach beyond the file. Nobody checks their sums then, hence this.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            broken = archive.testzip() if stored else None
    except Exception as error:  # whatever a damaged archive brings zipfile to raise
        raise PriorError(f"{path} is damaged or cut short: {error}") from None
    names = {member.filename.partition("/")[2] for member in members}
    if any(name.startswith("code/") for name in names):
        raise PriorError(f"{path} {_code('TorchScript')}")
    if not stored:
        raise PriorError(f"{path} is a compressed archive; torch.save writes none, unpack it first")
    if broken is not None:
        raise PriorError(f"{path} is damaged: the sum of its record {broken} is wrong")
    if "data.pkl" not in names:
        raise PriorError(f"{path} is an archive, but not one of torch.save")


def _torch_load(path: Path, mmap: bool) -> Any:
    names = _names(path)
    stand_ins: list[Any] = [_stand_in(name) for name in sorted(names) if _is_skipped(name)]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # what torch thinks of old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a damaged or malicious pickle brings torch to raise
        code = sorted(name for name in names if not (_is_skipped(name) or _is_data(name)))
        if code:
            raise PriorError(f"{path} {_code(', '.join(code[:3]))}") from None
        sentence = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch would advise to run the code after all
            sentence = "its pickle holds more than tensors and containers"
        raise PriorError(f"{path} is damaged, or no file of torch.save: {sentence}") from None


def _code(names: str) -> str:
    return (
        f"holds Python code, not only tensors ({names}); it was not run. Ask for, or make in an environment "
        "you trust, a file with the state dict alone (torch.save(net.state_dict(), …)), and give the "
        "arguments of the constructor as config="
    )


def _names(path: Path) -> set[str]:
    """Dotted names of the classes and functions that a file's pickles ask for, found without loading any."""
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith("/data.pkl"):
                        with archive.open(member) as file:
                            found.update(_names_of_pickle(file))
        else:
            with path.open("rb") as file:
                for _ in range(5):  # the old format is five pickles, then the tensors
                    found.update(_names_of_pickle(file))
    except Exception:  # nosec - names are for the message only; the loading itself finds out what is wrong
        return found
    return found


def _names_of_pickle(file: Any) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            yield f"{'builtins' if module == '__builtin__' else module}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings = [*strings[-1:], argument]


def _is_skipped(name: str) -> bool:
    return name.startswith(_SKIPPED) or name in _SKIPPED_NAMES


def _is_data(name: str) -> bool:
    """Whether a name may be part of a tensor or container; torch decides, this is for the message."""
    if name.startswith("torch.") and name.count(".") == 1:  # types of numbers and storages
        return name != "torch.load"
    return name.startswith(_DATA) or name in _DATA_NAMES


class _Nothing:
    """Takes whatever a pickle would give to the class it stands for, and forgets it."""

    def __new__(cls, *_: object, **__: object) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        return

    def __setstate__(self, _: object) -> None:
        return


def _stand_in(name: str) -> type:
    module, _, last = name.rpartition(".")
    return type(last, (_Nothing,), {"__module__": module, "__qualname__": last})


class _Plain:
    """Copies content into plain containers, and refuses what cannot be trusted."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.claimed = 0
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []  # so that no id is given out twice
        self.open: set[int] = set()

    def copy(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, Tensor):
            result: Any = self.tensor(value, where)
        elif isinstance(value, dict | list | tuple):
            if id(value) in self.open:
                raise PriorError(f"{self.path} is damaged: {where or 'its content'} contains itself")
            if len(self.open) >= _DEPTH:
                raise PriorError(f"{self.path} has containers more than {_DEPTH} deep")
            self.open.add(id(value))
            result = self.container(value, where)
            self.open.remove(id(value))
        else:
            result = None
        self.done[id(value)] = result
        self.kept.append(value)
        return result

    def container(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            named = {key: item for key, item in value.items() if type(key) in (str, int)}
            return {
                key: self.copy(item, f"{where}.{key}" if where else str(key)) for key, item in named.items()
            }
        return [self.copy(item, f"{where}[{index}]") for index, item in enumerate(value)]

    def tensor(self, value: Tensor, where: str) -> Tensor:
        where = where or "its content"
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise PriorError(f"{self.path}: {where} is not a dense tensor with values ({_described(value)})")
        self.claimed += value.numel() * value.element_size()
        times, more = _ALLOWANCE
        if self.claimed > times * self.size + more:
            raise PriorError(
                f"{self.path} claims more than its {self.size} bytes can hold: {where} has shape "
                f"{tuple(value.shape)}"
            )
        return value.detach()


def _described(value: Tensor) -> str:
    return "quantised" if value.is_quantized else f"{value.layout}, device {value.device}"
