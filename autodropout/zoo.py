"""Opens a model by name to look at its sites: one of torchvision, timm or `transformers`, or a function in a file.

Models of the libraries are built without weights (PyTorch's meta device), so that the largest takes no memory; nothing
is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .loading import load_file
from .sites import Example
from .sites import check_example
from .sites import uncompiled

IMAGE_SIDE = 224
TOKENS = 16


def open_model(name: str) -> tuple[nn.Module, Example]:
    """The model and an example of what it is called with.

    Args:
        name: `torchvision:resnet50`, `timm:vit_base_patch16_224`, `transformers:BertModel` (a class, with the defaults
            of its configuration), or `FILE.py:FUNCTION`, a function without arguments that returns (model, example).

    Raises:
        ValueError: none of these, or its code raises an error.
        ImportError: the library is not installed.
    """
    source, _, what = name.partition(":")
    if source in _LIBRARIES and what:
        importlib.import_module(source)  # here it is the library itself that is missing, below what it wants in turn
        with _told(f"{name} cannot be built", but=ValueError):
            return _LIBRARIES[source](what)
    if source.endswith(".py") and what:
        return _from_file(Path(source), what)
    kinds = ", ".join(f"{library}:NAME" for library in _LIBRARIES)
    raise ValueError(f"model must be one of {kinds} or FILE.py:FUNCTION, got {name!r}")


@contextmanager
def running(name: str, model: nn.Module, example: Example) -> Iterator[None]:
    """Around what runs the model of that name on its example.

    Raises:
        ValueError: the model's code raises an error; what is raised around it passes.
    """
    inside: list[nn.Module] = []
    model = uncompiled(model)
    handles = [
        model.register_forward_pre_hook(lambda module, _args: inside.append(module)),
        model.register_forward_hook(lambda _module, _args, _y: inside.clear()),
    ]
    try:
        yield
    except (Exception, SystemExit) as error:
        if not inside:
            raise
        raise ValueError(
            f"{name} does not run with its example, {_shapes(example)}; FILE.py:FUNCTION can return a model with an "
            f"example of your own: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _shapes(example: object) -> str:
    if isinstance(example, torch.Tensor):
        return str(tuple(example.shape))
    if isinstance(example, Mapping):
        return ", ".join(f"{name} {_shapes(value)}" for name, value in example.items())
    return ", ".join(map(_shapes, example)) if isinstance(example, (tuple, list)) else type(example).__name__


@contextmanager
def _told(what: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Makes an error of any kind, `but` one, a ValueError that says `what` failed."""
    try:
        yield
    except but:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def _torchvision(name: str) -> tuple[nn.Module, Example]:
    import torchvision

    if name not in torchvision.models.list_models():
        raise ValueError(f"model must be one of torchvision.models.list_models(), got {name!r}")
    # Where a model has a backbone, that comes with weights by default.
    parts = inspect.signature(torchvision.models.get_model_builder(name)).parameters.keys() & {"weights_backbone"}
    options: dict[str, Any] = {"weights": None, **dict.fromkeys(parts)}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model: nn.Module = _unweighted(lambda: torchvision.models.get_model(name, **options))
    return model, torch.zeros(1, 3, IMAGE_SIDE, IMAGE_SIDE, device=_device(model))


def _timm(name: str) -> tuple[nn.Module, Example]:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model must be one of timm.list_models(), got {name!r}")
    model = _unweighted(lambda: timm.create_model(name))
    return model, torch.zeros(1, *model.default_cfg["input_size"], device=_device(model))


def _transformers(name: str) -> tuple[nn.Module, Example]:
    import transformers

    kind: Any = getattr(transformers, name, None)
    config_class = getattr(kind, "config_class", None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)) or config_class is None:
        raise ValueError(f"model must be the name of a model class of transformers, got {name!r}")
    model = _unweighted(lambda: kind(config_class()))
    device = _device(model)
    config = model.config
    if model.main_input_name == "pixel_values":
        config = getattr(config, "vision_config", config)
        side = getattr(config, "image_size", IMAGE_SIDE)
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return model, {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=device)}
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    inputs = {"input_ids": ids}
    return model, {**inputs, "decoder_input_ids": ids} if config.is_encoder_decoder else inputs


def _unweighted(build: Callable[[], Any]) -> Any:
    """Built on the meta device; for real where its constructor computes with values."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        return build()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _from_file(path: Path, function: str) -> tuple[nn.Module, Example]:
    if not path.is_file():
        raise ValueError(f"model must be in a file that exists, got {path}")
    with _told(f"{path} cannot be imported"), _beside(path):
        module = load_file("model", path, f"autodropout_model_{path.stem}")
    if not callable(getattr(module, function, None)):
        raise ValueError(f"model must be a function of {path}, got {function!r}")
    with _told(f"{path}:{function} must return (model, example)"), _beside(path):
        opened = getattr(module, function)()
    if not (isinstance(opened, tuple) and len(opened) == 2 and isinstance(opened[0], nn.Module)):
        raise ValueError(f"{path}:{function} must return (model, example), got {type(opened).__name__}")
    with _told(f"{path}:{function} must return (model, example)"):
        check_example(opened[1])
    return opened


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """The file may import its neighbours, as it may when Python runs it."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
