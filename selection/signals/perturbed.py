"""How much a corrupted copy x' of a sample hurts the proxy: |l(x) - l(x')|, and x' itself (ARDS).

Every sample is attacked by the one kind of corruption its format allows (`perturb.py`). l is the
mean cross-entropy of the answer tokens, in nats. Columns:

    kind                0 cannot be perturbed, 1 multiple choice, 2 image
    loss_clean          l(x); NaN for kind 0
    loss_perturbed      l(x'), of the copy with the largest gap; NaN for kind 0
    gap                 |l(x) - l(x')|; NaN for kind 0
    last_state, attention_state, attention_self    of that copy (signals/forward.py); 0 for kind 0

and of multiple choice, for the orders (llava/eval/question.py) that its options were shown in:

    n_orders            how many orders there are
    order               the one with the largest gap, the first of equals
    n_failed            orders under which the greedy answer is not the right symbol
    first_failed        the first of those, -1 if there is none

For the other kinds n_orders and n_failed are 0, order and first_failed -1. All orders go through
`llava.vlm.versions` together: two model calls a sample. A greedy answer is judged given the
sample's own earlier turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import msgspec
import numpy as np

from llava.conversation import check_turns
from llava.errors import UsageError, at_least
from llava.eval.question import MAX_ORDERS, SYMBOLS
from llava.lazy import Lazy
from llava.records import Turn
from selection.signals.base import ProxySignal, Sample
from selection.signals.forward import forward_columns, pooled_states
from selection.signals.perturb import DIFFUSION_STEPS, choice_turns, diffuse, perturbations
from selection.store.store import Column

if TYPE_CHECKING:
    from llava.vlm.base import Prepared, Vlm

torch = Lazy("torch")


KIND_NONE, KIND_CHOICE, KIND_IMAGE = 0, 1, 2
LOSSES = ("loss_clean", "loss_perturbed", "gap")
STATES = ("last_state", "attention_state")
COUNTS = ("n_orders", "order", "n_failed", "first_failed")
_DEFAULTS = {**dict.fromkeys(LOSSES, np.nan), "order": -1, "first_failed": -1}  # all others: 0


@dataclass
class Copies:
    """A prepared sample, `versions[0]`, and its corrupted copies in order.

    The copies of a multiple-choice sample use the original's image inputs and hold none of their
    own. `answers` says which of the sample's answers, counted from 0, name an option.
    """

    kind: int
    versions: list[Prepared]
    answers: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens in a batch; multiple choice bounds its own batches."""
        counted = self.versions if self.kind == KIND_IMAGE else self.versions[:1]
        return sum(version.n_tokens for version in counted)

    @property
    def key(self) -> tuple:
        return (self.kind, *self.versions[0].key)


