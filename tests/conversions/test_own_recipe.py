"""The worked example of docs/recipes.md: one small file, judged by diffusers' own converter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from diffusers.loaders.single_file_utils import convert_auraflow_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from porter.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
CONFIG = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 3,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
    "out_channels": 4, "pos_embed_max_size": 9,
}  # fmt: skip


def originals() -> dict[str, torch.Tensor]:
    """AuraFlow's original names at tiny size, every element distinct; its tables stand in the family's layouts.json."""
    h, ff = 16, 256
    shapes: dict[str, tuple[int, ...]] = {
        "register_tokens": (1, 8, h), "positional_encoding": (1, 9, h), "init_x_linear.weight": (h, 16),
        "init_x_linear.bias": (h,), "t_embedder.mlp.0.weight": (h, 256), "t_embedder.mlp.0.bias": (h,),
        "t_embedder.mlp.2.weight": (h, h), "t_embedder.mlp.2.bias": (h,), "cond_seq_linear.weight": (h, 12),
        "modF.1.weight": (2 * h, h), "final_linear.weight": (16, h),
    }  # fmt: skip
    mlp = {"c_fc1": (ff, h), "c_fc2": (ff, h), "c_proj": (h, ff)}
    for i in range(2):
        shapes |= {f"double_layers.{i}.mod{s}.1.weight": (6 * h, h) for s in "CX"}
        shapes |= {f"double_layers.{i}.attn.w{k}{x}.weight": (h, h) for k in "12" for x in "qkvo"}
        shapes |= {f"double_layers.{i}.mlp{s}.{name}.weight": shape for s in "CX" for name, shape in mlp.items()}
    for i in range(3):
        shapes |= {f"single_layers.{i}.modCX.1.weight": (6 * h, h)}
        shapes |= {f"single_layers.{i}.attn.w1{x}.weight": (h, h) for x in "qkvo"}
        shapes |= {f"single_layers.{i}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    start, made = 0, {}
    for name, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        made[name] = torch.arange(start, start + count, dtype=torch.float32).reshape(shape)
        start += count
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert code
    (tmp_path / "auraflow.py").write_text(code[1])
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AuraFlowTransformer2DModel", **CONFIG}))
    save_file(originals(), tmp_path / "aura_flow.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_worked_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in re.findall(r"^ {4}porter (.*)$", PAGE.read_text("utf-8"), re.MULTILINE):
        assert main(line.split()) == 0, line
    said = capsys.readouterr().out
    assert "AuraFlowTransformer2DModel loads it strictly" in said
    ours = load_file(folder / "aura-port" / "transformer" / "diffusion_pytorch_model.safetensors")
    theirs = convert_auraflow_transformer_checkpoint_to_diffusers(originals())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    back = load_file(next((folder / "back").glob("*.safetensors")))
    assert back.keys() == originals().keys() and all(torch.equal(back[n], t) for n, t in originals().items())


def test_the_example_cannot_lose_a_tensor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without headers the rules alone still claim every source; the strict load sees what they do not make."""
    text = (folder / "auraflow.py").read_text()
    (folder / "auraflow.py").write_text(text.replace('        Rule("register_tokens", "register_tokens"),\n', ""))
    line = ["convert", "aura_flow.safetensors", "--recipe", "auraflow.py", "--component", "transformer"]
    line += ["--config", "config.json", "-o", "p"]
    assert main(line) == 6 and "register_tokens" in capsys.readouterr().err
    assert not (folder / "p").exists()
    save_file({n: t for n, t in originals().items() if n != "register_tokens"}, folder / "aura_flow.safetensors")
    assert main([*line, "--dry-run"]) == 0 and "not checked: which tensors" in capsys.readouterr().out
    assert main([*line, "--verify"]) == 1 and "register_tokens" in capsys.readouterr().err
    assert not (folder / "p").exists()


def test_the_class_is_the_real_one() -> None:
    with torch.device("meta"):
        names = AuraFlowTransformer2DModel(**CONFIG).state_dict().keys()
    assert len(names) == len(convert_auraflow_transformer_checkpoint_to_diffusers(originals()))


