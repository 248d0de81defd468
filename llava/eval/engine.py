"""Two engines that ask a model questions and read its greedy answers.

    shared   what the asks of an item have in common (system text, images, stem) is computed once;
             all the different ends go on from it together, as one tree (`tree.py`), until each
             answer has ended
    naive    every ask on its own, `generate` with the whole prompt, as the released evaluations do

In float32 they give the same answers. An answer is the argmax at every step, whatever penalties or
temperature a checkpoint's generation_config.json asks for. Prompts are not cut at the length that
the model was trained with: the options stand at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from llava.errors import UsageError
from llava.vlm.base import Prepared, StableRows, Vlm
from llava.vlm.prefix import MAX_TOKENS, can_share, common_prefix, continued, run_prefix
from llava.vlm.tree import attention_mask, grow, has_one_mask, window_of

MAX_NEW_TOKENS = 128
"""As LLaVA's model_vqa_loader."""
_NODES = 4096  # of a tree: its mask has the square of them
_WHOLE = 4  # whole prompts keep the keys of every layer, not of one: batches are that much smaller


@dataclass(frozen=True)
class Ask:
    """One question in one wording."""

    text: str
    """as in `Item.prompt`: no template, no `<image>`"""
    symbols: str = ""
    """the offered option symbols, one character a position; empty for open questions"""


@dataclass(frozen=True)
class Reply:
    """What the model answers."""

    text: str
    """decoded without special tokens, stripped"""
    logits: tuple[float, ...] = ()
    """of the offered symbols' first tokens where the answer begins, float32, in the asked order"""


class Session:
    """The asks of one item."""

    n_tokens: int
    """positions that the language model has processed so far"""

    def __init__(self, engine: Engine, images: Sequence[Image], asks: Sequence[Ask]) -> None:
        self.engine, self.images, self.asks = engine, images, asks
        self.n_tokens = 0

    def reply(self, indices: Sequence[int]) -> list[Reply]:
        """Answers to `asks[i]` for i in `indices`; may be called again with any others."""
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

    def item(self, images: Sequence[Image], asks: Sequence[Ask]) -> Session:
        """Prepares nothing and runs nothing before its first reply."""
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
            written, logits, n = self._generate([prompts[row] for row in rows])
            n_tokens += n
            for row, *found in zip(rows, written, logits, strict=True):
                replies[row] = self.read(asks[row], *found)
        return [replies[row] for row in range(len(prompts))], n_tokens

    def read(self, ask: Ask, ids: Sequence[int], logits: Tensor) -> Reply:
        """The reply that the written `ids` and the first step's `logits` (V,) float32 make."""
        offered = [self._first_tokens[symbol] for symbol in ask.symbols]
        return Reply(self.vlm.decode(ids).strip(), tuple(logits[offered].tolist()))

    @cached_property
    def _first_tokens(self) -> dict[str, int]:
        return _Known(self.vlm.first_token)

    def _batches(self, prompts: Sequence[Prepared]) -> Iterator[list[int]]:
        raise NotImplementedError

    def _padded(self, item: Prepared) -> int:
        """Length that a whole prompt is padded to, a function of its own length."""
        return len(item.input_ids)

    @torch.inference_mode()
    def _generate(self, items: list[Prepared]) -> tuple[list[list[int]], Tensor, int]:
        """Written ids of whole prompts of one padded length, first logits (B, V), positions."""
        vlm, length = self.vlm, self._padded(items[0])

        def stack(rows: list[Tensor], fill: int) -> Tensor:
            padded = [F.pad(row, (length - len(row), 0), value=fill) for row in rows]
            return torch.stack(padded).to(vlm.device)

        tokens = {n: stack([i.token_inputs[n] for i in items], 0) for n in items[0].token_inputs}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(vlm.stop_ids),
            pad_token_id=vlm.pad_id,
        )
        first = _FirstLogits()
        with StableRows() if len(items) > 1 else nullcontext():
            sequences = vlm.model.generate(
                input_ids=stack([item.input_ids for item in items], vlm.pad_id),
                attention_mask=stack([torch.ones_like(item.input_ids) for item in items], 0),
                generation_config=config,
                logits_processor=LogitsProcessorList([first]),
                **tokens,
                **vlm.image_inputs(items),
            )
        written = [self._until_stop(row) for row in sequences[:, length:].tolist()]
        return written, first.logits, sequences.numel() - len(items)

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.vlm.stop_ids), len(ids))
        return ids[:end]


