"""`python -m llava.model inspect`: of whole, unfinished, broken and malicious folders."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from llava.errors import UsageError
from llava.files import write_json
from llava.model import lora
from llava.model.__main__ import main
from llava.model.checkpoint import load
from llava.model.inspection import Report, examine
from llava.model.sources import read_weights
from llava.model.weights import classic_name
from tests.llava.model.checks import Bomb


def the_problem(report: Report) -> str:
    """The one problem of a report."""
    assert len(report.problems) == 1, report.problems
    return report.problems[0].text


# ---- what is whole -------------------------------------------------------------------------------


def test_hugging_face_llava(saved):
    report = examine(saved)
    assert (report.exit_code, report.problems, report.notes) == (0, [], [])
    facts = report.facts
    assert facts["kind"] == "hf_llava"
    assert facts["weights"]["layout"] == "llava-hf (classic)"
    assert facts["weights"]["dtypes"] == ["float32"] and facts["weights"]["files"] == 1
    total = sum(tensor.numel() for tensor in load_file(saved / "model.safetensors").values())
    assert facts["weights"]["parameters"] == facts["model"]["parameters"] == total
    text = {"type": "llama", "layers": 2, "hidden_size": 32, "vocabulary": 384, "positions": 256}
    assert facts["language_model"] == text
    assert facts["projector"] == {"type": "mlp2x_gelu", "inputs": 24, "outputs": 32}
    assert facts["vision_tower"]["weights_inside"] and facts["vision_tower"]["image_size"] == 28
    assert facts["tokenizer"] == {"file": "tokenizer.model", "vocabulary": 340}
    assert facts["preprocessor"] == {"image_size": 28}
    assert facts["settings"]["template"] == "v1"


def test_original_llava(original):
    report = examine(original)
    assert report.exit_code == 0
    tower = report.facts["vision_tower"]
    assert (tower["name"], tower["weights_inside"]) == ("clip", False)
    assert tower["found"] == str(original.parent / "clip") and tower["num_hidden_layers"] == 3
    assert report.facts["weights"]["layout"] == "original LLaVA"
    assert report.facts["settings"]["model_max_length"] == 200


def test_lora_on_its_base(trained, parts):
    _, folder = trained
    report = examine(folder, parts / "lm")
    assert report.exit_code == 0 and report.facts["base"]["kind"] == "language_model"
    facts = report.facts["lora"]
    assert (facts["rank"], facts["alpha"], facts["base"]) == (3, 12, "lm")
    assert facts["weights_adapted"] == 14 and len(facts["targets"]) == 7
    assert report.facts["weights"]["layout"] == "LLaVA's LoRA"
    assert report.facts["projector"]["type"] == "mlp2x_gelu"


LAYOUTS = {
    "llava-hf (classic)": [],
    "in memory of transformers 4.52 or later": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
    ],
    "in memory of transformers 5": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^vision_tower\.vision_model", "model.vision_tower"),
        (r"^multi_modal_projector", "model.multi_modal_projector"),
    ],
    "written by transformers 5": [(r"^vision_tower\.vision_model", "vision_tower")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_told_apart(layouts, saved, layout):
    state = layouts.rename(load_file(saved / "model.safetensors"), *LAYOUTS[layout])
    save_file(state, saved / "model.safetensors")
    report = examine(saved)
    assert report.facts["weights"]["layout"] == layout and report.exit_code == 0


def sparse_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A file with the header for `state`, all on the meta device, and a hole for its content."""
    header, at = {}, 0
    for name, tensor in state.items():
        end = at + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    os.truncate(path, 8 + len(content) + at)


def test_seven_billion_parameters_are_not_read(saved, tmp_path):
    """LLaVA-1.5-7B's shape, 14 GB on paper: the parameters of the published model, no memory."""
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096).to_dict()
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    state = {classic_name(name): tensor for name, tensor in model.state_dict().items()}
    sparse_safetensors(saved / "model.safetensors", state)
    write_json(saved / "config.json", config.to_diff_dict())
    side = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    values = json.loads((saved / "preprocessor_config.json").read_text())
    write_json(saved / "preprocessor_config.json", {**values, **side})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = examine(saved)
    assert report.problems == []
    assert report.facts["model"]["parameters"] == 7_063_427_072
    assert report.facts["model"]["image_tokens"] == 576
    assert report.facts["weights"]["bytes"] > 14e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


# ---- what is missing -----------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    return damage


def pointer(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")

    return damage


def truncated(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-10])

    return damage