@dataclass(frozen=True)
class Perturbed(ProxySignal):
    """Loss gap under perturbation, and the states of the copy with the largest gap."""

    name: ClassVar[str] = "perturbed"
    may_be_nan: ClassVar[tuple[str, ...]] = LOSSES

    symbols: str | None = "qwer"
    """symbols that replace A, B, C, ... (a name in llava.eval.question.SYMBOLS); none keeps them"""
    max_orders: int = MAX_ORDERS
    """most orders of the options that are tried"""
    permute: bool = True
    """try other orders of the options, not only other symbols"""
    diffusion_step: int = 300
    """steps of noise that the image of other samples gets, 0 to 999"""
    seed: int = 0
    """seed of the noise"""

    def __post_init__(self) -> None:
        if self.symbols is not None and self.symbols not in SYMBOLS:
            raise UsageError(f"symbols {self.symbols!r}: choose {', '.join(SYMBOLS)} or none")
        if self.symbols is None and not self.permute:
            raise UsageError("neither other symbols nor other orders: nothing would be perturbed")
        at_least(1, self, "max_orders", prefix="")
        if not 0 <= self.diffusion_step < DIFFUSION_STEPS:
            raise UsageError(
                f"diffusion_step {self.diffusion_step}: give a number in 0..{DIFFUSION_STEPS - 1}"
            )

    def columns(self, proxy: Vlm) -> list[Column]:
        return [
            Column("kind", (), "uint8"),
            *(Column(name, (), "float32") for name in (*LOSSES, "attention_self")),
            *(Column(name, (), "int32") for name in COUNTS),
            *(Column(name, (proxy.hidden_size,), proxy.stored_dtype) for name in STATES),
        ]

    def prepare(self, proxy: Vlm, sample: Sample) -> Copies:
        clean = proxy.prepare(sample.record, sample.image)
        turns = list(check_turns(sample.record.turns))
        questions = choice_turns(turns)
        if questions:
            return self._choice_copies(proxy, sample, clean, turns, questions)
        if not clean.extras:  # no image, or none that a turn refers to
            return Copies(KIND_NONE, [clean])
        noisy = diffuse(sample.image, sample.uid, self.diffusion_step, self.seed)
        return Copies(KIND_IMAGE, [clean, proxy.prepare(sample.record, noisy)])

    def _choice_copies(
        self,
        proxy: Vlm,
        sample: Sample,
        clean: Prepared,
        turns: list[tuple[str, str]],
        questions: Sequence[int],
    ) -> Copies:
        copies = perturbations(turns, sample.uid, self.symbols, self.max_orders, self.permute)
        versions = [clean]
        for copy in copies:
            conversation = [Turn(role, text) for role, text in copy.turns]
            record = msgspec.structs.replace(sample.record, conversations=conversation)
            rewritten = proxy.rewrite(clean, record, sample.image)
            versions.append(replace(rewritten, extras={}))
        written = [i for i, (role, text) in enumerate(turns) if role == "gpt" and text]
        answers = tuple(written.index(question + 1) for question in questions)
        return Copies(KIND_CHOICE, versions, answers)

    def compute(self, proxy: Vlm, items: list[Copies]) -> dict[str, np.ndarray]:
        columns = {
            column.name: np.full(
                (len(items), *column.shape), _DEFAULTS.get(column.name, 0), column.dtype
            )
            for column in self.columns(proxy)
        }
        kind = items[0].kind  # part of the key, so the same for all
        columns["kind"][:] = kind
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes inf: quarantined
            if kind == KIND_CHOICE:
                for row, item in enumerate(items):
                    for name, value in self._choice_row(proxy, item).items():
                        columns[name][row] = value
            elif kind == KIND_IMAGE:
                for name, values in self._image_columns(proxy, items).items():
                    columns[name][:] = values
        if kind != KIND_NONE:
            for name in LOSSES:  # of these kinds NaN is a failure; as an infinity it is quarantined
                columns[name][np.isnan(columns[name])] = np.inf
        return columns

    def _choice_row(self, proxy: Vlm, item: Copies) -> dict[str, np.ndarray | float | int]:
        """Columns of one sample, from all its orders in two model calls."""
        from llava.vlm.versions import run_together, score

        # The clean version is the first; all are scored by what they add to a common beginning.
        images = proxy.image_inputs(item.versions[:1])
        run = run_together(proxy.model, item.versions, images, proxy.recorder, proxy.pad_id)
        scores = score(run, proxy.head)
        losses = scores.nll_mean.cpu().numpy()
        gaps = np.abs(losses[1:] - losses[0])
        order = int(np.argmax(gaps))
        # Answers beyond the model's length are not read, so they cannot be wrong.
        answers = [answer for answer in item.answers if answer < scores.wrong.shape[1]]
        failed = np.flatnonzero(scores.wrong[1:, answers].any(1).cpu().numpy())
        # Whole states of the copy with the largest gap alone: a beginning is shared until then.
        hidden, attention = run.states(1 + order)
        last = torch.tensor([hidden.shape[1] - 1], device=hidden.device)
        last_state, attention_state, _ = pooled_states(hidden, attention, last)
        return {
            "loss_clean": losses[0],
            "loss_perturbed": losses[1 + order],
            "gap": gaps[order],
            "n_orders": len(gaps),
            "order": order,
            "n_failed": len(failed),
            "first_failed": failed[0] if len(failed) else -1,
            "last_state": last_state[0].cpu().numpy(),
            "attention_state": attention_state[0].cpu().numpy(),
            "attention_self": attention[0, -1].cpu().numpy(),
        }

    def _image_columns(self, proxy: Vlm, items: list[Copies]) -> dict[str, np.ndarray]:
        """Columns of samples that share a padded length: clean and noisy rows in one batch."""
        batch = proxy.collate([version for item in items for version in item.versions])
        columns = forward_columns(proxy, batch, proxy.forward(batch))
        arrays = {name: tensor.cpu().numpy() for name, tensor in columns.items()}
        clean, noisy = arrays["nll_mean"][::2], arrays["nll_mean"][1::2]
        gap = np.abs(noisy.astype(np.float64) - clean)
        states = {name: arrays[name][1::2] for name in (*STATES, "attention_self")}
        losses = dict(zip(LOSSES, (clean, noisy, gap), strict=True))
        return {**states, **losses}
