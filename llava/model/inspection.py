"""What a checkpoint is, and what it lacks: for folders that are whole, unfinished or broken.

Names, types and shapes come from mapped files; no weight is read. Every piece is looked at for
itself, so that one that is missing hides no other; when none is, the model is put together on the
meta device, which finds what does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from llava.errors import StorageError, UserError
from llava.images import ImageProcessor
from llava.model import lora
from llava.model.checkpoint import Checkpoint
from llava.model.projector import layer_prefixes, type_in
from llava.model.sources import (
    ADAPTER_CONFIG,
    NON_LORA,
    PREPROCESSOR,
    PROJECTOR_FILE,
    TOKENIZER_FILES,
    Kind,
    is_original,
    kind_by_config,
    make_config,
    original_text_config,
    preprocessor_folder,
    read_json,
    tokenizer_folder,
    weight_files,
)
from llava.model.weights import PROJECTOR, TOWER, State, canonical, read_tensors
from llava.tokens import load_tokenizer
from llava.train.checkpoints import MARKER

T = TypeVar("T")
NAMES = {
    Kind.HF_LLAVA: "Hugging Face LLaVA",
    Kind.LLAVA_FULL: "original LLaVA, full",
    Kind.LLAVA_LORA: "LoRA; needs --model-base",
    Kind.PROJECTOR_ONLY: "projector only; needs --model-base",
    Kind.LANGUAGE_MODEL: "language model without vision",
    Kind.HF_OTHER: "vision-language model, no LLaVA-1.5",
}
_TRAINING = ("trainer_state.json", "optimizer.pt", "latest", MARKER)


@dataclass
class Problem:
    """One thing that keeps a checkpoint from being loaded: what, where and the remedy."""

    text: str
    exit_code: int


@dataclass
class Report:
    """`facts` by topic, in the order they are shown; `notes` do no harm."""

    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if the checkpoint loads, else the largest of its problems' codes."""
        return max((problem.exit_code for problem in self.problems), default=0)

    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        """What `function` gives; a UserError becomes a problem, listed once, and None."""
        try:
            return function(*args)
        except UserError as error:
            problem = Problem(str(error), error.exit_code)
            if problem not in self.problems:
                self.problems.append(problem)
            return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        loadable = {"path": self.path, "loadable": not self.problems, "exit_code": self.exit_code}
        problems = [asdict(problem) for problem in self.problems]
        return {**loadable, **self.facts, "problems": problems, "notes": self.notes}


def examine(path: str | Path, base: str | Path | None = None) -> Report:
    """Look at the checkpoint at `path`, and at `base` if it needs one. Raises no UserError."""
    report = Report(str(path))
    checkpoint = report.attempt(Checkpoint.open, path, base)
    if checkpoint is None:
        return report
    folder = checkpoint.folder
    kind = report.attempt(lambda: checkpoint.kind)
    values = report.attempt(lambda: checkpoint.values) or {}
    if kind is None and values.get("model_type"):  # by config.json alone: no weights are there
        kind = report.attempt(kind_by_config, folder)
    if kind:
        report.facts["kind"] = str(kind)
        report.facts["description"] = NAMES[kind]
    state = _about_weights(report, folder)
    if not (kind or values or state):
        return report

    # Each part for itself, so that one that is missing hides no other.
    _about_language_model(report, folder, values)
    if kind is Kind.LLAVA_LORA:
        _about_lora(report, folder)
    _about_projector(report, folder, state)
    _about_tower(report, checkpoint, values, state, kind)
    _about_inputs(report, checkpoint, kind)
    _about_training(report, folder)
    if base is not None:
        about_base = examine(base)
        report.facts["base"] = {"path": str(base), "kind": about_base.facts.get("kind")}
        report.problems += [p for p in about_base.problems if p not in report.problems]

    # What only the whole model tells: that its parts fit, and its size.
    outline = report.attempt(checkpoint.outline) if kind and not report.problems else None
    if outline is not None:
        loaded, _ = outline
        model = {"parameters": sum(p.numel() for p in loaded.model.parameters())}
        if loaded.n_image_tokens:
            model["image_tokens"] = loaded.n_image_tokens
        model["model_max_length"] = loaded.model_max_length
        report.facts["model"] = model
    return report


