"""Load a model from the user's own Python: `package.module:factory`.

This is the one MODEL form that runs code, because the code is the user's own.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xformopt.capture.source import Source, check_finite
from xformopt.errors import CaptureError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["bind_inputs", "load_factory", "load_object"]

RETURN = (
    "Return a torch.nn.Module that has a method example_inputs(), or a pair of a module and its example "
    "inputs: a tensor, a tuple of tensors in the order of the forward's parameters, or a dict of tensors by "
    "parameter name."
)


def load_factory(spec: str) -> Source:
    """Import ``package.module:factory``, call it, and take what it returns.

    The working directory is made importable for this.

    Args:
        spec: A module's import path, a colon, and the name of a callable without required parameters, such
            as a function or a `torch.nn.Module` class; dots reach into it.

    Raises:
        UsageError: `spec` does not have this form.
        CaptureError: The module or name does not exist, the factory raises, or it returns something else.

    """
    factory = load_object(spec)
    result = factory if _is_module(factory) else _call(factory, spec)
    module, given = _take(result, spec)
    inputs = bind_inputs(module, given, spec)
    module = module.eval().requires_grad_(False)
    check_finite(module, f'"{spec}"')
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()} - {"float32"})
    return Source(
        module=module,
        example_inputs=inputs,
        dynamic=None,
        output_names=None,
        description=f"{type(module).__name__} from {spec}",
        notes=tuple(f"the module has {dtype} parameters, kept as they are" for dtype in dtypes),
    )


def load_object(spec: str, returns: str = RETURN) -> Any:
    """Import what ``package.module:name`` names, which must be callable; the working directory is made importable.

    Args:
        spec: A module's import path, a colon, and a name in it; dots reach into it.
        returns: What to say of what it has to be, where it cannot be called.

    Raises:
        UsageError: `spec` does not have this form.
        CaptureError: The module or name does not exist, or importing it raises.

    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name or not all(part.isidentifier() for part in f"{module_name}.{name}".split(".")):
        raise UsageError(
            f'"{spec}" is not of the form package.module:name: expected the import path of a Python module, a colon, '
            "and the name of something in it, such as a function that returns the model."
        )
    _make_working_directory_importable()
    found = _attribute(_import(module_name), name, spec)
    if not callable(found):
        raise CaptureError(f'"{spec}" is a {type(found).__name__}, which cannot be called. {returns}')
    return found


def bind_inputs(module: torch.nn.Module, given: Any, where: str) -> dict[str, torch.Tensor]:
    """Key example inputs by the forward's parameter names, in the forward's order.

    Args:
        module: Whose forward takes them.
        given: A tensor, a tuple or list of tensors in the forward's order, or a dict by parameter name.
        where: What to call the origin of the inputs in errors.

    Raises:
        CaptureError: They do not fit the forward's parameters, or are not tensors.

    """
    import torch

    signature = inspect.signature(module.forward)
    if isinstance(given, torch.Tensor):
        given = (given,)
    if not isinstance(given, Mapping | tuple | list) or not given:
        raise CaptureError(f"The example inputs of {where} are a {type(given).__name__} without tensors. {RETURN}")
    try:
        bound = signature.bind(**given) if isinstance(given, Mapping) else signature.bind(*given)
    except TypeError as error:
        raise CaptureError(
            f"The example inputs of {where} do not fit "
            f"{type(module).__name__}.forward{_parameters(signature)}: {error}. {RETURN}"
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        inputs |= _spread(name, value, signature.parameters[name].kind)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f'The example input "{name}" of {where} is a {type(value).__name__}, but only tensors can be '
                "inputs of a captured program. Bind other arguments in a small module of your own around it."
            )
    return inputs


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _raised(error, f'Importing "{name}"') from error
        raise CaptureError(
            f'There is no Python module "{error.name}" to import, neither installed nor in the working '
            f'directory "{Path.cwd()}". Check the spelling, or run from the folder that holds it.'
        ) from error
    except Exception as error:
        raise _raised(error, f'Importing "{name}"') from error


def _attribute(module: Any, name: str, spec: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [entry for entry in dir(found) if entry[0] != "_"], n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise CaptureError(f'"{module.__name__}" has no "{part}", which "{spec}" asks for.{hint}')
        found = getattr(found, part)
    return found


def _call(factory: Callable[[], Any], spec: str) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise CaptureError(
            f'"{spec}" cannot be called without arguments ({error}). Give its parameters defaults, or write '
            "a small function around it."
        ) from error
    except ValueError:
        pass  # builtins have no signature to inspect
    try:
        return factory()
    except Exception as error:
        raise _raised(error, f'"{spec}"') from error


def _take(result: Any, spec: str) -> tuple[torch.nn.Module, Any]:
    """Return the module and the example inputs, which may come with it or from its method."""
    if isinstance(result, tuple) and len(result) == 2 and _is_module(result[0]):
        return result
    if not _is_module(result):
        raise CaptureError(f'"{spec}" returned a {type(result).__name__}. {RETURN}')
    method = getattr(result, "example_inputs", None)
    if not callable(method):
        raise CaptureError(f'"{spec}" returned a {type(result).__name__} but no example inputs. {RETURN}')
    return result, _call(method, f"{spec}.example_inputs")


def _is_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _spread(name: str, value: Any, kind: Any) -> dict[str, Any]:
    """Give the members of ``*args`` and ``**kwargs`` names of their own."""
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return {f"{name}_{index}": item for index, item in enumerate(value)}
    if kind is inspect.Parameter.VAR_KEYWORD:
        return dict(value)
    return {name: value}


def _parameters(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"


def _raised(error: Exception, what: str) -> CaptureError:
    """Report an exception of the user's own code by type, message and place."""
    if isinstance(error, SyntaxError):
        message, place = error.msg, f"{error.filename}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        # the innermost line of the user's own code says more than the library's line it led to
        own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
        frame = (own or frames)[-1]
        message, place = (
            " ".join(str(error).split()) or "no message",
            f"{frame.filename}, line {frame.lineno}",
        )
    return CaptureError(f"{what} raised {type(error).__name__}: {message} ({place}).")


def _make_working_directory_importable() -> None:
    """Put the working directory on the import path for good: the model's own late imports may need it too."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
