"""Two engines that ask a model questions and read its greedy answers.

    shared   what the asks of an item have in common (system text, images, stem) is computed once;
             all the different ends go on from it together (`llava.vlm.versions.write_on`), until
             each answer has ended
    naive    every ask on its own, `generate` with the whole prompt, as the released evaluations do

In float32 they give the same answers. An answer is the argmax at every step, whatever penalties or
temperature a checkpoint's generation_config.json asks for. Prompts are not cut at the length that
the model was trained with: the options stand at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import takewhile

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llava.errors import UsageError
from llava.eval.question import Ask, Reply
from llava.vlm.base import Prepared, StableRows, Vlm
from llava.vlm.prefix import MAX_TOKENS, Prefix, run_prefix, shared_length
from llava.vlm.versions import Written, can_grow, write_on

MAX_NEW_TOKENS = 128
"""As LLaVA's model_vqa_loader."""
_NODES = 4096  # of a tree: its mask has the square of them
_WHOLE = 4  # whole prompts keep the keys of every layer, not of one: batches are that much smaller


class Session:
    """The asks of one item. Each is answered once, so that equal ones tie exactly."""

    n_tokens: int
    """positions that the language model has processed so far"""

    def __init__(self, engine: Engine, images: Sequence[Image], asks: Sequence[Ask]) -> None:
        self.engine, self.images, self.asks = engine, images, asks
        self.n_tokens = 0
        self._replies: dict[Ask, Reply] = {}

    def reply(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answers to some of the item's asks; may be called again with any others."""
        new = [ask for ask in dict.fromkeys(asks) if ask not in self._replies]
        if new:
            self._replies |= zip(new, self._answer(new), strict=True)
        return [self._replies[ask] for ask in asks]

    def _answer(self, asks: Sequence[Ask]) -> list[Reply]:
        """Put distinct asks to the model."""
        raise NotImplementedError


class Engine:
    """Base of both. `reply_many` is for questions that have nothing in common.

    Args:
        max_new_tokens: where an answer ends that has not ended by itself.
        max_tokens: positions in a batch, those of a shared prefix counted in every row.
    """

    session: type[Session]

    def __init__(
        self, vlm: Vlm, max_new_tokens: int = MAX_NEW_TOKENS, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.vlm, self.max_new_tokens, self.max_tokens = vlm, max_new_tokens, max_tokens
        vlm.model.generation_config = GenerationConfig()  # a checkpoint's own may not be greedy
        self._first_tokens: dict[str, int] = {}

    def item(self, images: Sequence[Image], asks: Sequence[Ask]) -> Session:
        """All that will be asked about `images`; nothing is run before the first reply."""
        return self.session(self, images, asks)

    def reply_many(self, questions: Sequence[tuple[Sequence[Image], Ask]]) -> list[Reply]:
        """Answers to questions about different images, in the given order."""
        prompts = [self.vlm.prompt(ask.text, images) for images, ask in questions]
        return self.answer(prompts, [ask for _, ask in questions])[0]

    def answer(self, prompts: Sequence[Prepared], asks: Sequence[Ask]) -> tuple[list[Reply], int]:
        """Answers to whole prompts, and how many positions the language model processed."""
        replies: dict[int, Reply] = {}
        n_tokens = 0
        for rows in self._batches(prompts):
            written = self._generate([prompts[row] for row in rows])
            replies |= zip(rows, self.read([asks[row] for row in rows], written), strict=True)
            n_tokens += written.n_tokens
        return [replies[row] for row in range(len(prompts))], n_tokens

    def read(self, asks: Sequence[Ask], written: Written) -> list[Reply]:
        """The replies to `asks` that were written."""
        replies = []
        for ask, ids, logits in zip(asks, written.ids, written.logits, strict=True):
            for symbol in ask.symbols:
                if symbol not in self._first_tokens:
                    self._first_tokens[symbol] = self.vlm.first_token(symbol)
            offered = [self._first_tokens[symbol] for symbol in ask.symbols]
            text = self.vlm.decode(ids).strip()
            replies.append(Reply(text, tuple(logits[offered].tolist())))
        return replies

    def _batches(self, prompts: Sequence[Prepared]) -> Iterator[list[int]]:
        """The places of `prompts`, those that are generated together in one list."""
        raise NotImplementedError

    def _padded(self, prompt: Prepared) -> int:
        """Length that a whole prompt is padded to, a function of its own length."""
        return len(prompt.input_ids)

    @torch.inference_mode()
    def _generate(self, prompts: list[Prepared]) -> Written:
        """Answers to whole prompts of one padded length."""
        # Padded on the left, so that all answers begin at the same position.
        vlm, length = self.vlm, self._padded(prompts[0])

        def stack(rows: list[Tensor], fill: int) -> Tensor:
            padded = [F.pad(row, (length - len(row), 0), value=fill) for row in rows]
            return torch.stack(padded).to(vlm.device)

        names = prompts[0].token_inputs
        tokens = {name: stack([p.token_inputs[name] for p in prompts], 0) for name in names}

        # Greedy, and the first step's logits kept beside it. One prompt alone is run as the
        # released evaluations do, without the padding that makes rows of a batch independent.
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(vlm.stop_ids),
            pad_token_id=vlm.pad_id,
        )
        first = _FirstLogits()
        with StableRows() if len(prompts) > 1 else nullcontext():
            sequences = vlm.model.generate(
                input_ids=stack([p.input_ids for p in prompts], vlm.pad_id),
                attention_mask=stack([torch.ones_like(p.input_ids) for p in prompts], 0),
                generation_config=config,
                logits_processor=LogitsProcessorList([first]),
                **tokens,
                **vlm.image_inputs(prompts),
            )
        written = [
            list(takewhile(lambda token: token not in vlm.stop_ids, row))
            for row in sequences[:, length:].tolist()
        ]
        return Written(written, first.logits, sequences.numel() - len(prompts))


class _FirstLogits(LogitsProcessor):
    """Keeps the first step's logits (B, V) float32; `generate` itself would keep every step's."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.logits = scores
        return scores


class NaiveSession(Session):
    def _answer(self, asks: Sequence[Ask]) -> list[Reply]:
        replies = []
        for ask in asks:
            prompt = self.engine.vlm.prompt(ask.text, self.images)
            answers, n_tokens = self.engine.answer([prompt], [ask])
            self.n_tokens += n_tokens
            replies += answers
        return replies


class NaiveEngine(Engine):
    """Every ask on its own."""

    session = NaiveSession

    def _batches(self, prompts: Sequence[Prepared]) -> Iterator[list[int]]:
        yield from ([row] for row in range(len(prompts)))


class SharedSession(Session):
    """One prefix for all asks."""

    def _answer(self, asks: Sequence[Ask]) -> list[Reply]:
        prompts = [self._prompts[ask] for ask in asks]
        prefix = self._prefix
        if prefix is None:
            replies, n_tokens = self.engine.answer(prompts, asks)
            self.n_tokens += n_tokens
            return replies

        # As many ends together as a tree may hold; all behind the same prefix.
        engine, vlm = self.engine, self.engine.vlm
        ends = [prompt.input_ids[len(prefix) :].tolist() for prompt in prompts]
        size = min(_NODES, engine.max_tokens) // max(map(len, ends)) or 1
        replies = []
        for start in range(0, len(ends), size):
            some = slice(start, start + size)
            with StableRows():
                written = write_on(
                    vlm.model, prefix, ends[some], vlm.stop_ids, engine.max_new_tokens
                )
            self.n_tokens += written.n_tokens
            replies += engine.read(asks[some], written)
        return replies

    @cached_property
    def _prompts(self) -> dict[Ask, Prepared]:
        vlm, (first, *rest) = self.engine.vlm, self.asks
        prompt = vlm.prompt(first.text, self.images)
        others = {ask: vlm.reprompt(prompt, ask.text, self.images) for ask in rest}
        return {first: prompt} | others

    @cached_property
    @torch.inference_mode()
    def _prefix(self) -> Prefix | None:
        """The common beginning of all prompts; None where whole prompts have to be run."""
        vlm, prompts = self.engine.vlm, list(self._prompts.values())
        n = shared_length(vlm.model, prompts) if can_grow(vlm.model) else 0
        if not n:
            return None
        with StableRows():
            inputs = vlm.image_inputs(prompts[:1])
            prefix = run_prefix(vlm.model, prompts[0].input_ids[:n].to(vlm.device), inputs)
        self.n_tokens += n
        return prefix


class SharedEngine(Engine):
    """Common beginnings once; whole prompts, where there is none, in batches.

    Prompts are padded on the left to a function of their own length, so that no answer depends on
    the batch. Models whose prefix cannot be shared (`llava.vlm.prefix.can_share`) get whole
    prompts.
    """

    session = SharedSession

    def _batches(self, prompts: Sequence[Prepared]) -> Iterator[list[int]]:
        places = defaultdict(list)
        for place, prompt in enumerate(prompts):
            places[prompt.key].append(place)
        for (length, *_), rows in places.items():
            size = self.max_tokens // (length + self.max_new_tokens) // _WHOLE or 1
            yield from (rows[i : i + size] for i in range(0, len(rows), size))

    def _padded(self, prompt: Prepared) -> int:
        return prompt.n_tokens


ENGINES: dict[str, type[Engine]] = {"shared": SharedEngine, "naive": NaiveEngine}


def open_engine(
    name: str, vlm: Vlm, max_new_tokens: int = MAX_NEW_TOKENS, max_tokens: int = MAX_TOKENS
) -> Engine:
    """The engine called `name`; UsageError naming the known ones otherwise."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; use {' or '.join(ENGINES)}")
    return ENGINES[name](vlm, max_new_tokens, max_tokens)
