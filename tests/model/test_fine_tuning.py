"""Options of the towers on each form of open_clip's models: adapters, checkpointing, frozen layers, compiling."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

from drl_fast.model import fine_tuning
from drl_fast.model.clip import check_clip

pytestmark = pytest.mark.usefixtures("one_thread")
VISION = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
TEXT = {"layers": 2, "width": 32, "heads": 2, "context_length": 16, "vocab_size": 60}
# Paths of the blocks, their number, and the linear layers of one block.
FORMS = {
    "clip": {"visual.transformer.resblocks": (3, 4), "transformer.resblocks": (2, 4)},
    "coca": {"visual.transformer.resblocks": (3, 4), "text.transformer.resblocks": (2, 4)},
    "timm and hf": {"visual.trunk.blocks": (6, 4), "text.transformer.encoder.layer": (2, 6)},
}
# What stands before the blocks.
OF_IMAGE = {f"visual.{name}" for name in ("class_embedding", "positional_embedding", "conv1.weight")}
OF_IMAGE |= {"visual.ln_pre.weight", "visual.ln_pre.bias"}
TIMM = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
ROBERTA = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
BEFORE = {
    "clip": {*OF_IMAGE, "token_embedding.weight", "positional_embedding"},
    "coca": {*OF_IMAGE, "text.token_embedding.weight", "text.positional_embedding", "text.cls_emb"},
    "timm and hf": {f"visual.trunk.{name}" for name in TIMM}
    | {f"text.transformer.embeddings.{name}.weight" for name in ROBERTA}
    | {"text.transformer.embeddings.LayerNorm.bias"},
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """Build a small random model of each form."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("roberta")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60}
    transformers.RobertaConfig(hidden_size=32, max_position_embeddings=20, **sizes).save_pretrained(folder)
    timm = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    hf = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    pooled = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    multimodal = open_clip.coca_model.MultimodalCfg(width=32, heads=2, layers=1, context_length=16, vocab_size=60)
    found = {
        "clip": open_clip.CLIP(32, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT)),
        "coca": open_clip.CoCa(32, multimodal, open_clip.CLIPTextCfg(**text), open_clip.CLIPVisionCfg(**pooled)),
        "timm and hf": open_clip.CustomTextCLIP(32, {**timm, "timm_pool": "token"}, {**hf, "hf_proj_type": "linear"}),
    }
    return {name: check_clip(clip) for name, clip in found.items()}  # CoCa without its decoder, as in DRL


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def clip(forms: dict[str, nn.Module], form: str) -> nn.Module:
    return copy.deepcopy(forms[form]).eval()


def outputs(clip: nn.Module) -> Tensor:
    """Encode three pictures and three texts."""
    generator = torch.Generator().manual_seed(1)
    size = clip.visual.image_size[0]
    pictures = torch.rand(3, 3, size, size, generator=generator)
    ids = torch.randint(3, 58, (3, 15), generator=generator)
    return torch.cat([clip.encode_image(pictures), encode_text(clip, ids)])


def encode_text(clip: nn.Module, ids: Tensor) -> Tensor:
    """Encode ids of any length; open_clip.CLIP's own method wants its context's."""
    if not isinstance(clip, open_clip.CLIP):
        return clip.encode_text(ids)
    length = ids.shape[1]
    hidden = clip.token_embedding(ids) + clip.positional_embedding[:length]
    hidden = clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length])
    return clip.ln_final(hidden)[:, -1] @ clip.text_projection


def gradients(clip: nn.Module) -> dict[str, Tensor]:
    clip.zero_grad()
    outputs(clip).pow(3).sum().backward()  # squares of CoCa's unit vectors would always add up to 1
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


def trained(clip: nn.Module) -> set[str]:
    return {name for name, p in clip.named_parameters() if p.requires_grad}


def test_the_blocks_of_every_form_are_found(clip: nn.Module, form: str) -> None:
    found = fine_tuning.find_blocks(clip, "lora=8")
    assert {path: len(blocks) for path, blocks in found.items()} == {p: count for p, (count, _) in FORMS[form].items()}


