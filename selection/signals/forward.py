"""Everything that one forward pass over a conversation tells, computed in that one pass.

Columns, with L the sample's last real token, H_t the final hidden state (after the final norm) and
A the last layer's attention averaged over heads:

    last_state       (H,)  H_L
    attention_state  (H,)  sum over t < L of A_{L,t} H_t      (ARDS slides; not renormalised)
    attention_self         A_{L,L}; attention_state / (1 - attention_self) is the renormalised form
    mean_state       (H,)  mean over all real positions, image tokens included
    nll_sum, nll_mean      negative log-likelihood of the answer tokens, in nats
    n_tokens               supervised (answer) tokens
    el2n                   mean over answer tokens of ||softmax - onehot||_2 (Paul et al. 2021)
    aum                    mean over answer tokens of p_true - max other p (D2, 2024)

The logits are computed for supervised positions only and a slice of the vocabulary at a time, so
memory does not grow with sequence length times vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from llava.conversation import IGNORE_INDEX
from llava.lazy import Lazy
from selection.signals.onepass import OnePass
from selection.store.store import Column

if TYPE_CHECKING:
    from torch import Tensor

    from llava.vlm.base import Batch, ForwardOut, Vlm

torch = Lazy("torch")
F = Lazy("torch.nn.functional")


VOCABULARY_CHUNK = 8192
ROW_CHUNK = 2048
STATES = ("last_state", "attention_state", "mean_state")
SCALARS = ("attention_self", "nll_sum", "nll_mean", "el2n", "aum")


class TokenScores(NamedTuple):
    """Per answer token, (T,) float32 each."""

    nll: Tensor
    el2n: Tensor
    aum: Tensor


@dataclass(frozen=True)
class Forward(OnePass):
    """The forward signals. No settings: every method that reads any of them shares one store."""

    name: ClassVar[str] = "forward"

    def columns(self, proxy: Vlm) -> list[Column]:
        states = [Column(name, (proxy.hidden_size,), proxy.stored_dtype) for name in STATES]
        scalars = [Column(name, (), "float32") for name in SCALARS]
        return [*states, *scalars, Column("n_tokens", (), "int32")]

    def read(self, proxy: Vlm, batch: Batch, out: ForwardOut, seen: None) -> dict[str, Tensor]:
        return forward_columns(proxy, batch, out)


def forward_columns(proxy: Vlm, batch: Batch, out: ForwardOut) -> dict[str, Tensor]:
    """All columns of `Forward` for a batch that went through `proxy.forward`: (B, ...) tensors."""
    sample, position = supervised_positions(batch.labels)
    targets = batch.labels[sample, position + 1]
    scores = token_scores(
        out.hidden[sample, position], targets, proxy.head.weight, getattr(proxy.head, "bias", None)
    )
    counts = torch.bincount(sample, minlength=len(batch.last))
    states = pooled_states(out.hidden, out.attention, batch.last)
    index = torch.arange(len(batch.last), device=batch.last.device)
    nll_sum = _sum_by_sample(scores.nll, sample, len(batch.last))
    return {
        **dict(zip(STATES, states, strict=True)),
        "attention_self": out.attention[index, batch.last],
        "nll_sum": nll_sum,
        "nll_mean": nll_sum / counts,
        "el2n": _sum_by_sample(scores.el2n, sample, len(batch.last)) / counts,
        "aum": _sum_by_sample(scores.aum, sample, len(batch.last)) / counts,
        "n_tokens": counts,
    }


def pooled_states(hidden: Tensor, attention: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Last, attention-weighted and mean state of each sample: three (B, H) float32.

    `hidden` (B, S, H), `attention` (B, S) rows of the last real token, `last` (B,) its position.
    The attention-weighted sum leaves the last token itself out: H_hat = sum_{t<L} A_{L,t} H_t.
    """
    index = torch.arange(len(last), device=last.device)
    position = torch.arange(hidden.shape[1], device=last.device)
    before = (position < last[:, None]).float()  # (B, S)
    real = (position <= last[:, None]).float()
    weights = torch.stack([attention * before, real / real.sum(1, keepdim=True)], 1)  # (B, 2, S)
    # One product a sample: batched ones round differently for different batch sizes.
    products = [a @ b.float() for a, b in zip(weights, hidden, strict=True)]
    weighted, mean = torch.stack(products).unbind(1)
    return hidden[index, last].float(), weighted, mean


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sample, position) of every state that predicts an answer token, in order: (T,) int64 each.

    `labels` (B, S) holds IGNORE_INDEX where the model is not supervised; the state at t predicts
    the label at t + 1.
    """
    return torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)


def token_scores(
    states: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    vocabulary_chunk: int = VOCABULARY_CHUNK,
    row_chunk: int = ROW_CHUNK,
) -> TokenScores:
    """NLL, EL2N and AUM of each target token, from `states` (T, H) and the head (V, H).

    `targets` (T,) int64. Holds at most `row_chunk x vocabulary_chunk` logits at a time.
    """
    if len(states) == 0:
        nothing = torch.zeros(0, device=states.device)
        return TokenScores(nothing, nothing, nothing)
    parts = [
        _score_rows(rows, words, weight, bias, vocabulary_chunk)
        for rows, words in zip(states.split(row_chunk), targets.split(row_chunk), strict=True)
    ]
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _score_rows(
    states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, chunk: int
) -> TokenScores:
    """One running pass over the vocabulary: maximum, sum of exp, sum of exp^2, largest other."""
    n = len(states)
    # A multiple of 32 rows keeps the matrix product in the kernel that treats every row alike.
    states = F.pad(states, (0, 0, 0, -n % 32))
    targets = F.pad(targets, (0, -n % 32))
    top = torch.full((len(states),), -torch.inf, device=states.device)
    other, true = top.clone(), torch.zeros_like(top)
    total, squares = torch.zeros_like(top), torch.zeros_like(top)
    for start in range(0, len(weight), chunk):
        part = slice(start, start + chunk)
        logits = F.linear(states, weight[part], None if bias is None else bias[part]).float()
        # The target's own logit, where it is in this part of the vocabulary.
        column = targets - start
        inside = (column >= 0) & (column < logits.shape[1])
        column = column.clamp(0, logits.shape[1] - 1)[:, None]
        chosen = logits.gather(1, column)
        true = torch.where(inside, chosen[:, 0], true)
        # Sums so far are brought to the new maximum, so that no exp overflows.
        new_top = torch.maximum(top, logits.amax(1))
        shrink = (top - new_top).exp()
        exp = (logits - new_top[:, None]).exp()
        total = total * shrink + exp.sum(1)
        squares = squares * shrink.square() + exp.square().sum(1)
        top = new_top
        # With the target's taken out the maximum is that of the others.
        logits.scatter_(1, column, torch.where(inside[:, None], -torch.inf, chosen))
        other = torch.maximum(other, logits.amax(1))
    p_true, p_other = (true - top).exp() / total, (other - top).exp() / total
    # ||p - onehot||^2 = sum p^2 - 2 p_true + 1; rounding may push a perfect prediction below 0.
    el2n = (squares / total.square() - 2 * p_true + 1).clamp_min(0).sqrt()
    nll = top - true + total.log()
    return TokenScores(nll[:n], el2n[:n], (p_true - p_other)[:n])


def _sum_by_sample(values: Tensor, sample: Tensor, n: int) -> Tensor:
    """Sum of `values` (T,) over the tokens of each of n samples, (n,) float32.

    One segment at a time in double precision: a sample's sum depends on its own tokens only.
    """
    counts = torch.bincount(sample, minlength=n).tolist()
    parts = values.double().split(counts)
    return torch.stack([part.sum() for part in parts]).float()
