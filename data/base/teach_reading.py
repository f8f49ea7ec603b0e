"""`tinyld pretrain`, with an encoder beside it that teaches what a sentence means.

    torchrun --nproc-per-node=2 data/base/teach_reading.py ENCODER pretrain --init BASE --data text ...

(`teach_reading_lm.py` has a language model beside it, too.)

Text alone teaches a denoiser to write and lets what the encoder knew of whole sentences fade. So every update also
reads SENTENCES of the text, each within words such as `it was [MASK] .`, and two things of the denoiser's final states
are drawn towards the encoder's embedding of the sentence (its mean final state): the mean over the sentence's tokens,
and a linear map, which is thrown away afterwards, of the state at the mask. The loss is WEIGHT times the sum of both
distances, one less the cosine. ENCODER has the base's own pieces: see trim_vocabulary.py.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld import pretrain
from tinyld.cli import main
from tinyld.config import TrainConfig
from tinyld.data import TextRows
from tinyld.device import autocast
from tinyld.distributed import Processes
from tinyld.foreign import load_foreign
from tinyld.hf import find_encoder
from tinyld.model import Denoiser
from tinyld.tokenizer import Tokenizer
from tinyld.train import Noise, TrainingRun

SENTENCES, WEIGHT, LR = 48, 2.0, 1e-3
SHORTEST, LONGEST = 5, 48  # tokens of a sentence
TWO = 0.3  # share of the samples that are two sentences
FRAMES = (
    "it was {} .", "this is about {} .", ": {} .", "( {} )", "all in all , {} .", "topic : {}", "the answer is {} .",
    "in a word : {} .", "{}", "label : {} .", "- {}", "i would call it {} .",
)  # fmt: skip


class Samples(NamedTuple):
    """n sentences or pairs of them."""

    x: Tensor  # (n, L) framed ids
    real: Tensor  # (n, L) bool; so are the next two
    mask: Tensor
    sentence: Tensor
    alone: Tensor  # (n, S) bare ids
    real_alone: Tensor  # (n, S) bool
    texts: list[str]  # as far as the mask
    frames: np.ndarray  # (n,) which of FRAMES


class Sentences:
    """Samples of a text's sentences, framed for the denoiser and bare for the encoder."""

    def __init__(self, stream: np.ndarray, tokenizer: Tokenizer):
        self.stream, self.tokenizer, vocab = stream, tokenizer, tokenizer.inner.get_vocab()
        ends = np.flatnonzero(np.isin(stream, [*(vocab[mark] for mark in ".!?"), tokenizer.eos_id])) + 1
        sizes = np.diff(ends)
        fits = (SHORTEST <= sizes) & (sizes <= LONGEST)
        self.starts, self.stops = ends[:-1][fits], ends[1:][fits]
        self.frames = [[tokenizer.encode(side) if side.strip() else [] for side in f.split("{}")] for f in FRAMES]

    def take(self, n: int, rng: np.random.Generator, only: int | None = None) -> Samples:
        """n samples, framed in any of FRAMES or in one of them only."""
        own, framed, bare, texts = self.tokenizer, list[list[int]](), list[list[int]](), list[str]()
        frames = rng.integers(len(FRAMES), size=n) if only is None else np.full(n, only)
        for i, frame in zip(rng.integers(len(self.starts), size=n).tolist(), frames, strict=True):
            last = min(i + int(rng.random() < TWO), len(self.starts) - 1)
            stop = last if self.stops[last] - self.starts[i] <= 2 * LONGEST else i
            ids = self.stream[self.starts[i] : self.stops[stop]]
            sentence = [own.bos_id, *ids[ids != own.eos_id].tolist()]
            before, after = self.frames[frame]
            texts.append(own.decode([*sentence[1:], *before]))
            framed.append([*sentence, *before, own.mask_id, *after, own.eos_id])
            bare.append([*sentence, own.eos_id])
        x, real = self.padded(framed)
        alone, real_alone = self.padded(bare)
        sizes = torch.tensor([len(row) - 1 for row in bare])
        inside = torch.arange(x.shape[1]) < sizes[:, None]
        return Samples(x, real, x == own.mask_id, inside, alone, real_alone, texts, frames)

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        x = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)
        return x.where(x >= 0, self.tokenizer.pad_id), x >= 0


