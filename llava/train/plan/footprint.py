"""Bytes that a training run takes on each GPU, in the host's memory and on disk. Pure functions.

Symbols in the formulas: n trained and m frozen parameters, W GPUs, c bytes of a number in the
computation (2 with bf16 or fp16, else 4), h hidden size, f intermediate size, q the heads' total
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llava.train.plan.devices import Device
from llava.train.plan.lengths import Batch
from llava.train.plan.outline import Outline

SLACK = 0.06
"""Of a GPU's memory, for what the allocator cannot use."""
CONTEXT = 2**30
"""Bytes of a CUDA context with its libraries and NCCL."""
_BITS = {4: 0.5 + 8 / 64 / 8, 8: 1.0}  # bytes a weight; with 4 bits a scale of one byte per 64


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a run, beside its model."""

    world_size: int
    batch_size: int
    accumulation: int
    compute_bytes: int
    bf16: bool
    attention: str
    """eager, sdpa or flash_attention_2."""
    checkpointing: bool
    moments_bytes: int
    """Of the optimizer, for one trained parameter."""
    lora_dropout: bool
    bits: int
    zero_stage: int
    """0: without DeepSpeed."""
    offload_optimizer: bool
    offload_parameters: bool
    bucket: int
    """Numbers in one bucket of ZeRO's gradient reduction."""
    max_live: int
    """Parameters that ZeRO-3 holds whole at once."""

    @property
    def gathers(self) -> bool:
        """Whether a GPU holds only its share of the weights."""
        return self.zero_stage == 3


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, and `host` beside it."""

    weights: float
    gradients: float
    optimizer: float
    working_copies: float
    """Weights again in the type of the computation, or gathered from the other GPUs."""
    buffers: float
    """Of communication."""
    activations: float
    """What every layer keeps for its backward."""
    recomputed: float
    """With gradient checkpointing: everything of one layer at a time."""
    logits: float
    step: float
    """Temporaries of the optimizer's step, when the activations are gone."""
    host: float

    @property
    def peak(self) -> float:
        """What all of the run has to fit in."""
        states = self.weights + self.gradients + self.optimizer + self.buffers
        kept = self.working_copies + self.activations  # the loss is done when layers recompute
        return states + max(kept + max(self.logits, self.recomputed), self.step)


def stored_weights(outline: Outline, setup: Setup) -> float:
    """Weights.

    PyTorch alone trains float32 weights and keeps frozen ones as they are computed: 4 n + c m.
    DeepSpeed computes with c (n + m) and trains a float32 copy, which counts as its optimizer's;
    ZeRO-3 splits them over the GPUs. `--bits` stores the layers' maps in 4 or 8 bits.
    """
    n, m, c = outline.n_trained, outline.n_frozen - outline.quantised, setup.compute_bytes
    few_bits = outline.quantised * _BITS.get(setup.bits, 0)
    if not setup.zero_stage:
        return 4 * n + c * m + few_bits
    return (c * (n + m) + few_bits) / (setup.world_size if setup.gathers else 1)


def gradients(outline: Outline, setup: Setup) -> float:
    """In the type of the weights that are trained: 4 n, with DeepSpeed c n; from ZeRO-2 on split.

    ZeRO-2 and 3 keep the sum over accumulated batches split as well.
    """
    n = outline.n_trained
    if not setup.zero_stage:
        return 4 * n
    return setup.compute_bytes * n / (setup.world_size if setup.zero_stage > 1 else 1)


def optimizer_states(outline: Outline, setup: Setup) -> float:
    """Adam's two float32 moments: 8 n; with DeepSpeed also the float32 copy of the weights, 4 n,
    and every stage splits both over the GPUs."""
    n = outline.n_trained
    if not setup.zero_stage:
        return setup.moments_bytes * n
    return (4 + setup.moments_bytes) * n / setup.world_size


def working_copies(outline: Outline, setup: Setup) -> float:
    """Weights that are held a second time while a batch is computed.

    Autocast casts float32 weights once per forward: c n. ZeRO-3 gathers up to `max_live` at once.
    """
    if setup.gathers:
        return setup.compute_bytes * min(outline.n_parameters, setup.max_live)
    casts = not setup.zero_stage and setup.compute_bytes < 4
    return setup.compute_bytes * outline.n_trained if casts else 0


