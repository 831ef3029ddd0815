"""Retrieval: which passages of Python's own documentation are nearest to each other, before and after a change.

The passages are docstrings of the standard library's single-file modules, read from its source without importing it.
There are no labels: a sentence encoder is held to its original, by how many of each passage's ten nearest neighbours
(by cosine) the two agree on, and by the cosine between the two embeddings of the same passage.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from xformopt.errors import DataError, MissingExtraError
from xformopt.models.tasks.task import Batch, Progress, Run, Score, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Retrieval", "corpus_digest"]

_NEIGHBOURS = 10
_TEST_PASSAGES = 600
_CALIBRATION_PASSAGES = 128
_VALIDATION_PASSAGES = 200
_ROWS, _CALIBRATION_ROWS = 16, 4
# words of a passage: less says too little to be near anything, more is cut off by the encoder
_FEWEST_WORDS, _MOST_WORDS = 12, 120
_MOST_TOKENS = 128


@dataclass(frozen=True)
class Retrieval(Task):
    """How many of the ten nearest passages a sentence encoder shares with its original."""

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "nearest passages among 600 docstrings of the standard library, held to the original's"
    metric: ClassVar[str] = "top-10 agreement"
    higher_is_better: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    output: ClassVar[str] = "sentence_embedding"

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return passages that are not among the tested ones; 128 where not told otherwise."""
        passages = _passages()[_TEST_PASSAGES : _TEST_PASSAGES + (self.samples or _CALIBRATION_PASSAGES)]
        return list(_encoded(passages, _CALIBRATION_ROWS))

    def test(self) -> Iterator[Batch]:
        """Yield 600 passages, sixteen at a time, padded to the longest of them."""
        return (Batch(inputs, {}) for inputs in _encoded(_passages()[:_TEST_PASSAGES], _ROWS))

    def validation(self) -> Iterator[Batch]:
        """Yield the passages that are left, as far as there are enough to be neighbours."""
        left = _passages()[_TEST_PASSAGES + (self.samples or _CALIBRATION_PASSAGES) :][:_VALIDATION_PASSAGES]
        return (Batch(inputs, {}) for inputs in _encoded(left if len(left) > 2 * _NEIGHBOURS else (), _ROWS))

    def judge(self, output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, None]:
        """Refuse: an embedding is neither right nor wrong without the original's.

        Raises:
            DataError: always.

        """
        raise DataError(
            f"The task {self.name} compares a model with its original, which is not known here. Evaluate the model it "
            f"was made from, or an artifact that was written with its Program."
        )

    def compare(
        self,
        run: Run,
        original: Run,
        progress: Progress = lambda what, done, total: None,
        batches: Iterable[Batch] | None = None,
    ) -> Score:
        """Score by agreement with the original; ``cosine`` and ``lowest_cosine`` are between the two embeddings."""
        found, wanted = [], []
        judged = list(self.test() if batches is None else batches)
        for done, batch in enumerate(judged):
            progress(f"evaluating {self.name}", done, len(judged))
            with torch.no_grad():
                found.append(run(batch.inputs)[self.output])
                wanted.append(found[-1] if run is original else original(batch.inputs)[self.output])
        progress(f"evaluating {self.name}", len(judged), len(judged))
        ours, theirs = _directions(torch.cat(found)), _directions(torch.cat(wanted))
        cosines = (ours * theirs).sum(1)
        shared = torch.tensor(
            [
                len(set(mine) & set(other)) / _NEIGHBOURS
                for mine, other in zip(_nearest(ours), _nearest(theirs), strict=True)
            ]
        )
        details = {"cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}
        return Score(float(shared.double().mean()), shared.double(), details=details)

    def baselines(self) -> dict[str, float]:
        """Return the expected agreement with neighbours drawn at random."""
        return {"random neighbours": _NEIGHBOURS / (len(_passages()[:_TEST_PASSAGES]) - 1)}


def corpus_digest() -> str:
    """Return a hash of the tested passages; the standard library differs between releases of Python."""
    return hashlib.sha256("\0".join(_passages()[:_TEST_PASSAGES]).encode()).hexdigest()[:16]


def _directions(embeddings: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(embeddings.double(), dim=1)


def _nearest(directions: torch.Tensor) -> list[list[int]]:
    """Return the indices of the ten nearest other rows of each row of ``[N, C]``; of equals, the first."""
    likeness = directions @ directions.t()
    likeness.fill_diagonal_(-2.0)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    nearest: list[list[int]] = order[:, :_NEIGHBOURS].tolist()
    return nearest


@cache
def _passages() -> tuple[str, ...]:
    """Return the first paragraphs of docstrings, each once, in an order that the alphabet has no part in."""
    library = Path(sysconfig.get_path("stdlib"))
    found: set[str] = set()
    for path in sorted(library.glob("*.py")):
        found.update(_docstrings(path))
    if len(found) < _TEST_PASSAGES + _CALIBRATION_PASSAGES:
        raise DataError(
            f"The task retrieval reads docstrings of the standard library, and found only {len(found)} in {library}. "
            f"Use a Python that was installed with the source of its library."
        )
    return tuple(sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        # templates and examples of broken source
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if _FEWEST_WORDS <= len(text.split()) <= _MOST_WORDS and text.isascii():
                yield text


def _encoded(passages: tuple[str, ...], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    tokenizer = _tokenizer()
    for start in range(0, len(passages), rows):
        encoded = tokenizer.encode_batch(list(passages[start : start + rows]))
        yield {
            "input_ids": torch.tensor([row.ids for row in encoded]),
            "attention_mask": torch.tensor([row.attention_mask for row in encoded]),
            "token_type_ids": torch.tensor([row.type_ids for row in encoded]),
        }


@cache
def _tokenizer() -> Tokenizer:
    """Return the tokenizer of MiniLM, padding each batch to its longest passage."""
    from xformopt.capture.huggingface import minilm_directory

    folder = minilm_directory()
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "hf", 'The task "retrieval"') from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_MOST_TOKENS)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    return tokenizer
