"""Open a checkpoint whatever wrote it (kinds: `sources.py`), and load it; saving is `export.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import LlavaConfig, PreTrainedConfig, PreTrainedModel

from llava.errors import UsageError
from llava.files import add_files
from llava.images import ImageProcessor
from llava.model import lora
from llava.model.assemble import (
    Parts,
    build,
    combine,
    count_image_tokens,
    skeleton,
    split,
)
from llava.model.projector import check_projector_size, read_projector, with_projector
from llava.model.sources import (
    ADAPTER_CONFIG,
    FEATURES,
    HUB_NAME,
    NON_LORA,
    PREPROCESSOR,
    PROJECTOR_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILES,
    Kind,
    find_directory,
    kind_of,
    make_config,
    original_text_config,
    preprocessor_folder,
    read_json,
    read_vision_config,
    read_vision_state,
    read_weights,
    tokenizer_folder,
    weight_files,
)
from llava.model.weights import PROJECTOR, canonical
from llava.tokens import Tokenizer, load_tokenizer

DEFAULTS = {"template": "v1", "image_aspect_ratio": "pad", "model_max_length": 2048}
# The files besides the weights that decide what a model computes; the last five are those of other
# vision-language models: how they spell a conversation, split text and count tiles.
_DECIDING = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    ADAPTER_CONFIG,
    NON_LORA,
    PROJECTOR_FILE,
    SETTINGS_FILE,
    PREPROCESSOR,
    "config.json",
    *TOKENIZER_FILES,
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)


@dataclass
class Loaded:
    """A model ready to run, with everything that decides its inputs.

    Of a language model without vision, `image_processor` and `image_token_id` are None and
    `n_image_tokens` is 0.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    image_processor: ImageProcessor | None
    template_name: str
    image_token_id: int | None
    n_image_tokens: int
    """Positions an image takes in the sequence."""
    model_max_length: int
    """Positions after the image is expanded; longer samples are cut."""
    kind: Kind
    vision_tower: str | None = None
    """Directory or hub name of the tower that a LLaVA was made with, where it is known."""
    tokenizer_files: dict[str, bytes] = field(default_factory=dict, repr=False)