def communication_buffers(outline: Outline, setup: Setup) -> float:
    """DDP copies all gradients into its buckets, 4 n; ZeRO fills one bucket while it sends one."""
    if setup.zero_stage:
        return 2 * setup.compute_bytes * min(setup.bucket, outline.n_trained)
    return 4 * outline.n_trained if setup.world_size > 1 else 0


def step_temporaries(outline: Outline, setup: Setup) -> float:
    """Inside the optimizer's step: the root of the second moment, 4 n; with DeepSpeed the gradient
    in float32 besides. Split over the GPUs where the states are; on the host if they are there."""
    if setup.offload_optimizer:
        return 0
    if not setup.zero_stage:
        return 4 * outline.n_trained
    return 8 * outline.n_trained / setup.world_size


def layer_squares(outline: Outline, setup: Setup, batch: Batch) -> float:
    """L x L matrices that one layer keeps for its backward.

    PyTorch's attention turns the mask of padded rows into numbers, c L^2 a row; flash attention has
    none; eager attention keeps the probabilities in float32 and as they are multiplied.
    """
    squares, c = batch.n_rows * batch.length**2, setup.compute_bytes
    if setup.attention == "eager":
        return squares * outline.n_heads * (4 + c * (c < 4))
    padded = batch.n_tokens < batch.n_positions or batch.n_rows < batch.n_samples
    return squares * c * (padded and setup.attention == "sdpa")


def layer_activations(outline: Outline, setup: Setup) -> float:
    """Bytes that one layer keeps for its backward, per position; squares apart.

    two norms          their input in float32 (4 h each); if the layer is trained, their output
    attention          queries, keys, values and output, c q each, and 4 bytes a head
    maps' inputs       if trained: of q, k, v and of gate, up, c h each
    gated MLP          gate, its activation and up, c f each; if trained the product, c f
    adapters           of each adapted map its input after dropout, c i, a mask of i bytes, and
                       the c r that the low rank passes on

    If autocast computes on a float32 residual stream, each map keeps its own cast of its input,
    and the norm's output is float32.
    """
    c, h, f = setup.compute_bytes, outline.hidden, outline.intermediate
    q = outline.n_heads * outline.head_dim
    trained = outline.trains_language_model
    residual = _residual_bytes(outline, setup)
    n_inputs = 2 if residual == c else 5
    kept = 2 * 4 * h + 4 * c * q + 4 * outline.n_heads + 3 * c * f
    if trained:
        kept += 2 * residual * h + n_inputs * c * h + c * f
    inputs, ranks = outline.adapted
    return kept + (c + setup.lora_dropout) * inputs + c * ranks


def _residual_bytes(outline: Outline, setup: Setup) -> int:
    """float32 embeddings make a float32 residual stream, also under autocast."""
    trains_float32 = outline.trains_language_model and not setup.zero_stage
    return 4 if trains_float32 else setup.compute_bytes


def activations(outline: Outline, setup: Setup, batch: Batch) -> float:
    """What the backward of one micro-batch needs, logits apart.

    Of every layer everything, or with checkpointing its input only. The projector keeps its input
    and two of its own outputs per image position; the vision tower keeps nothing, as no gradient
    passes it.
    """
    residual = _residual_bytes(outline, setup)
    last_norm = 4 * outline.hidden + residual * outline.hidden * outline.trains_language_model
    if setup.checkpointing:
        layer = batch.n_positions * residual * outline.hidden
    else:
        layer = _one_layer(outline, setup, batch)
    text = outline.n_layers * layer + batch.n_positions * last_norm
    if outline.tower is None:
        return text
    per_image = outline.n_image_tokens * (outline.tower.hidden + 2 * outline.hidden)
    return text + max(batch.n_images, 1) * per_image * setup.compute_bytes


def _one_layer(outline: Outline, setup: Setup, batch: Batch) -> float:
    linear = batch.n_positions * layer_activations(outline, setup)
    return linear + layer_squares(outline, setup, batch)


def recomputed_activations(outline: Outline, setup: Setup, batch: Batch) -> float:
    """With checkpointing one layer at a time is run again and keeps everything."""
    return _one_layer(outline, setup, batch) * setup.checkpointing


def logits(outline: Outline, setup: Setup, batch: Batch) -> float:
    """The output layer's rows and the loss.

    Logits of all rows at every position where some row is supervised, in c bytes; those that count
    gathered from them in c bytes, in float32, and their log-softmax. The backward makes as many.
    """
    all_rows = batch.n_rows * batch.n_logits
    per_number = setup.compute_bytes * all_rows + (setup.compute_bytes + 8) * batch.n_supervised
    return per_number * outline.vocabulary