def _about_weights(report: Report, folder: Path) -> State:
    """Names and shapes in all files of weights that can be opened, under the files' names."""
    files = _present(report, folder)
    state: State = {}
    for file in files:
        state.update(report.attempt(read_tensors, file) or {})
    if state:
        report.facts["weights"] = {
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
            "tensors": len(state),
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in state.values()}),
            "layout": layout(state),
        }
    return state


def _present(report: Report, folder: Path) -> list[Path]:
    """Every file with weights of the model: whole ones, shards that are there, adapters."""
    files = report.attempt(weight_files, folder)
    if files is None:  # a shard is missing: look at the others all the same
        files = sorted({*folder.glob("model-*.safetensors"), *folder.glob("pytorch_model-*.bin")})
    adapters = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    adapters = [file for file in adapters if file.is_file()][:1]
    others = [folder / NON_LORA, folder / PROJECTOR_FILE]
    return [*files, *adapters, *(file for file in others if file.is_file())]


def layout(names: Any) -> str:
    """Whose names these are, of all the layouts that LLaVA's weights are found in."""
    text = "\n".join(["", *names])
    if "\nbase_model." in text:
        return "LoRA on Hugging Face's LLaVA" if "language_model." in text else "LLaVA's LoRA"
    if "mm_projector." in text:
        return "original LLaVA"
    if "\nlanguage_model.model." in text:
        classic = "\nvision_tower.vision_model." in text
        return "llava-hf (classic)" if classic else "written by transformers 5"
    if "\nmodel.language_model." in text:
        old = "\nmodel.vision_tower.vision_model." in text
        return "in memory of transformers 4.52 or later" if old else "in memory of transformers 5"
    return "language model"


def _about_language_model(report: Report, folder: Path, values: dict[str, Any]) -> None:
    if not values.get("model_type"):
        return
    make = original_text_config if is_original(values) else _text_config
    text = report.attempt(make, folder, values)
    if text is not None:
        report.facts["language_model"] = {
            "type": text.model_type,
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "vocabulary": text.vocab_size,
            "positions": getattr(text, "max_position_embeddings", None),
        }


def _text_config(folder: Path, values: dict[str, Any]) -> PreTrainedConfig:
    return make_config(values, folder / "config.json").get_text_config()


def _about_lora(report: Report, folder: Path) -> None:
    config = report.attempt(read_json, folder / ADAPTER_CONFIG) or {}
    report.attempt(lora.scale, folder)
    adapter = report.attempt(lora.read, folder)
    report.facts["lora"] = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "base": config.get("base_model_name_or_path"),
        "weights_adapted": len(adapter[0]) if adapter else None,
    }
    if adapter and not any(name.startswith(PROJECTOR) for name in adapter[1]):
        report.notes.append(
            f"no {NON_LORA}: the projector is taken from --model-base, which must be a whole "
            "LLaVA; a training that changed it wrote that file"
        )


def _about_projector(report: Report, folder: Path, state: State) -> None:
    projector = {k: v for k, v in canonical(_bare(state)).items() if k.startswith(PROJECTOR)}
    kind = report.attempt(type_in, projector, folder) if projector else None
    if kind:
        prefixes = layer_prefixes(kind)
        first, last = (projector[f"{PROJECTOR}{p}weight"] for p in (prefixes[0], prefixes[-1]))
        sizes = {"inputs": first.shape[1], "outputs": last.shape[0]}
        report.facts["projector"] = {"type": kind, **sizes}


def _bare(state: State) -> State:
    """`state` without PEFT's prefix."""
    return {lora.bare_name(name): tensor for name, tensor in state.items()}


