"""Many ends behind one prefix, at little more than the price of one text.

The orders of a multiple-choice question, or several answers to one question, share their
beginning: system text, image, stem. It is run once (`prefix.py`; the image is encoded once), and
all the different ends go on from its keys and values, in one of two forms:

    run_together    a batch, an end a row: states and attention row of every version, which `score`
                    turns into losses and greedy decisions. Signals are computed so
    write_on        one sequence in which what ends share stands once, a tree: greedy answers.
                    Evaluation asks so

Two forms, because each has what the other cannot give. A row has its own last position, whose
attention the recorder keeps, and plain causal attention, whatever the layers' windows are. In a
tree the orders of a question are 1.5 times fewer positions (the small world's SEED-Bench and
ScienceQA), without padding, and no layer joins the prefix's keys to theirs. The two sum their
products in another order (logits of the small world's model differ by up to 2e-5), so that neither
can take the other's place without changing stored signals or recorded answers.

Equal to full forwards within 1e-5 in float32; at least 1.5 times faster for two versions over one
LLaVA-1.5 image (docs/Performance.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel

from llava.tokens import IGNORE_INDEX
from llava.vlm.prefix import MAX_TOKENS, Prefix, Version, run_prefix, shared_length

_HEAD_ROWS = 1024  # logits rows at a time


# ---- as rows: scores


class Recorder(AbstractContextManager, Protocol):
    """Records attention rows: set `last` (B,), run the decoder, read `row` (B, P + S)."""

    last: Tensor
    row: Tensor


@dataclass
class Run:
    """Final hidden states of B versions whose first P positions are the same.

    Equal versions share a row of `ends`; `rows` (B,) says which one is a version's.
    """

    labels: Tensor  # (B, P + S), IGNORE_INDEX after the end of a version
    lengths: list[int]  # (B,) real positions
    rows: Tensor  # (B,)
    prefix: Tensor  # (P, H)
    ends: Tensor  # (R, S, H)
    attention: Tensor | None  # (R, P + S) float32: the row of a version's last position

    def states(self, version: int) -> tuple[Tensor, Tensor | None]:
        """Hidden states (1, L, H) and attention row (1, L) of a version, as a forward has them."""
        row, length = int(self.rows[version]), self.lengths[version]
        hidden = torch.cat([self.prefix, self.ends[row]])[None, :length]
        return hidden, None if self.attention is None else self.attention[row, None, :length]


class Scores(NamedTuple):
    """What B versions say of their answers, on the model's device."""

    nll_sum: Tensor
    """negative log-likelihood of all answer tokens, in nats, (B,) float64"""
    n_tokens: Tensor
    """answer tokens, (B,) int64"""
    wrong: Tensor
    """whether greedy decoding departs from answer r, its end token included, (B, R) bool; R is the
    largest number of answers (stretches of supervised tokens) in a version"""

    @property
    def nll_mean(self) -> Tensor:
        """Mean over the answer tokens, (B,) float64."""
        return self.nll_sum / self.n_tokens