def test_adapters_start_at_the_same_outputs_and_merge(clip: nn.Module, form: str) -> None:
    before, keys, kinds = outputs(clip), list(clip.state_dict()), [type(module) for module in clip.modules()]
    fine_tuning.add_adapters(clip, 4)
    torch.testing.assert_close(outputs(clip), before, rtol=1e-6, atol=1e-6)
    linear = sum(count * layers for count, layers in FORMS[form].values())
    names = trained(clip) - {"logit_scale"}
    assert len(names) == 2 * linear
    assert all(".lora_" in name for name in names)
    assert clip.logit_scale.requires_grad
    # B starts at 0, so all of A's gradients do; B's tell which adapters take part.
    assert all(bool(x.any()) for name, x in gradients(clip).items() if ".lora_B." in name)
    with torch.no_grad():
        for name in names:
            clip.get_parameter(name).add_(torch.randn(clip.get_parameter(name).shape), alpha=0.05)
    after = outputs(clip)
    assert not torch.allclose(after, before, atol=1e-3)
    model = nn.ModuleDict({"clip": clip})
    merged = fine_tuning.merge_adapters(model)["clip"]
    torch.testing.assert_close(outputs(merged), after, rtol=1e-5, atol=1e-5)
    assert list(merged.state_dict()) == keys
    assert [type(module) for module in merged.modules()] == kinds
    torch.testing.assert_close(outputs(clip), after, rtol=0, atol=0)


@pytest.mark.parametrize("masked", ["no mask", "causal", "one mask per row and head"])
def test_linear_attention_is_multihead_attention(masked: str) -> None:
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    linear, x = fine_tuning.LinearAttention(attention), torch.randn(3, 7, 32)
    mask = {"causal": torch.full((7, 7), -torch.inf).triu(1), "one mask per row and head": torch.randn(6, 7, 7)}
    options = {"need_weights": False, "attn_mask": mask.get(masked)}
    want = attention(x, x, x, **options)[0]
    torch.testing.assert_close(linear(x, x, x, **options)[0], want, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = (module(x, x, x, **options)[0] for module in (attention, linear))
    assert found.dtype == rounded.dtype == torch.bfloat16
    # In bf16 it is as far from float32 as torch's own is.
    assert (found - want).norm() <= 1.5 * (rounded - want).norm() <= 0.02 * want.norm()


def test_adapters_in_bf16(clip: nn.Module, form: str) -> None:
    """A model scores with its adapters merged as it does with them apart, up to bf16's rounding."""
    fine_tuning.add_adapters(clip, 4)
    with torch.no_grad():
        for name, p in clip.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.1)
    want = outputs(clip)
    merged = fine_tuning.merge_adapters(nn.ModuleDict({"clip": clip}))["clip"]
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(clip)
        for model in (clip, merged):
            torch.testing.assert_close(outputs(model).float(), want, rtol=0, atol=0.02 * want.abs().max().item())
    expected = gradients(clip)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == torch.float32
        assert (x - expected[name]).norm() <= 0.1 * expected[name].norm(), name


def test_adapters_of_evas_attention_take_part(forms: dict[str, nn.Module]) -> None:
    """EVA01 and EVA02-E add the bias of queries and values by themselves."""
    clip = copy.deepcopy(forms["timm and hf"]).eval()
    sizes = {"img_size": 160, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "depth": 2}
    clip.visual.trunk = timm.create_model("eva_giant_patch14_224", num_classes=0, **sizes).eval()
    for block in clip.visual.trunk.blocks:
        nn.init.normal_(block.attn.q_bias)
    before = outputs(clip)
    fine_tuning.add_adapters(clip, 2)
    torch.testing.assert_close(outputs(clip), before, rtol=1e-6, atol=1e-6)
    found = {name: x for name, x in gradients(clip).items() if ".lora_B." in name and name.startswith("visual.")}
    assert len(found) == 2 * 4
    assert all(bool(x.any()) for x in found.values())


def test_checkpointing_changes_no_gradient(clip: nn.Module, form: str) -> None:
    clip.train()  # Hugging Face's towers checkpoint in training alone; dropout draws the same numbers twice
    calls: list[nn.Module] = []
    for blocks in fine_tuning.find_blocks(clip, "").values():
        blocks[-1].register_forward_pre_hook(lambda module, inputs: calls.append(module))
        # A layer that Hugging Face checkpoints calls its own hooks once.
        next(m for m in blocks[-1].modules() if isinstance(m, nn.LayerNorm)).register_forward_pre_hook(
            lambda module, inputs: calls.append(module)
        )
    torch.manual_seed(2)
    want, once = {name: x.clone() for name, x in gradients(clip).items()}, len(calls)
    fine_tuning.checkpoint_towers(clip)
    torch.manual_seed(2)
    got = gradients(clip)
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-6, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}")
    assert len(calls) - once >= once + len(FORMS[form])