def _about_tower(
    report: Report,
    checkpoint: Checkpoint,
    values: dict[str, Any],
    state: State,
    kind: Kind | None,
) -> None:
    config_file = checkpoint.folder / "config.json"
    inside = any(name.startswith(TOWER) for name in canonical(_bare(state)))
    name = values.get("mm_vision_tower")
    facts: dict[str, Any] = {"name": name, "weights_inside": inside}
    if kind is Kind.HF_LLAVA:
        config = report.attempt(make_config, values, config_file)
        vision = config and config.vision_config
    elif name is None and kind in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY):
        report.facts["vision_tower"] = {"name": "the base's"}  # trained on a whole LLaVA
        return
    elif is_original(values):
        tower = None
        if not (inside and "vision_config" in values):
            tower = report.attempt(lambda: checkpoint.tower)
            facts["found"] = tower and str(tower)
        vision = values.get("vision_config") or (tower and _vision_values(report, tower))
        vision = vision and report.attempt(make_config, vision, config_file)
    else:
        return
    if vision is not None:
        keys = ("num_hidden_layers", "hidden_size", "image_size", "patch_size")
        facts.update({key: getattr(vision, key, None) for key in keys})
    report.facts["vision_tower"] = facts


def _vision_values(report: Report, folder: Path) -> dict[str, Any] | None:
    values = report.attempt(read_json, folder / "config.json")
    return values and {"model_type": "clip_vision_model", **values.get("vision_config", values)}


def _about_inputs(report: Report, checkpoint: Checkpoint, kind: Kind | None) -> None:
    """Tokenizer, preprocessing and settings; a LoRA or projector has the base's."""
    folder = checkpoint.folder
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES[:2])
    whole = kind in (Kind.HF_LLAVA, Kind.LLAVA_FULL, Kind.LANGUAGE_MODEL)
    if has_tokenizer or whole:
        place = report.attempt(tokenizer_folder, [folder])
        tokenizer = place and report.attempt(load_tokenizer, place)
        if tokenizer:
            file = next(n for n in TOKENIZER_FILES if (folder / n).is_file())
            report.facts["tokenizer"] = {"file": file, "vocabulary": tokenizer.vocab_size}
    if kind is Kind.HF_LLAVA or (folder / PREPROCESSOR).is_file():
        place = report.attempt(preprocessor_folder, [folder])
        processor = place and report.attempt(ImageProcessor.from_pretrained, place)
        if processor:
            report.facts["preprocessor"] = {"image_size": processor.size}
    settings = report.attempt(checkpoint.settings, not whole)
    if settings:
        report.facts["settings"] = settings


def _about_training(report: Report, folder: Path) -> None:
    if not any((folder / name).exists() for name in _TRAINING):
        return
    state = folder / "trainer_state.json"
    step = (state.is_file() and report.attempt(read_json, state)) or {}
    complete = (folder / MARKER).is_file()
    report.facts["training"] = {"step": step.get("global_step"), "complete": complete}
    if complete:
        report.attempt(_check_marker, folder)
    elif (folder / "optimizer.pt").exists() or (folder / "latest").exists():
        report.notes.append(
            f"no {MARKER}: this training checkpoint was cut short, or another program wrote it; "
            "training goes on only from a complete one, the checkpoint-N before it"
        )


def _check_marker(folder: Path) -> None:
    """Raise StorageError unless every file listed in COMPLETE has its size."""
    try:
        files = read_json(folder / MARKER)["files"]
        sizes = {name: described["size"] for name, described in files.items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / MARKER}: damaged; use the checkpoint before it") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise StorageError(
                f"{path}: missing or of another size than {MARKER} says; use the checkpoint "
                "before it"
            )


def as_text(report: Report) -> str:
    """The report for a terminal: one topic a line, then what is missing."""
    lines = [report.path]
    for topic, fact in report.facts.items():
        if topic == "kind":
            continue
        label = "kind" if topic == "description" else topic.replace("_", " ")
        lines.append(f"  {label:<15} {_shown(fact)}")
    lines += [f"  note: {note}" for note in report.notes]
    lines += [f"  problem: {problem.text}" for problem in report.problems]
    verdict = f"cannot be loaded (exit {report.exit_code})" if report.problems else "loadable"
    return "\n".join([*lines, f"  {verdict}"])


def _shown(fact: Any) -> str:
    if not isinstance(fact, dict):
        return str(fact)
    known = {key: value for key, value in fact.items() if value is not None}
    return ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in known.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps(report.as_dict(), indent=2, default=str)