def run_together(
    model: PreTrainedModel,
    versions: Sequence[Version],
    inputs: Mapping[str, Tensor],
    recorder: Recorder | None = None,
    pad_id: int = 0,
    share: bool = True,
) -> Run:
    """Run every version, their common beginning once.

    Args:
        model: a Hugging Face vision-language (or causal language) model in evaluation mode.
        versions: on the CPU; all with the same image.
        inputs: the image inputs of one version (`pixel_values`, ...), on the model's device.
        recorder: records the attention row of each version's last position.
        share: False runs every version on its own, for comparison.

    Models that place text by what is in the image (mrope), that tell tokens apart by type, or whose
    layers are not all plain attention are run version by version too, and so are versions that
    differ before the image.
    """
    device = model.device
    index, firsts = _unique(versions)
    versions = [versions[i] for i in firsts]
    ids = _stack([v.input_ids for v in versions], pad_id).to(device)
    labels = _stack([v.labels for v in versions], IGNORE_INDEX)
    lengths = [len(v.input_ids) for v in versions]

    # What no version may share is run as a part of each: a prefix of no positions.
    n_shared = shared_length(model, versions) if share else 0
    prefix = run_prefix(model, ids[0, :n_shared], inputs)
    cache = prefix.for_rows()
    last = torch.tensor([n - n_shared - 1 for n in lengths], device=device)

    # Batches are bounded by positions, those of the prefix too: each layer's keys are joined.
    ends, attention = [], []
    size = max(1, MAX_TOKENS // ids.shape[1])
    for start in range(0, len(ids), size):
        rows = slice(start, start + size)
        if recorder is not None:
            recorder.last = last[rows]
        with nullcontext() if recorder is None else recorder:
            if n_shared:
                ends.append(_run_ends(model, ids[rows, n_shared:], cache, n_shared))
            else:
                ends.append(_run_whole(model, ids[rows], inputs, _tokens(versions[rows], device)))
        attention.append(None if recorder is None else recorder.row)
    return Run(
        labels=labels[index].to(device),
        lengths=[lengths[i] for i in index],
        rows=torch.tensor(index),
        prefix=prefix.states,
        ends=torch.cat(ends),
        attention=None if recorder is None else torch.cat(attention),
    )


def score(run: Run, head: nn.Module) -> Scores:
    """Loss and greedy decision of every answer token; `head` maps states to logits."""
    labels, p = run.labels, len(run.prefix)
    supervised = labels != IGNORE_INDEX
    supervised[:, 0] = False  # nothing predicts the first position
    nll = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    wrong = torch.zeros_like(supervised)

    # The state at t predicts position t + 1, so the prefix answers for positions 1..P of all
    # versions at once, and each end for those behind.
    if p:
        at = 1 + torch.nonzero(supervised[0, 1 : p + 1])[:, 0]
        nll[:, at], wrong[:, at] = _token_scores(run.prefix[at - 1], labels[0, at], head)
    version, at = torch.nonzero(supervised[:, p + 1 :], as_tuple=True)
    states = run.ends[run.rows.to(labels.device)[version], at]
    at = at + p + 1
    nll[version, at], wrong[version, at] = _token_scores(states, labels[version, at], head)

    # An answer is a stretch of supervised positions: number them, and see where one departs.
    starts = supervised.clone()
    starts[:, 1:] &= ~supervised[:, :-1]
    answer = starts.cumsum(1) - 1
    n_answers = int(answer.max()) + 1
    departs = torch.zeros(len(labels), n_answers, dtype=torch.bool, device=labels.device)
    version, at = torch.nonzero(wrong, as_tuple=True)
    departs[version, answer[version, at]] = True
    return Scores(nll.sum(1), supervised.sum(1), departs)


def _run_ends(model: PreTrainedModel, ids: Tensor, cache: Cache, n: int) -> Tensor:
    """States (b, S, H) of ends `ids` (b, S) after the n positions that the cache holds."""
    positions = torch.arange(n, n + ids.shape[1], device=ids.device)[None]
    out = model.get_decoder()(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return out.last_hidden_state


def _run_whole(
    model: PreTrainedModel, ids: Tensor, inputs: Mapping[str, Tensor], tokens: dict[str, Tensor]
) -> Tensor:
    """States (b, L, H) of whole versions `ids` (b, L), each with its own copy of the image."""
    images = {name: torch.cat([tensor] * len(ids)) for name, tensor in inputs.items()}
    out = model.base_model(input_ids=ids, use_cache=False, **images, **tokens)
    return out.last_hidden_state


def _unique(versions: Sequence[Version]) -> tuple[list[int], list[int]]:
    """Which distinct version each one is, and where each distinct one stands first.

    Equal option texts make equal orders; run once, they tie exactly.
    """
    places: dict[bytes, int] = {}
    index, firsts = [], []
    for i, version in enumerate(versions):
        key = version.input_ids.numpy().tobytes() + version.labels.numpy().tobytes()
        if key not in places:
            places[key] = len(firsts)
            firsts.append(i)
        index.append(places[key])
    return index, firsts


def _stack(rows: list[Tensor], fill: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill)


def _tokens(versions: Sequence[Version], device: torch.device) -> dict[str, Tensor]:
    names = versions[0].token_inputs
    return {name: _stack([v.token_inputs[name] for v in versions], 0).to(device) for name in names}


def _token_scores(states: Tensor, targets: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """NLL (T,) float64 of `targets` after `states` (T, H), and whether another token wins."""
    nll, wrong = [], []
    for part, tokens in zip(states.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
        logits = head(part).float()
        nll.append(F.cross_entropy(logits, tokens, reduction="none"))
        wrong.append(logits.argmax(-1) != tokens)
    return torch.cat(nll).double(), torch.cat(wrong)


# ---- as a tree: greedy answers


class Tree(NamedTuple):
    """The N nodes of a tree of tokens, each after its parent.

    The orders of a question's options are a tree: every order that shows "red" first goes on from
    the same tokens. A node attends to the prefix, to the nodes on its way from the root and to
    itself. So no key is copied for a text, and a layer sees one long row.
    """

    ids: Tensor
    """(N,) int64"""
    sees: Tensor
    """(N, N) bool: whether a node (row) attends to another, itself included"""
    ends: list[int]
    """node of each text's last token"""

    @property
    def depths(self) -> Tensor:
        """How many nodes come before each on its way, (N,) int64."""
        return self.sees.sum(1) - 1


class Written(NamedTuple):
    """What a model wrote behind B texts."""

    ids: list[list[int]]
    """the answers, without the token that ends one"""
    logits: Tensor
    """where the answers begin, (B, V) float32"""
    n_tokens: int
    """positions that the language model processed"""


def can_grow(model: PreTrainedModel) -> bool:
    """Whether one mask says what the nodes of a tree see: all layers see the same positions."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return set(kinds) in ({"full_attention"}, {"sliding_attention"})


@torch.inference_mode()
def write_on(
    model: PreTrainedModel,
    prefix: Prefix,
    ends: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> Written:
    """Greedy answers behind `ends` (B), ids each that follow on the prefix; none may be empty.

    An answer stops before one of `stop_ids`, or when it has `max_new_tokens`. For models that
    `can_share` (`prefix.py`) and `can_grow`.
    """
    device, window = model.device, window_of(model)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    cache, tree = prefix.for_one(), grow(ends)
    written: list[list[int]] = [[] for _ in ends]
    first, n_tokens = None, 0

    # A step runs new nodes: the whole tree, then one node behind every answer that goes on. All
    # earlier nodes stay in the cache, so `sees` says which of them a new one has on its way.
    alive = list(range(len(ends)))  # the answers, by the text that they belong to
    ids, sees, places = tree.ids, tree.sees, torch.tensor(tree.ends)
    positions = len(prefix) + tree.depths
    keys = torch.arange(len(prefix))
    while True:
        keys = torch.cat([keys, positions])
        states = decoder(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            attention_mask=attention_mask(sees, keys, window).to(device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
        n_tokens += len(ids)
        logits = head(states[places.to(device)]).float()
        first = logits if first is None else first
        chosen = logits.argmax(-1).tolist()
        going = [i for i, token in enumerate(chosen) if token not in stop_ids]
        for i in going:
            written[alive[i]].append(chosen[i])
        if not going or len(written[alive[going[0]]]) == max_new_tokens:
            return Written(written, first, n_tokens)

        # A new node sees what the node before it saw, and itself.
        alive, nodes = [alive[i] for i in going], places[going]
        ids = torch.tensor([chosen[i] for i in going])
        sees = torch.cat([sees[nodes], torch.eye(len(going), dtype=torch.bool)], 1)
        positions, places = positions[nodes] + 1, torch.arange(len(going))


def grow(texts: Sequence[Sequence[int]]) -> Tree:
    """The tree of `texts`, ids each; none may be empty."""
    nodes: dict[tuple[int, int], int] = {}  # by parent and token
    ends = []
    for text in texts:
        node = -1
        for token in text:
            node = nodes.setdefault((node, token), len(nodes))
        ends.append(node)
    sees = torch.eye(len(nodes), dtype=torch.bool)
    for node, (parent, _) in enumerate(nodes):
        if parent >= 0:
            sees[node] |= sees[parent]
    return Tree(torch.tensor([token for _, token in nodes]), sees, ends)


def attention_mask(sees: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Mask (1, 1, Q, K) bool of the last Q positions, which see the prefix and what `sees` says.

    `sees` (Q, K - P) is of the nodes so far, `keys` (K,) int64 the positions of prefix and nodes.
    Nothing that is `window` or more positions back is seen.
    """
    n_queries, n_nodes = sees.shape
    prefix = torch.ones(n_queries, len(keys) - n_nodes, dtype=torch.bool)
    mask = torch.cat([prefix, sees], 1)
    if window is not None:
        mask &= keys[-n_queries:, None] - keys < window
    return mask[None, None]


def window_of(model: PreTrainedModel) -> int | None:
    """Positions that attention reaches back, of a model that `can_grow`; None: all."""
    text = model.config.get_text_config()
    if "full_attention" in (getattr(text, "layer_types", None) or ()):
        return None
    return getattr(text, "sliding_window", None)