def test_frozen_layers_and_all_before_them_take_no_part(clip: nn.Module, form: str) -> None:
    edges: list[bool] = []
    for blocks in fine_tuning.find_blocks(clip, "").values():
        for block in blocks[:2]:
            block.register_forward_pre_hook(lambda module, inputs: edges.append(inputs[0].requires_grad))
    taking_part = set(gradients(clip))
    edges.clear()
    fine_tuning.freeze_layers(clip, 1)
    assert set(gradients(clip)) == taking_part & trained(clip)
    assert edges == [False] * 4
    paths = FORMS[form]
    frozen = taking_part - trained(clip)
    assert {name for name in frozen if not name.startswith(tuple(f"{path}.0." for path in paths))} == BEFORE[form]
    assert not any(name in trained(clip) for path in paths for name in taking_part if name.startswith(f"{path}.0."))
    assert clip.logit_scale.requires_grad
    most = min(count for count, _ in paths.values())
    with pytest.raises(ValueError, match=f"freeze_layers must be at most {most}, .* got 7"):
        fine_tuning.freeze_layers(clip, 7)


def test_towers_without_blocks_are_refused_by_name() -> None:
    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32)
    clip = open_clip.CLIP(32, vision, open_clip.CLIPTextCfg(**TEXT))
    with pytest.raises(ValueError, match=r"checkpoint_towers must be false .* image tower, ModifiedResNet, has no"):
        fine_tuning.checkpoint_towers(clip)
    with pytest.raises(ValueError, match=r"transformer blocks with lora=8, got ModifiedResNet as image tower"):
        fine_tuning.add_adapters(clip, 8)


def test_a_rank_above_the_layers_width(clip: nn.Module) -> None:
    with pytest.raises(ValueError, match="lora must be at most 32, the width of the narrower tower's layers, got 33"):
        fine_tuning.add_adapters(clip, 33)


def test_adapters_without_peft(forms: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora must be 0 without .* pip install 'drl-fast\[lora\]'"):
        fine_tuning.add_adapters(forms["clip"], 8)


def test_no_later_step_compiles_again(clip: nn.Module, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers of pictures and texts, one of each included, and the texts' length."""
    # Without code generation, which takes minutes for all forms; test_train.py generates code. One form traces its
    # backward, too; the others have the same operations.
    backend = "aot_eager" if form == "clip" else "eager"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    if form == "clip":
        fine_tuning.add_adapters(clip, 2)
    eager = copy.deepcopy(clip)
    torch.compiler.reset()
    fine_tuning.compile_towers(clip, torch.device("cpu"))
    assert clip.state_dict().keys() == eager.state_dict().keys()
    size, graphs = clip.visual.image_size[0], []
    fewest = 2 if form == "timm and hf" else 1  # a single picture is compiled by itself in timm's blocks
    for pictures, texts, length in ((3, 5, 8), (4, 2, 16), (fewest, 1, 16), (5, 1, 8), (8, 8, 8)):
        frames, ids = torch.rand(pictures, 3, size, size), torch.randint(3, 58, (texts, length))
        if form == "coca":  # its context, or its end token would be elsewhere
            ids = nn.functional.pad(ids, (0, 16 - length))[:, :15]
        found, want = ([m.encode_image(frames), encode_text(m, ids)] for m in (clip, eager))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        torch.cat(found).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 5
    with torch.no_grad():
        torch.testing.assert_close(outputs(clip), outputs(eager), rtol=1e-5, atol=1e-5)
    # They hold no compiled code.
    copied = pickle.loads(pickle.dumps(clip))
    assert all(module._compiled_call_impl is None for module in copied.modules())


def test_a_machine_without_a_compiler(forms: dict[str, nn.Module], tmp_path: Path) -> None:
    message = r"^compile must be false on a machine where torch.compile fails \(.*\), got true"
    none = {"cpp.cxx": (str(tmp_path / "none"),), "force_disable_caches": True}
    torch.compiler.reset()
    with torch._inductor.config.patch(none), pytest.raises(ValueError, match=message):
        fine_tuning.compile_towers(copy.deepcopy(forms["clip"]), torch.device("cpu"))