@pytest.mark.parametrize(
    ("damage", "problem", "code"),
    [
        (without("tokenizer.model"), "no tokenizer.model or tokenizer.json.*copy the base", 2),
        (without("preprocessor_config.json"), "no preprocessor_config.json.*copy the vision", 2),
        (without("model.safetensors"), "config.json without weights.*finish the download", 2),
        (without("config.json"), "weights without config.json; copy it from where", 2),
        (
            pointer("model.safetensors"),
            "a Git LFS pointer, not the file itself; run `git lfs pull`",
            2,
        ),
        (pointer("tokenizer.model"), "tokenizer.model.*Git LFS pointer.*git lfs pull", 2),
        (truncated("model.safetensors"), "damaged or incomplete.*copy it again", 74),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON", 2),
    ],
)
def test_an_incomplete_llava(saved, damage, problem, code):
    damage(saved)
    report = examine(saved)
    assert report.exit_code == code
    assert any(re.search(problem, p.text) for p in report.problems), report.problems
    with pytest.raises(Exception, match=problem):
        load(saved)


def test_every_missing_piece_is_listed_at_once(saved):
    for name in ("tokenizer.model", "preprocessor_config.json"):
        (saved / name).unlink()
    truncated("model.safetensors")(saved)
    report = examine(saved)
    assert sorted(problem.exit_code for problem in report.problems) == [2, 2, 74]
    assert report.exit_code == 74
    assert report.facts["description"] == "Hugging Face LLaVA"  # what can be told is told


def test_missing_shards(saved, tiny):
    state = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for part in range(3):
        file = f"model-0000{part + 1}-of-00003.safetensors"
        weight_map.update(dict.fromkeys(names[part::3], file))
    write_json(saved / "model.safetensors.index.json", {"weight_map": weight_map})
    file = "model-00001-of-00003.safetensors"
    save_file({name: state[name] for name in names[::3]}, saved / file)
    report = examine(saved)
    assert "shard model-00002-of-00003.safetensors is missing and 1 more; finish the download" in (
        report.problems[0].text
    )
    assert report.facts["kind"] == "hf_llava"
    assert report.facts["weights"]["tensors"] == len(names[::3])


def test_missing_tower(original):
    shutil.rmtree(original.parent / "clip")
    report = examine(original)
    assert "its vision tower was not found" in the_problem(report)
    assert "put it beside the checkpoint" in the_problem(report) and report.exit_code == 2


def test_missing_base_and_files_of_a_lora(trained, parts, tmp_path):
    _, folder = trained
    assert "a LoRA; give the model it was trained on with --model-base" in the_problem(
        examine(folder)
    )
    assert "(its adapter_config.json says lm)" in the_problem(examine(folder))
    report = examine(folder, tmp_path / "nowhere")
    assert "nowhere: no such model directory" in the_problem(report)
    (folder / lora.NON_LORA).rename(tmp_path / "kept")
    report = examine(folder, parts / "lm")
    assert "no non_lora_trainables.bin, which holds the projector; copy it" in the_problem(report)
    assert any("no non_lora_trainables.bin" in note for note in report.notes)
    (tmp_path / "kept").rename(folder / lora.NON_LORA)
    (folder / "config.json").unlink()
    report = examine(folder, parts / "lm")
    assert "needs a config.json that names mm_vision_tower; copy it" in the_problem(report)
    (folder / "adapter_config.json").unlink()
    report = examine(folder)
    assert "a LoRA's weights without adapter_config.json; copy it" in the_problem(report)
    (folder / "adapter_model.safetensors").unlink()
    assert "non_lora_trainables.bin without its LoRA; copy" in the_problem(examine(folder))


def test_lora_of_a_whole_llava(saved, trained):
    """Its config.json names no tower: the base brings it."""
    _, folder = trained
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "mm_vision_tower": None})
    assert "give the model it was trained on with --model-base" in the_problem(examine(folder))
    report = examine(folder, saved)
    assert report.exit_code == 0 and report.facts["vision_tower"] == {"name": "the base's"}
    assert load(folder, saved).image_processor is not None


def test_a_base_of_another_size(trained, parts, tmp_path):
    _, folder = trained
    config = LlamaConfig.from_pretrained(parts / "lm")
    config.hidden_size, config.num_hidden_layers = 64, 3
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    shutil.copy(parts / "lm/tokenizer.model", tmp_path / "other")
    problem = the_problem(examine(folder, tmp_path / "other"))
    assert "the base has (64, 48); it was trained on another model, check --model-base" in problem
    with pytest.raises(UsageError, match="check --model-base"):
        load(folder, tmp_path / "other")