@dataclass
class Source:
    """A checkpoint that is read but not yet built. Folders are searched in order."""

    config: PreTrainedConfig
    state: Mapping[str, torch.Tensor]
    """Under canonical names; those that a LoRA adapts are merged when they are asked for."""
    settings: dict[str, Any]
    tokenizer_folders: list[Path]
    image_folders: list[Path]
    vision_tower: str | None = None
    """Directory or hub name of the vision tower, where the checkpoint says it."""


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, found once; what is asked of it is looked at then, once.

    `load`, `outline` and `base` raise UsageError (nothing loadable, base or tower missing, weights
    that do not fit), RefusedError (code in a file) and StorageError (damaged file).
    """

    folder: Path
    base_name: str | Path | None = None
    """Directory or hub name of the model that a LoRA or a projector was trained on."""
    download: bool = True
    """Whether the hub may be asked for what is not on this machine."""

    @classmethod
    def open(
        cls, name: str | Path, base: str | Path | None = None, download: bool = True
    ) -> Checkpoint:
        """The checkpoint `name`, a directory or a hub name; UsageError if there is none."""
        return cls(find_directory(name, download=download), base, download)

    @cached_property
    def kind(self) -> Kind:
        """What the directory holds. Raises as `sources.kind_of` does."""
        return kind_of(self.folder)

    @cached_property
    def values(self) -> dict[str, Any]:
        """What config.json says; nothing where there is none."""
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def base(self) -> Checkpoint | None:
        """The checkpoint that `base_name` means."""
        if self.base_name is None:
            return None
        return Checkpoint.open(self.base_name, download=self.download)

    @cached_property
    def tower(self) -> Path:
        """The directory of the vision tower that config.json names; UsageError without one."""
        name = self.values.get("mm_vision_tower")
        if not name:
            raise UsageError(
                f"{self.folder}: config.json does not name its vision tower; add mm_vision_tower, "
                "for LLaVA-1.5 openai/clip-vit-large-patch14-336"
            )
        try:
            return find_directory(name, self.folder, self.download)
        except UsageError as error:
            raise UsageError(
                f"{self.folder}: its vision tower was not found ({error}); put it beside the "
                f"checkpoint as {self.folder.resolve().parent / Path(name).name}"
            ) from error

    def settings(self, partial: bool = False) -> dict[str, Any]:
        """How to prepare samples: llava.json, else LLaVA's config.json, else DEFAULTS.

        `partial` leaves the defaults out.
        """
        settings = {} if partial else dict(DEFAULTS)
        for key, original in (
            ("image_aspect_ratio", "image_aspect_ratio"),
            ("model_max_length", "tokenizer_model_max_length"),
        ):
            if self.values.get(original) is not None:
                settings[key] = self.values[original]
        if (self.folder / SETTINGS_FILE).is_file():
            settings.update(read_json(self.folder / SETTINGS_FILE))
        return settings

    def load(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Loaded:
        """The model in evaluation mode on `device`.

        `dtype` is that of all parameters; None keeps that of the stored language model.
        """
        source = self._read()
        state = dict(source.state)  # merges a LoRA
        model = build(source.config, state, dtype, self.folder).to(device)
        return self._with_inputs(model, source)

    def outline(self) -> tuple[Loaded, Mapping[str, torch.Tensor]]:
        """What `load` gives, but with its model on the meta device; and the weights it would have.

        Files are mapped and only their names, types and shapes looked at. Weights have canonical
        names, and are read, or merged, when they are asked for.
        """
        source = self._read()
        model = skeleton(source.config, lora.unmerged(source.state), self.folder)
        return self._with_inputs(model, source), source.state

    def fingerprint(self) -> str:
        """xxh3-128 over the contents of all files that decide what the model computes.

        Weights, configurations, tokenizer and preprocessing of the checkpoint, of its vision tower
        where that is elsewhere, and of the base. Directory names do not count. Reads every byte.
        """
        digest = xxhash.xxh3_128()
        for folder in self._folders():
            files = {folder / name for name in _DECIDING if (folder / name).is_file()}
            add_files(digest, sorted(files.union(weight_files(folder))))
            digest.update(b"\0")
        return digest.hexdigest()

    def _folders(self) -> Iterator[Path]:
        yield self.folder
        if self.values.get("mm_vision_tower") and "vision_config" not in self.values:
            yield self.tower
        if self.base is not None:
            yield from self.base._folders()

    def _with_inputs(self, model: PreTrainedModel, source: Source) -> Loaded:
        folders = source.tokenizer_folders, source.image_folders
        loaded = wrap(model, self.kind, *folders, source.settings)
        loaded.vision_tower = source.vision_tower
        return loaded

    def _read(self) -> Source:
        """Configuration, weights and settings, put on the base where they need one."""
        folder = self.folder
        if self.kind in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY):
            return self._read_on_base()
        if self.kind is Kind.HF_OTHER:
            raise UsageError(
                f"{folder}: a vision-language model, but no LLaVA-1.5; it can score a pool "
                "(python -m selection extract), not be trained or converted here"
            )
        if self.kind is Kind.LLAVA_FULL:
            text_config = original_text_config(folder, self.values)
            return self._with_tower(text_config, canonical(read_weights(folder)), [folder])
        config = make_config(self.values, folder / "config.json")
        state, settings = canonical(read_weights(folder)), self.settings()
        image_folders = [folder] if self.kind is Kind.HF_LLAVA else []
        return Source(config, state, settings, [folder], image_folders)

    def _read_on_base(self) -> Source:
        """A LoRA or a projector put on the model it was trained on."""
        folder, is_lora = self.folder, self.kind is Kind.LLAVA_LORA
        if self.base is None:
            raise UsageError(
                f"{folder}: {'a LoRA' if is_lora else 'only a projector'}; give the model it was "
                f"trained on with --model-base{self._recorded_base()}"
            )
        if self.base.kind in (Kind.LLAVA_LORA, Kind.PROJECTOR_ONLY):
            raise UsageError(
                f"--model-base {self.base_name}: is itself {self.base.kind}; give a whole model"
            )

        # Its own tokenizer goes first, its weights replace or change the base's.
        source = self.base._read()
        source.tokenizer_folders.insert(0, folder)
        if is_lora:
            source.state = lora.merged(source.state, folder)
        else:
            projector = read_projector(folder / PROJECTOR_FILE)
            source.state = with_projector(source.state, projector)

        # On a language model this makes a LLaVA, with the tower that config.json here names.
        if not isinstance(source.config, LlavaConfig):
            has_projector = any(name.startswith(PROJECTOR) for name in source.state)
            if "mm_vision_tower" in self.values:
                if not has_projector:
                    raise UsageError(
                        f"{folder}: no {NON_LORA}, which holds the projector; copy it from the "
                        "same run, or give the whole LLaVA it was trained on as --model-base"
                    )
                return self._with_tower(source.config, source.state, source.tokenizer_folders)
            if has_projector:
                raise UsageError(
                    f"{folder}: needs a config.json that names mm_vision_tower; copy it from where "
                    "it was trained, or give a whole LLaVA as --model-base"
                )
        source.settings.update(self.settings(partial=True))
        return source

    def _recorded_base(self) -> str:
        """What the files say of the base, for an error message."""
        for name, key in (
            (ADAPTER_CONFIG, "base_model_name_or_path"),
            ("config.json", "_name_or_path"),
        ):
            if (self.folder / name).is_file():
                recorded = read_json(self.folder / name).get(key)
                if recorded:
                    return f" (its {name} says {recorded})"
        return ""

    def _with_tower(
        self,
        text_config: PreTrainedConfig,
        state: Mapping[str, torch.Tensor],
        tokenizer_folders: list[Path],
    ) -> Source:
        """Original LLaVA's weights completed by the vision tower that its configuration names."""
        folder, values = self.folder, self.values
        if values.get("mm_use_im_start_end"):
            raise UsageError(
                f"{folder}: mm_use_im_start_end is of an older LLaVA and not supported; "
                "use a LLaVA-1.5"
            )

        # The tower of the checkpoint, if it has one with its configuration; else the one it names.
        text_state, tower_state, projector = split(lora.unmerged(state))
        image_folders = [folder]
        if tower_state and "vision_config" in values:
            vision_config = make_config(values["vision_config"], folder / "config.json")
        else:
            image_folders.append(self.tower)
            vision_config = read_vision_config(self.tower)
            tower_state = tower_state or read_vision_state(self.tower)
        check_projector_size(projector, vision_config, text_config, folder)

        # All parts in one model, and a LoRA where it was on the language model's weights.
        vocab_size = load_tokenizer(tokenizer_folder(tokenizer_folders)).vocab_size
        config, full = combine(
            Parts(text_config, text_state, vision_config, tower_state, projector),
            vocab_size,
            values.get("mm_vision_select_layer", -2),
            FEATURES.get(values.get("mm_vision_select_feature", "patch"), "default"),
        )
        full = state.on(full) if isinstance(state, lora.Merged) else full
        name = self._lasting_tower_name()
        return Source(config, full, self.settings(), tokenizer_folders, image_folders, name)

    def _lasting_tower_name(self) -> str | None:
        """A directory as it is found from anywhere; a hub name, or one not found, as it is."""
        name = self.values.get("mm_vision_tower")
        if not name or (HUB_NAME.fullmatch(name) and not (self.folder / name).is_dir()):
            return name
        try:
            return str(self.tower.resolve())
        except UsageError:
            return name