class Teacher:
    """The encoder's part of each update: `penalty` adds its gradient, `after_update` trains the maps."""

    others: tuple[int, ...] = ()  # widths of what is mapped to, beside the encoder's embedding

    def __init__(self, encoder: Path, model: Denoiser, rows: TextRows, processes: Processes, seed: int):
        found = load_foreign(find_encoder(encoder), headless=True)
        self.encoder, self.model, self.processes = found.model.eval(), model, processes
        self.sentences = Sentences(rows.stream, found.tokenizer)
        self.rng = np.random.default_rng([seed, processes.rank])
        torch.manual_seed(seed)  # every process has the same maps
        width = model.config.d_model
        self.maps = nn.ModuleList(nn.Linear(width, wanted) for wanted in (width, *self.others))
        self.optimizer = torch.optim.AdamW(self.maps.parameters(), LR)
        head = ("head_transform", "output_bias")
        self.parameters = [p for name, p in model.named_parameters() if not name.startswith(head)]
        self.parameters += self.maps.parameters()

    def loss(self) -> Tensor:
        taken = self.sentences.take(SENTENCES // self.processes.size, self.rng)
        with autocast(self.model.device, torch.bfloat16):
            h = self.model.states(taken.x, attention_mask=taken.real).float()
            return self.distances(mean_of(h, taken.sentence), h[taken.mask], taken)

    def distances(self, mean: Tensor, asked: Tensor, taken: Samples) -> Tensor:
        """Of the denoiser's states (n, D) from what they are to be, weighed and added."""
        wanted = self.embedding(taken)
        return WEIGHT * (distance(mean, wanted) + distance(self.maps[0](asked), wanted))

    @torch.no_grad()
    def embedding(self, taken: Samples) -> Tensor:
        """The encoder's, (n, D)."""
        return mean_of(self.encoder.states(taken.alone, attention_mask=taken.real_alone).float(), taken.real_alone)

    def penalty(self) -> None:
        """Each process reads sentences of its own, so their gradients are summed apart from the rows', which were."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        (self.loss() / self.processes.size).backward()
        self.processes.sum_gradients(self.parameters)
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad

    def after_update(self, progress: float) -> None:
        self.optimizer.param_groups[0]["lr"] = LR * min(1.0, 2 * (1 - progress) + 0.01)
        self.optimizer.step()
        self.optimizer.zero_grad()


def mean_of(h: Tensor, where: Tensor) -> Tensor:
    """The mean of states h (B, L, D) where (B, L) says, (B, D)."""
    return (h * where[..., None]).sum(1) / where.sum(1, keepdim=True)


def distance(state: Tensor, wanted: Tensor) -> Tensor:
    """One less the cosine of both (n, D), the mean."""
    return (1 - F.cosine_similarity(state.float(), wanted)).mean()


def taught(
    made: type[Teacher], encoder: Path, model: Denoiser, parameters: Any, rows: TextRows, noise: Noise,
    config: TrainConfig, *others: Any, **named: Any,
) -> TrainingRun:  # fmt: skip
    """The training run that `pretrain` asks for, with the teacher in it."""
    teacher = made(encoder, model, rows, named["processes"], config.seed)
    hooks = {"penalty": teacher.penalty, "after_update": teacher.after_update}
    return TrainingRun(model, parameters, rows, noise, config, *others, **named, **hooks)


def run(made: type[Teacher]) -> None:
    """`tinyld` with that teacher; the encoder is the script's first argument."""
    pretrain.TrainingRun = partial(taught, made, Path(sys.argv.pop(1)))  # type: ignore[assignment, misc]
    main()


if __name__ == "__main__":
    run(Teacher)