def test_a_projector_that_does_not_fit_or_is_not_there(layouts, parts, original, tmp_path):
    folder = tmp_path / "projector"
    layouts.write_original_config(parts, folder, tower="../clip", tune_mm_mlp_adapter=True)
    assert "without mm_projector.bin; copy it from the same run" in examine(folder).problems[0].text
    wide = {"0.weight": (48, 24), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    state = {f"model.mm_projector.{k}": torch.ones(shape) for k, shape in wide.items()}
    torch.save(state, folder / "mm_projector.bin")
    report = examine(folder, parts / "lm")
    assert report.facts["projector"] == {"type": "mlp2x_gelu", "inputs": 24, "outputs": 48}
    assert "projects 24 features to 48, but the vision tower gives 24 and the language model" in (
        the_problem(report)
    )
    assert "belongs to another language model or vision tower" in the_problem(report)


def test_a_training_checkpoint_that_was_cut_short(saved):
    (saved / "optimizer.pt").write_bytes(b"")
    write_json(saved / "trainer_state.json", {"global_step": 40})
    report = examine(saved)
    assert report.facts["training"] == {"step": 40, "complete": False}
    assert report.exit_code == 0 and "no COMPLETE: this training checkpoint" in report.notes[0]
    sizes = {path.name: {"size": path.stat().st_size} for path in saved.iterdir()}
    write_json(saved / "COMPLETE", {"files": sizes})
    assert examine(saved).notes == [] and examine(saved).exit_code == 0
    (saved / "llava.json").write_text("{}")
    assert "llava.json: missing or of another size than COMPLETE says" in the_problem(
        examine(saved)
    )
    assert examine(saved).exit_code == 74


def test_a_folder_with_nothing_or_with_checkpoints(saved, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no model in this directory: it has neither" in the_problem(examine(empty))
    for step in (10, 5):
        (empty / f"checkpoint-{step}").mkdir()
    assert "but checkpoint-10, checkpoint-5 in it; name one" in the_problem(examine(empty))


def test_a_language_model_and_others(parts, tmp_path):
    report = examine(parts / "lm")
    assert report.facts["description"] == "language model without vision" and not report.problems
    report = examine(parts / "clip")
    assert "neither a language model nor a vision-language model" in the_problem(report)


# ---- what is dangerous or closed (P22) -----------------------------------------------------------


def test_code_in_a_checkpoint_is_reported_and_not_run(layouts, saved, trained, parts, tmp_path):
    canary = tmp_path / "canary"
    state = read_weights(saved)
    (saved / "model.safetensors").unlink()
    torch.save({**state, "extra": Bomb(canary)}, saved / "pytorch_model.bin")
    report = examine(saved)
    assert report.exit_code == 77 and "could run code" in report.problems[0].text
    save_file(state, saved / "model.safetensors")
    layouts.edit_json(saved / "config.json", _attn_implementation_internal="someone/kernel")
    report = examine(saved)
    assert report.exit_code == 77 and "download and run code; remove" in report.problems[0].text
    layouts.edit_json(
        saved / "config.json",
        _attn_implementation_internal=None,
        auto_map={"AutoConfig": "evil.Evil"},
        model_type="evil",
    )
    report = examine(saved)
    assert report.exit_code == 77 and "auto_map" in report.problems[0].text
    _, folder = trained
    torch.save({"x": Bomb(canary)}, folder / lora.NON_LORA)
    assert examine(folder, parts / "lm").exit_code == 77
    assert not canary.exists()


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights, if this is root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("closed", ["", "config.json", "model.safetensors"])
def test_permission_denied(saved, tmp_path_factory, closed):
    with tempfile.TemporaryDirectory() as place:  # every folder above may be entered
        Path(place).chmod(0o755)
        folder = Path(place) / "model"
        shutil.copytree(saved, folder)
        (folder / closed).chmod(0)
        with nobody():
            report = examine(folder)
        (folder / closed).chmod(0o755)
    assert report.exit_code == 2
    words = "permission denied; check the owner" if not closed else "cannot be read.*its mode"
    assert any(re.search(words, p.text) for p in report.problems), report.problems


# ---- the command ---------------------------------------------------------------------------------


def test_as_a_program(saved, tmp_path):
    command = [sys.executable, "-m", "llava.model", "inspect"]
    done = subprocess.run([*command, saved], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("  loadable\n")
    assert "kind            Hugging Face LLaVA\n" in done.stdout


def test_json_and_exit_code(saved, capsys):
    (saved / "tokenizer.model").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(saved), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert stopped.value.code == printed["exit_code"] == 2 and not printed["loadable"]
    assert printed["problems"][0]["text"].startswith("no tokenizer.model")
    assert printed["kind"] == "hf_llava" and printed["language_model"]["layers"] == 2
    with pytest.raises(SystemExit):
        main(["inspect", str(saved)])
    out = capsys.readouterr().out
    assert "  problem: no tokenizer.model" in out and "cannot be loaded (exit 2)" in out