@pytest.mark.usefixtures("folder")
def test_without_it_the_layout_is_named_and_the_page_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "aura_flow.safetensors", "-o", "p"]) == 6
    said = capsys.readouterr().err
    assert "original layout of AuraFlow" in said and "--recipe FILE.py" in said and "docs/recipes.md" in said


def test_the_made_up_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    Path("own.py").write_text(code)
    h, n, heads, experts = 8, 2, 2, 3
    Path("c.json").write_text(json.dumps({"h": h, "n": n, "heads": heads, "experts": experts}))
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (4, h), "rope.freqs": (4,), "out.weight": (6, h)}
    shapes["out.gate"] = (6,)
    rows = {"qkv": 3 * h, "gate": 12, "up": 12, "mod": 2 * h, "inner": 3 * h, "down": 5}
    for i in range(n):
        shapes |= {f"b.{i}.{name}.weight": (count, h) for name, count in rows.items()}
        shapes |= {f"b.{i}.experts.{j}.weight": (4, h) for j in range(experts)} | {f"b.{i}.mod.bias": (2 * h,)}
    drawn = torch.Generator().manual_seed(0)
    there = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    save_file(there, "made_up.safetensors")
    line = ["convert", "made_up.safetensors", "--recipe", "own.py", "--component", "transformer"]
    assert main([*line, "--config", "c.json", "-o", "port"]) == 0
    made = load_file("port/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(made["blocks.1.k.weight"], there["b.1.qkv.weight"][h : 2 * h])
    inner = there["b.0.inner.weight"].unflatten(0, (heads, 3, h // heads)).transpose(0, 1).flatten(0, 2)
    assert torch.equal(made["blocks.0.inner.weight"], inner)
    assert torch.equal(made["blocks.0.experts"][2], there["b.0.experts.2.weight"]) and made["scale"].tolist() == [1.0]
    assert torch.equal(made["blocks.1.shared.weight"], there["shared.weight"]) and "rope.freqs" not in made
    assert torch.equal(made["out.weight"], there["out.weight"] * there["out.gate"][:, None])
    back = ["convert", "port", "--to", "original", "--recipe", "own.py", "-o", "back"]
    assert main(back) == 6 and "it drops rope.freqs; it folds 2 tensors" in capsys.readouterr().err
    assert main([*back, "--base", "made_up.safetensors"]) == 0
    found = load_file("back/made_up.safetensors")
    assert found.keys() == there.keys() and all(torch.equal(found[name], tensor) for name, tensor in there.items())


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("raise SystemExit(0)", 2, "SystemExit"),
        ("import sys; sys.exit('bye')", 2, "bye"),
        ("1 / 0", 2, "ZeroDivisionError"),
        ("RECIPE = Recipe('mine', 'a', 'b', RULES, infer_config=lambda header, config: 1 / 0)", 6, "ZeroDivisionError"),
        ("RECIPE = Recipe('mine', 'a', 'b', RULES, infer_config=lambda header, config: None)", 6, "TypeError"),
        ("RECIPE = Recipe('mine', 'a', 'b', RULES, infer_config=lambda header, config: exit(0))", 6, "SystemExit"),
        ("RECIPE = Recipe('mine', 'a', 'b', RULES, target_headers=lambda config, dtype='*': 5)", 6, "TypeError"),
        ("RECIPE = Recipe('mine', 'a', 'b', (3,))", 6, "AttributeError"),
    ],
)
def test_a_recipe_file_that_breaks_is_named(
    text: str, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above all one that exits: the command must not end as if it had worked."""
    file = tmp_path / "mine.py"
    file.write_text(f"from porter.core.recipe import Recipe, Rule\nRULES = (Rule('x', 'y'),)\n{text}\n")
    arguments = ["convert", "builtin:tiny-flux", "--component", "transformer", "--recipe", str(file)]
    assert main([*arguments, "-o", str(tmp_path / "p")]) == code
    told = capsys.readouterr().err
    assert words in told and "does not run" in told and "next:" in told and "internal error" not in told
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]
