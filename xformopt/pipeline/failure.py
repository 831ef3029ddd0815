"""Keep both sides of a rewrite that failed, so that it can be repaired without the model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import fx

from xformopt.files import cache_folder
from xformopt.pipeline.numeric import Deviation
from xformopt.program.text import target_name
from xformopt.rewrite import Region

__all__ = ["save_failure"]


def save_failure(name: str, deviation: Deviation) -> Path | None:
    """Write ``before.txt``, ``after.txt`` and their values to the cache folder; None where it cannot be written."""
    from safetensors.torch import save_file

    texts = {"before": _text(deviation.fired.before), "after": _text(deviation.fired.after)}
    digest = hashlib.blake2b("".join(texts.values()).encode(), digest_size=4).hexdigest()
    folder = cache_folder() / "failures" / f"{name}-{digest}"
    tensors: dict[str, torch.Tensor] = {}
    for region in (deviation.fired.before, deviation.fired.after):
        tensors |= {f"parameter.{key}": value for key, value in region.parameters.items()}
    tensors |= {f"value.{key}": value for key, value in deviation.values.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for side, text in texts.items():
            (folder / f"{side}.txt").write_text(text)
        save_file(
            {key: value.detach().clone().contiguous() for key, value in tensors.items()}, folder / "values.safetensors"
        )
    except OSError:
        # a report of a failure must not fail for want of a cache folder
        return None
    return folder


def _text(region: Region) -> str:
    lines = []
    for node in region.graph.nodes:
        if node.op == "call_function":
            arguments = ", ".join(_show(a) for a in node.args)
            named = ", ".join(f"{key}={_show(value)}" for key, value in node.kwargs.items())
            lines.append(
                f"%{node.meta['name']} = {target_name(node.target)}({arguments}) {{{named}}}  # {node.meta['path']}"
            )
    return (
        "\n".join([*(f"input %{name}" for name in region.inputs), *lines, f"return {', '.join(region.outputs)}"]) + "\n"
    )


def _show(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.target if value.op == 'get_attr' else value.meta['name']}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(part) for part in value) + "]"
    return str(value)