def load(
    path: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """The model of the checkpoint `path`: `Checkpoint.open` and `Checkpoint.load` in one."""
    return Checkpoint.open(path, base).load(dtype, device)


def wrap(
    model: PreTrainedModel,
    kind: Kind,
    tokenizer_folders: list[Path],
    image_folders: list[Path],
    settings: dict[str, Any] = DEFAULTS,
) -> Loaded:
    """`model` with tokenizer and image processor from the first folder that has them.

    Without `image_folders` there is no image processor.
    """
    tokenizer = tokenizer_folder(tokenizer_folders)
    files = (tokenizer / name for name in TOKENIZER_FILES)
    loaded = Loaded(
        model=model,
        tokenizer=load_tokenizer(tokenizer),
        image_processor=None,
        template_name=settings["template"],
        image_token_id=None,
        n_image_tokens=0,
        model_max_length=fitting_length(model, settings["model_max_length"]),
        kind=kind,
        tokenizer_files={file.name: file.read_bytes() for file in files if file.is_file()},
    )
    if isinstance(model.config, LlavaConfig):
        loaded.image_token_id = model.config.image_token_id
        loaded.n_image_tokens = count_image_tokens(model.config)
        if image_folders:
            aspect_ratio = settings["image_aspect_ratio"]
            loaded.image_processor = _image_processor(model.config, image_folders, aspect_ratio)
    return loaded


def fitting_length(model: PreTrainedModel, length: int) -> int:
    """`length`, or the number of positions that the language model has if that is less."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if longest is None else min(length, longest)


def _image_processor(config: LlavaConfig, folders: list[Path], aspect_ratio: str) -> ImageProcessor:
    folder = preprocessor_folder(folders)
    processor = ImageProcessor.from_pretrained(folder, aspect_ratio)
    expected = config.vision_config.image_size
    if processor.size != expected:
        raise UsageError(
            f"{folder / PREPROCESSOR}: makes images of {processor.size} pixels, "
            f"the vision tower takes {expected}; copy the tower's own"
        )
    return processor
