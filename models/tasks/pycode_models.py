"""Models trained on the source of the Python standard library, and how they were trained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from xformopt.models.gpt import Gpt, GptConfig
from xformopt.models.llama import Llama, LlamaConfig
from xformopt.models.tasks.pycode import CONTEXT, VOCABULARY, training_windows
from xformopt.models.tasks.task import Progress
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained

__all__ = ["TRAINED"]

_BATCH = 8
# bits per byte
_TOLERANCE = 0.02
_SCHEDULE = Schedule(
    steps=800, rate=3e-3, warmup=0.125, betas=(0.9, 0.95), muon=True, cooldown=0.25, bfloat16=True, compiled=True
)


def _llama() -> nn.Module:
    return Llama(
        LlamaConfig(
            vocabulary=VOCABULARY,
            length=CONTEXT,
            width=192,
            depth=4,
            heads=3,
            kv_heads=3,
            hidden=512,
            tied=False,
            eps=1e-6,
        )
    )


def _gpt() -> nn.Module:
    return Gpt(GptConfig(vocabulary=VOCABULARY, length=CONTEXT, width=192, depth=4, heads=3))


def _train(module: nn.Module, fold: int, progress: Progress, steps: int | None = None) -> None:
    """Cross-entropy of each next byte, on windows drawn from all modules but the held-out ones."""

    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        ids = training_windows(_BATCH, generator)
        logits = module(ids)["logits"][:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    fit(module, loss, replace(_SCHEDULE, steps=steps or _SCHEDULE.steps), progress)


TRAINED = (
    Trained(
        name="pycode-llama",
        task="pycode",
        module=_llama,
        train=_train,
        sources=("Touvron et al. 2023, LLaMA: Open and Efficient Foundation Language Models, arXiv 2302.13971",),
        summary="Llama of 4 layers over bytes, trained on the source of the Python standard library",
        tolerance=_TOLERANCE,
    ),
    Trained(
        name="pycode-gpt",
        task="pycode",
        module=_gpt,
        # learned positions and shared embeddings take longer to come to anything
        train=partial(_train, steps=2400),
        sources=("Radford et al. 2019, Language Models are Unsupervised Multitask Learners",),
        summary="GPT-2's form in 4 layers over bytes, trained on the source of the Python standard library",
        tolerance=_TOLERANCE,
    ),
)
