"""`python -m mini base`: make the tiny base weights that are shipped in mini/base.

Six stages, each finished on disk before the next begins, so an interrupted run goes on where it
stopped: tokenizer, vision tower, its features, words and projector, wired language model, its last
layer. Half an hour on two cores. Nobody needs to run this to use the small world.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlamaForCausalLM

from llava.files import atomic_write, make_folder
from llava.flags import Parser
from llava.tokens import SentencePieceTokenizer, load_tokenizer
from mini.fetch import default_cache, fetch
from mini.make_base import language, vision
from mini.make_base.lessons import Teacher, Thing, figure_things, things
from mini.make_base.names import learn_names
from mini.make_base.rows import RowMaker
from mini.make_base.tokenizer import corpus, make_tokenizer
from mini.render import SIZE
from mini.world import World, load_world

_WORDS = "words.safetensors"
_BANK = "bank.safetensors"
_PROJECTOR = "projector.safetensors"
_PROJECTOR_NAMES = {"0": "linear_1", "2": "linear_2"}


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    """How the base weights are made."""

    out: str = "playground/base"
    """folder to write llama/, clip/ and projector.safetensors to"""
    work: str = "playground/base-work"
    """folder of finished stages; a stage that is there is not made again"""
    cache: str | None = None
    """folder of downloads and rasterised pictures (default: as for build)"""
    seed: int = 0
    """seed of everything that is drawn"""
    vision_steps: int = 2000
    """steps of the vision tower, 56 drawings each"""
    picture_steps: int = 300
    """steps of the last layer on lessons about pictures, 24 lessons each"""
    names_steps: int = 800
    """steps of word vectors and projector, 128 drawings each"""
    picture_rate: float = 2e-3
    """peak learning rate on pictures"""
    batch_size: int = 24
    """lessons a step"""
    n_views: int = 4
    """views of each drawing whose features are kept: the plain one and varied ones"""


def main(args: Sequence[str]) -> None:
    """Parse, make what is missing, and say what is where."""
    parser = Parser(prog="python -m mini base", description=__doc__)
    parser.add_class_arguments(BaseSettings)
    settings = BaseSettings(**parser.parse_args(list(args)).as_dict())
    torch.set_num_threads(1)
    make_base(settings)
    size = sum(path.stat().st_size for path in Path(settings.out).rglob("*") if path.is_file())
    print(f"{settings.out}: base weights, {size / 1e6:.1f} MB")


def make_base(settings: BaseSettings) -> None:
    """Run the stages that are not in `settings.work` and export the last one."""
    work = Path(settings.work)
    make_folder(work)
    cache = settings.cache or default_cache()
    world = load_world(fetch(cache), cache)
    known = things(world.concepts)
    if not (work / "tokenizer.model").is_file():
        model = make_tokenizer(world.concepts, corpus(world.concepts))
        atomic_write(work / "tokenizer.model", model)
    tokenizer = load_tokenizer(work)
    figures = figure_things(world, random.Random(settings.seed))
    drawings = vision.training_drawings(world, known, figures)

    def tower_stage(folder: Path) -> None:
        report = _reporter("vision", settings.vision_steps)
        tower = vision.train_tower(drawings, settings.vision_steps, settings.seed, report)
        tower.save_pretrained(folder)

    _stage(work / "clip", tower_stage)
    tower = CLIPVisionModel.from_pretrained(work / "clip", dtype=torch.float32).eval()

    def views_stage(folder: Path) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        bank = vision.feature_bank(tower, drawings, settings.n_views, generator)
        save_file({"features": bank}, folder / _BANK)

    def names_stage(folder: Path) -> None:
        words, projector = learn_names(
            bank, drawings.things, language.HIDDEN, settings.names_steps, settings.seed
        )
        save_file(words, folder / _WORDS)
        save_file(_projector_state(projector), folder / _PROJECTOR)

    def wired_stage(folder: Path) -> None:
        model = language.make_language_model(tokenizer, meanings, known, settings.seed)
        model.save_pretrained(folder)

    def picture_stage(folder: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(work / "wired", dtype=torch.float32)
        projector = _read_projector(work / "names" / _PROJECTOR)
        _learn_pictures(model, projector, bank, drawings.things, world, tokenizer, settings)
        model.save_pretrained(folder)
        save_file(_projector_state(projector), folder / _PROJECTOR)

    _stage(work / "views", views_stage)
    bank = load_file(work / "views" / _BANK)["features"]
    _stage(work / "names", names_stage)
    meanings = load_file(work / "names" / _WORDS)
    _stage(work / "wired", wired_stage)
    _stage(work / "pictures", picture_stage)
    export(work, Path(settings.out))


def _stage(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill `folder` unless it is there; a half-filled one has another name."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    unfinished.rename(folder)


def _learn_pictures(
    model: LlamaForCausalLM,
    projector: nn.Sequential,
    bank: torch.Tensor,
    owners: list[Thing],
    world: World,
    tokenizer: SentencePieceTokenizer,
    settings: BaseSettings,
) -> None:
    """Train the last layer of `model` on lessons about drawings, in place."""
    generator = torch.Generator().manual_seed(settings.seed)
    shown: dict[Thing, list[int]] = {}
    for number, thing in enumerate(owners):
        shown.setdefault(thing, []).append(number)
    rng = random.Random(settings.seed)
    teacher = Teacher(world.concepts, list(shown), rng)
    language.fit(
        model,
        RowMaker(teacher, tokenizer, rng, shown, bank.shape[2]).batches(settings.batch_size),
        settings.picture_steps,
        settings.picture_rate,
        language.symbol_answers(tokenizer),
        generator,
        projector,
        bank,
        report=_reporter("pictures", settings.picture_steps),
    )


def export(work: Path, out: Path) -> None:
    """Write the finished stages as bfloat16 in the layouts that `llava.model.assemble` reads."""
    half = torch.bfloat16
    for stage, name, kind in (
        ("pictures", "llama", LlamaForCausalLM),
        ("clip", "clip", CLIPVisionModel),
    ):
        kind.from_pretrained(work / stage, dtype=half).save_pretrained(out / name)
    (out / "llama" / "generation_config.json").unlink(missing_ok=True)
    atomic_write(out / "llama" / "tokenizer.model", (work / "tokenizer.model").read_bytes())
    side = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side)
    processor.save_pretrained(out / "clip")
    state = load_file(work / "pictures" / _PROJECTOR)
    save_file({k: v.to(half) for k, v in state.items()}, out / _PROJECTOR)


def _projector_state(projector: nn.Sequential) -> dict[str, torch.Tensor]:
    return {
        f"multi_modal_projector.{_PROJECTOR_NAMES[name.split('.')[0]]}.{name.split('.')[1]}": value
        for name, value in projector.state_dict().items()
    }


@torch.no_grad()
def _read_projector(path: Path) -> nn.Sequential:
    state = load_file(path)
    layers = [state[f"multi_modal_projector.linear_{i}.weight"].shape[::-1] for i in (1, 2)]
    projector = nn.Sequential(nn.Linear(*layers[0]), nn.GELU(), nn.Linear(*layers[1]))
    for name, parameter in _projector_state(projector).items():
        parameter.copy_(state[name])
    return projector


def _reporter(stage: str, n_steps: int) -> Callable[..., None]:
    def report(step: int, loss: float, accuracy: float | None = None) -> None:
        chosen = "" if accuracy is None else f", right option {accuracy:.1%}"
        print(f"{stage} {step}/{n_steps}: loss {loss:.3f}{chosen}", flush=True)

    return report