def host_memory(outline: Outline, setup: Setup) -> float:
    """What offloading moves to the host, per GPU: weights; gradients once more in float32,
    float32 copy and moments."""
    moved = stored_weights(outline, setup) if setup.offload_parameters else 0
    if setup.offload_optimizer:
        gradients_there = gradients(outline, setup) + 4 * outline.n_trained / setup.world_size
        moved += optimizer_states(outline, setup) + gradients_there
    return moved


def memory(outline: Outline, setup: Setup, batch: Batch) -> Memory:
    """All parts for a run whose largest micro-batch is `batch`."""
    on_gpu, states_on_gpu = not setup.offload_parameters, not setup.offload_optimizer
    return Memory(
        weights=stored_weights(outline, setup) * on_gpu,
        gradients=gradients(outline, setup) * states_on_gpu,
        optimizer=optimizer_states(outline, setup) * states_on_gpu,
        working_copies=working_copies(outline, setup),
        buffers=communication_buffers(outline, setup),
        activations=activations(outline, setup, batch),
        recomputed=recomputed_activations(outline, setup, batch),
        logits=logits(outline, setup, batch),
        step=step_temporaries(outline, setup),
        host=host_memory(outline, setup),
    )


def usable(device: Device) -> float:
    """Bytes of a GPU's memory that a run can fill."""
    return device.memory_gib * 2**30 * (1 - SLACK) - CONTEXT


def shrunk(batch: Batch, n_rows: int, n_samples: int) -> Batch:
    """`batch` with fewer rows, as long and as densely supervised as they are."""
    share = n_rows / batch.n_rows
    return replace(
        batch,
        n_rows=n_rows,
        n_samples=n_samples,
        n_tokens=round(batch.n_tokens * share),
        n_supervised=round(batch.n_supervised * share),
        n_images=round(batch.n_images * share),
    )


@dataclass(frozen=True)
class Disk:
    """Bytes of what a run writes."""

    model: float
    """Of a `checkpoint-N`: the model, ready to use."""
    resume: float
    """Of a `checkpoint-N`: what going on needs besides."""
    n_checkpoints: int
    """How many are there at once, at most."""
    final: float
    """Of the output directory's own model."""

    @property
    def checkpoint(self) -> float:
        return self.model + self.resume

    @property
    def total(self) -> float:
        """With the checkpoint that is being written before the oldest is deleted."""
        being_written = self.n_checkpoints + (self.n_checkpoints > 0)
        return being_written * self.checkpoint + self.final


def model_files(outline: Outline, setup: Setup, whole: bool) -> float:
    """Of a checkpoint: 4 n + c m, as it is in memory (with DeepSpeed c (n + m)); or of what is
    exported only, if the run does not write the `whole` model."""
    trained_bytes = setup.compute_bytes if setup.zero_stage else 4
    frozen = (outline.n_parameters if whole else outline.exported) - outline.n_trained
    return trained_bytes * outline.n_trained + setup.compute_bytes * frozen


def resume_files(outline: Outline, setup: Setup, whole: bool, adapters: bool) -> float:
    """Without DeepSpeed the moments, 8 n, and 4 n where the exported weights are not enough.

    DeepSpeed writes moments and float32 copies, 12 n, and besides: stage 1 c (n + m); stage 2
    c m more; stage 3 c m. With adapters the frozen weights are left out.
    """
    n, m, c = outline.n_trained, outline.n_frozen * (not adapters), setup.compute_bytes
    if not setup.zero_stage:
        return (setup.moments_bytes + 4 * (not whole)) * n
    weights = {1: c * (n + m), 2: c * (n + 2 * m), 3: c * m}[setup.zero_stage]
    return (4 + setup.moments_bytes) * n + weights


def final_files(outline: Outline, setup: Setup, whole: bool) -> float:
    """In the type of the computation: c (n + m), or c times what is exported."""
    return setup.compute_bytes * (outline.n_parameters if whole else outline.exported)


def disk(outline: Outline, setup: Setup, whole: bool, adapters: bool, n_checkpoints: int) -> Disk:
    """What a run with at most `n_checkpoints` kept at once leaves on disk; tokenizer and settings,
    below a few MB, are not counted."""
    return Disk(
        model=model_files(outline, setup, whole),
        resume=resume_files(outline, setup, whole, adapters),
        n_checkpoints=n_checkpoints,
        final=final_files(outline, setup, whole),
    )