class _FirstLogits(LogitsProcessor):
    """Keeps the first step's logits (B, V) float32; `generate` itself would keep every step's."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.logits = scores
        return scores


class _Known(dict):
    """Values of `function` by argument, each computed once."""

    def __init__(self, function: Callable[[str], int]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, key: str) -> int:
        self[key] = self._function(key)
        return self[key]


class NaiveSession(Session):
    def reply(self, indices: Sequence[int]) -> list[Reply]:
        replies = []
        for ask in (self.asks[i] for i in indices):
            prompt = self.engine.vlm.prompt(ask.text, self.images)
            found, n_tokens = self.engine.answer([prompt], [ask])
            self.n_tokens += n_tokens
            replies += found
        return replies


class NaiveEngine(Engine):
    """Every ask on its own."""

    session = NaiveSession

    def _batches(self, prompts: Sequence[Prepared]) -> Iterator[list[int]]:
        yield from ([row] for row in range(len(prompts)))


class SharedSession(Session):
    """One prefix; asks with equal words are answered once, so that they tie exactly."""

    def __init__(self, engine: Engine, images: Sequence[Image], asks: Sequence[Ask]) -> None:
        super().__init__(engine, images, asks)
        self._known: dict[Ask, Reply] = {}

    def reply(self, indices: Sequence[int]) -> list[Reply]:
        asks = [self.asks[i] for i in indices]
        new = {ask: i for ask, i in zip(asks, indices, strict=True) if ask not in self._known}
        prompts = [self._prompts[i] for i in new.values()]
        n, layers = self._prefix
        if layers:
            replies = self._go_on(prompts, list(new), n, layers)
        else:
            replies, n_tokens = self.engine.answer(prompts, list(new))
            self.n_tokens += n_tokens
        self._known |= zip(new, replies, strict=True)
        return [self._known[ask] for ask in asks]

    @cached_property
    def _prompts(self) -> list[Prepared]:
        vlm, (first, *rest) = self.engine.vlm, self.asks
        clean = vlm.prompt(first.text, self.images)
        return [clean, *(vlm.reprompt(clean, ask.text, self.images) for ask in rest)]

    @cached_property
    @torch.inference_mode()
    def _prefix(self) -> tuple[int, list[DynamicLayer]]:
        """Positions of the common beginning and its keys and values; 0 and none to go without."""
        vlm, clean = self.engine.vlm, self._prompts[0]
        rows = [prompt.input_ids for prompt in self._prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=vlm.pad_id)
        n = common_prefix(ids, torch.zeros_like(ids), [len(row) for row in rows], vlm.model.config)
        shares = can_share(vlm.model) and has_one_mask(vlm.model)
        if n == 0 or clean.token_inputs or not shares:
            return 0, []
        with StableRows():
            inputs = vlm.image_inputs([clean])
            _, layers = run_prefix(vlm.model, clean.input_ids[:n].to(vlm.device), inputs)
        self.n_tokens += n
        return n, layers

    def _go_on(
        self, prompts: list[Prepared], asks: list[Ask], n: int, layers: list[DynamicLayer]
    ) -> list[Reply]:
        """Replies from the prefix of n positions, as many ends together as a tree may hold."""
        ends = [prompt.input_ids[n:].tolist() for prompt in prompts]
        size = min(_NODES, self.engine.max_tokens) // max(map(len, ends), default=1) or 1
        replies: list[Reply] = []
        for start in range(0, len(ends), size):
            written, logits = self._decode(ends[start : start + size], n, layers)
            found = zip(asks[start : start + size], written, logits, strict=True)
            replies += [self.engine.read(*reply) for reply in found]
        return replies

    @torch.inference_mode()
    def _decode(
        self, ends: list[list[int]], n: int, layers: list[DynamicLayer]
    ) -> tuple[list[list[int]], Tensor]:
        """Greedy continuations of B ends of the prefix, first logits (B, V)."""
        vlm, tree, cache = self.engine.vlm, grow(ends), continued(layers)
        window = window_of(vlm.model)
        written: list[list[int]] = [[] for _ in ends]
        alive, first = list(range(len(ends))), None
        ids, sees, places = tree.ids, tree.sees, torch.tensor(tree.ends)
        positions = n + tree.depths
        keys = torch.arange(n)
        with StableRows():
            while True:
                keys = torch.cat([keys, positions])
                states = self._run(ids, positions, attention_mask(sees, keys, window), cache)
                logits = vlm.head(states[places.to(vlm.device)]).float()
                first = logits if first is None else first
                chosen = logits.argmax(-1).tolist()
                going = [i for i, token in enumerate(chosen) if token not in vlm.stop_ids]
                for i in going:
                    written[alive[i]].append(chosen[i])
                if not going or len(written[alive[going[0]]]) == self.engine.max_new_tokens:
                    return written, first
                alive, nodes = [alive[i] for i in going], places[going]
                ids = torch.tensor([chosen[i] for i in going])
                sees = torch.cat([sees[nodes], torch.eye(len(going), dtype=torch.bool)], 1)
                positions, places = positions[nodes] + 1, torch.arange(len(going))

    def _run(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """States (N, H) of N further nodes."""
        vlm = self.engine.vlm
        self.n_tokens += len(ids)
        return vlm.decoder(
            input_ids=ids[None].to(vlm.device),
            position_ids=positions[None].to(vlm.device),
            attention_mask=mask.to(vlm.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]


class SharedEngine(Engine):
    """Common beginnings once; whole prompts, where there is none, in batches.

    Prompts are padded on the left to a function of their own length, so that no answer depends on
    the batch. Models whose prefix cannot be shared (`llava.vlm.prefix.can_share`) get whole
    prompts.
    """

    session = SharedSession

    def _batches(self, prompts: Sequence[Prepared]) -> Iterator[list[int]]:
        keys = [prompt.key for prompt in prompts]
        yield from _groups(keys, lambda key: self._rows(key[0]) // _WHOLE)

    def _padded(self, item: Prepared) -> int:
        return item.n_tokens

    def _rows(self, length: int) -> int:
        return self.max_tokens // (length + self.max_new_tokens)


def _groups(keys: Sequence, size: Callable[..., int]) -> Iterator[list[int]]:
    """Places of equal keys, at most `size(key)` and at least one at a time."""
    places: dict = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    for key, rows in places.items():
        step = max(1, size(key))
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


ENGINES: dict[str, type[Engine]] = {"shared": SharedEngine, "naive": NaiveEngine}


def open_engine(
    name: str, vlm: Vlm, max_new_tokens: int = MAX_NEW_TOKENS, max_tokens: int = MAX_TOKENS
) -> Engine:
    """The engine called `name`; UsageError naming the known ones otherwise."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; use {' or '.join(ENGINES)}")
    return ENGINES[name](vlm, max_new_tokens, max_tokens)
