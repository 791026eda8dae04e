"""The whole model against the public code: recorded state dicts, features, logits, losses and gradients."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("open_clip")
import open_clip
import safetensors
import safetensors.torch

import drl_fast
from drl_fast import reference
from drl_fast.model import checkpoint, towers
from drl_fast.model.config import Config, Inputs
from drl_fast.model.small import small_model

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
CASES = sorted(GOLDEN.glob("*.npz"))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with np.load(path) as file:
        return {k: torch.from_numpy(file[k].copy()) for k in file.files if k != "meta"}, json.loads(str(file["meta"]))


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@pytest.fixture(params=CASES, ids=lambda p: p.stem)
def case(request: pytest.FixtureRequest) -> tuple[drl_fast.DRL, dict[str, Tensor], dict[str, Any]]:
    arrays, meta = load(request.param)
    model = drl_fast.DRL.from_upstream(part(arrays, "state."), **meta)
    return model.eval(), arrays, meta


def close(ours: Tensor, recorded: Tensor, mask: Tensor | None = None, tolerance: float = 2e-5) -> None:
    if mask is not None:
        ours, recorded = ours[mask != 0], recorded[mask != 0]
    scale = max(1.0, float(recorded.abs().max()))
    assert float((ours.detach() - recorded).abs().max()) <= tolerance * scale


def batch(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: arrays[k] for k in ("text_ids", "text_mask", "video", "video_mask")}


def test_there_are_cases() -> None:
    assert len(CASES) >= 3


def test_features_and_logits(case: tuple[drl_fast.DRL, dict[str, Tensor], dict[str, Any]]) -> None:
    model, arrays, _ = case
    with torch.no_grad():
        text, text_mask = model.encode_text(arrays["text_ids"])
        video = model.encode_video(arrays["video"], arrays["video_mask"])
        logits = model.similarity(text, video, text_mask, arrays["video_mask"])
    assert torch.equal(text_mask, arrays["text_mask"] != 0)
    close(text, arrays["text_feat"], arrays["text_mask"])
    close(video, arrays["video_feat"], arrays["video_mask"])
    close(logits, arrays["eval_logits"])


def test_loss_and_gradients(case: tuple[drl_fast.DRL, dict[str, Tensor], dict[str, Any]]) -> None:
    model, arrays, _ = case
    if "train_loss" not in arrays:
        pytest.skip("dropout: upstream recorded no loss")
    losses = model.train()(batch(arrays))
    close(losses["total"], arrays["train_loss"])
    losses["total"].backward()
    parameters = dict(model.named_parameters())
    for name, recorded in part(arrays, "grad.").items():
        grad = parameters[checkpoint.to_ours(name)].grad
        assert float((grad - recorded).abs().max()) <= 3e-4 * float(recorded.abs().max())


def test_cdcr_ignores_padding_by_default() -> None:
    """In the recorded batch all similarities are negative, so in the public code padding wins every match."""
    arrays, meta = load(GOLDEN / "model_wti_seqtransf.npz")
    state, inputs = part(arrays, "state."), batch(arrays)
    upstream = drl_fast.DRL.from_upstream(state, **meta)(inputs)
    model = drl_fast.DRL.from_upstream(state, **meta, cdcr_padding="never")
    ours = model(inputs)
    assert torch.equal(ours["info_nce"], upstream["info_nce"])
    assert abs(float(ours["cdcr"] - upstream["cdcr"])) > 0.1
    text, mask = model.encode_text(inputs["text_ids"])
    video = model.encode_video(inputs["video"], inputs["video_mask"])
    weights = model.interaction.weights(text, video, mask, inputs["video_mask"])
    alphas = {"alpha_on": meta["cdcr_alpha1"], "alpha_off": meta["cdcr_alpha2"]}
    want = reference.cdcr_loss(text, video, *weights, mask, inputs["video_mask"], **alphas)
    torch.testing.assert_close(ours["cdcr"], want, rtol=1e-5, atol=0)
    inputs["video"][inputs["video_mask"] == 0] = float("nan")
    assert model(inputs)["total"].isfinite()


def test_fresh_modules_start_as_upstream_does(case: tuple[drl_fast.DRL, dict[str, Tensor], dict[str, Any]]) -> None:
    """Blocks and positions come from CLIP; random weights have the same distribution as upstream's."""
    _, arrays, meta = case
    options = {checkpoint.OPTIONS.get(k, k): v for k, v in meta.items() if k not in ("patch", "image_size")}
    options["temporal"] = None if options["temporal"] == "None" else options["temporal"]
    torch.manual_seed(0)
    fresh = drl_fast.DRL.from_clip_state_dict(part(arrays, "state.clip."), **options).to_upstream()
    for name, recorded in part(arrays, "fresh.").items():
        if "pooler.dense.weight" in name:
            assert fresh[name].std() == pytest.approx(float(recorded.std()), rel=0.1)
        else:
            assert torch.equal(fresh[name], recorded), name


def test_round_trips(case: tuple[drl_fast.DRL, dict[str, Tensor], dict[str, Any]], tmp_path: Path) -> None:
    model, arrays, _ = case
    state = part(arrays, "state.")
    back = model.to_upstream()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], x) for name, x in state.items())
    model.save_pretrained(tmp_path / "model")
    again = drl_fast.DRL.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_options_are_inferred_from_the_checkpoint() -> None:
    arrays, _ = load(GOLDEN / "model_wti_seqtransf.npz")
    state = {f"module.{k}": v for k, v in part(arrays, "state.").items()}
    model = drl_fast.DRL.from_upstream({"model_state_dict": state})
    assert (model.config.interaction, model.config.temporal, model.config.wti_arch) == ("wti", "seqTransf", 2)


def test_a_clip4clip_checkpoint_loads_as_dp() -> None:
    """It has CLIP and, with seqTransf, positions and blocks, but no weight heads."""
    arrays, _ = load(GOLDEN / "model_wti_seqtransf.npz")
    state = {k: v for k, v in part(arrays, "state.").items() if "weight_fc" not in k}
    assert drl_fast.DRL.from_upstream(state).config == Config("dp", "seqTransf", cdcr_padding="competes")
    mean_pooling = {k: v for k, v in state.items() if k.startswith("clip.")}
    mean_pooling |= {"clip.context_length": torch.tensor(16), "clip.vocab_size": torch.tensor(60)}
    model = drl_fast.DRL.from_upstream({k: v.half() if v.is_floating_point() else v for k, v in mean_pooling.items()})
    assert (model.config.interaction, model.config.temporal) == ("dp", None)
    assert model.clip.visual.proj.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda s: s.pop("clip.visual.proj"), {}, ["visual.proj"]),
        (lambda s: s.pop("text_weight_fc.2.bias"), {}, ["no interaction.text_weight_fc.2.bias"]),
        (lambda s: s.update({"spare.weight": torch.zeros(3)}), {}, ["unexpected spare.weight"]),
        (lambda s: s.update({"video_weight_fc.0.bias": torch.zeros(3)}), {}, ["video_weight_fc.0.bias", "(3,)"]),
        (lambda s: None, {"interaction": "ti"}, ["unexpected interaction.text_weight_fc.0.weight"]),
        (lambda s: None, {"temporal": None, "cdcr": 0}, ["unexpected temporal.transformer.resblocks.0"]),
        (lambda s: None, {"interaction": "wtii"}, ["interaction must be one of", "wtii"]),
        (lambda s: None, {"agg_module": "tightTransf"}, ["temporal must be one of", "tightTransf"]),
        (lambda s: None, {"interaction": "dp", "cdcr": 3}, ["cdcr must be 0, 1 or 2"]),
        (lambda s: None, {"patch": 16}, ["patch must be the state's own, 8, got 16"]),
        (lambda s: s.update({"clip.visual.proj": torch.zeros(60, 64)}), {}, ["visual.proj", "(60, 64)"]),
    ],
)
def test_a_checkpoint_that_does_not_fit(change: Any, options: dict[str, Any], words: list[str]) -> None:
    arrays, _ = load(GOLDEN / "model_wti_seqtransf.npz")
    state = part(arrays, "state.")
    change(state)
    with pytest.raises(ValueError) as caught:
        drl_fast.DRL.from_upstream(state, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_files(tmp_path: Path) -> None:
    arrays, _ = load(GOLDEN / "model_dp_seqlstm.npz")
    torch.save(part(arrays, "state."), tmp_path / "good.bin")
    assert drl_fast.DRL.from_upstream(tmp_path / "good.bin").config.temporal == "seqLSTM"
    torch.save({"state": Path}, tmp_path / "code.bin")  # a pickle that names a class
    alone = {name.removeprefix("clip."): x for name, x in part(arrays, "state.").items() if name.startswith("clip.")}
    torch.save(alone, tmp_path / "clip.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "good.bin").read_bytes()[:5000])
    for name, words in (
        ("code.bin", "tensors alone"),
        ("cut.bin", "could not be read"),
        ("clip.bin", "got a CLIP alone, .*pass the file as pretrained"),
        ("none.bin", "file not found"),
    ):
        with pytest.raises(ValueError, match=words):
            drl_fast.DRL.from_upstream(tmp_path / name)
    with pytest.raises(ValueError, match=r"must hold model\.safetensors, .*; found neither"):
        drl_fast.DRL.from_pretrained(tmp_path)
    model = drl_fast.DRL.from_upstream(tmp_path / "good.bin")
    model.save_pretrained(tmp_path / "out")
    whole = (tmp_path / "out/model.safetensors").read_bytes()
    (tmp_path / "out/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="whole safetensors file"):
        drl_fast.DRL.from_pretrained(tmp_path / "out")


def test_errors_about_files_do_not_repeat_torchs_advice(tmp_path: Path) -> None:
    """torch suggests weights_only=False, which would run code from the file."""
    torch.save({"arguments": argparse.Namespace(lr=1)}, tmp_path / "run.bin")
    with pytest.raises(ValueError, match=r"holds Python objects \(argparse\.Namespace\)") as caught:
        drl_fast.DRL.from_upstream(tmp_path / "run.bin")
    assert "weights_only" not in str(caught.value)


def test_models_from_files_are_in_evaluation_mode(tmp_path: Path) -> None:
    arrays, _ = load(GOLDEN / "model_dp_seqlstm.npz")
    model = drl_fast.DRL.from_upstream(part(arrays, "state."))
    model.train().save_pretrained(tmp_path)
    for read in (drl_fast.DRL.from_upstream(part(arrays, "state.")), drl_fast.DRL.from_pretrained(tmp_path)):
        assert not any(module.training for module in read.modules())


def test_a_saved_model_describes_its_inputs(tmp_path: Path) -> None:
    model = drl_fast.DRL("drl-small", interaction="ti", temporal=None)
    assert model.inputs is None
    model.inputs = Inputs(max_words=16, rate=2.0, max_frames=5, seconds=30.0)
    model.save_pretrained(tmp_path)
    again = drl_fast.DRL.from_pretrained(tmp_path)
    assert again.inputs == model.inputs
    assert again.tokenizer()(["a dog"], context_length=9).shape == (1, 9)


@pytest.mark.parametrize("interaction", ["ti", "wti"])
def test_similarity_returns_matches(interaction: str) -> None:
    torch.manual_seed(0)
    model = drl_fast.DRL("drl-small", interaction=interaction, temporal=None).eval()
    text, video = torch.randn(2, 4, model.dim), torch.randn(3, 5, model.dim)
    with torch.no_grad():
        scores, matches = model.similarity(text, video, return_matches=True)
        torch.testing.assert_close(scores, model.similarity(text, video))
    unit = torch.nn.functional.normalize
    cosine = torch.einsum("atd,bvd->abtv", unit(text, dim=-1), unit(video, dim=-1))
    assert torch.equal(matches.video_index, cosine.argmax(dim=3))
    assert torch.equal(matches.text_index, cosine.argmax(dim=2))
    with pytest.raises(ValueError, match=r"return_matches must be False with interaction='dp'.*use 'ti' or 'wti'"):
        drl_fast.DRL("drl-small", interaction="dp", temporal=None).similarity(text, video, return_matches=True)


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": (1, 1, 1, 1), "width": 32, "image_size": 64},
        {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    ],
    ids=["OpenAI's residual network", "timm"],
)
def test_other_image_towers_with_clips_text_tower(vision: dict[str, Any]) -> None:
    """They also return one vector per frame."""
    clip = open_clip.CLIP(64, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(width=64, heads=1, layers=1))
    model = drl_fast.DRL(clip, interaction="dp", temporal=None).eval()
    frames = torch.zeros(2, 3, 3, *model.picture_size, dtype=torch.uint8)
    with torch.no_grad():
        assert model.encode_video(frames, None).shape == (2, 3, model.dim)


def test_malformed_folders_end_in_a_value_error(tmp_path: Path) -> None:
    """The error names the file or the folder, and nothing is downloaded."""
    drl_fast.DRL("drl-small", temporal=None).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        good, digest = json.loads(file.metadata()["config"]), file.metadata()["digest"]
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def without(name: str) -> dict[str, Any]:
        return {key: value for key, value in good.items() if key != name}

    for bad in (
        without("clip"),
        without("quick_gelu"),
        without("format"),
        "words",
        [],
        {**good, "clip": 5},
        {**good, "clip": "nonsense"},
        {**good, "clip": "hf-hub:timm/vit_base_patch32_clip_224.openai"},
        {**good, "clip": "local-dir:/tmp"},
        {**good, "quick_gelu": "yes"},
        {**good, "mean": [0.5]},
        {**good, "mean": "half"},
        {**good, "mean": [0.5, 0.5, float("nan")]},
        {**good, "std": [0.0, 0.1, 0.1]},
        {**good, "cdcr": True},
        {**good, "cdcr_weight": float("nan")},
        {**good, "interaction": "ti", "wti_arch": "two"},
        {**good, "interaction": ["wti"]},
        {**good, "wti_arch": "two"},
        {**good, "new_option": 1},
        {**good, "inputs": {"rate": 1}},
        {**good, "inputs": {"rate": 0, "max_words": 3, "max_frames": 2, "seconds": None}},
        {**good, "inputs": 7},
    ):
        safetensors.torch.save_file(state, path, {"config": json.dumps(bad), "digest": digest})
        with pytest.raises(ValueError, match=str(tmp_path)):
            drl_fast.DRL.from_pretrained(tmp_path)
    safetensors.torch.save_file(state, path, {"config": json.dumps(good), "digest": digest})
    assert drl_fast.DRL.from_pretrained(tmp_path).config == Config("wti", None)
    safetensors.torch.save_file(state, path, {"config": "{" * 100_000})
    with pytest.raises(ValueError, match=str(path)):
        drl_fast.DRL.from_pretrained(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In a saved folder and in a file of torch.save."""
    model = drl_fast.DRL("drl-small", temporal=None)
    model.save_pretrained(tmp_path)
    torch.save(drl_fast.DRL.from_pretrained(tmp_path).to_upstream(), tmp_path / "public.bin")
    needle = model.state_dict()["clip.token_embedding.weight"][1000].numpy().tobytes()
    for path, read in (
        (tmp_path / "model.safetensors", lambda: drl_fast.DRL.from_pretrained(tmp_path)),
        (tmp_path / "public.bin", lambda: drl_fast.DRL.from_upstream(tmp_path / "public.bin")),
    ):
        content = bytearray(path.read_bytes())
        content[content.index(needle) + 3] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            read()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(torch.int32),
        lambda x: x.to(torch.complex64),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: x[0],
        lambda x: x.sum(),
    ],
)
@pytest.mark.parametrize("name", ["clip.visual.conv1.weight", "clip.ln_final.weight", "clip.text_projection"])
def test_entries_that_are_no_weights(change: Any, name: str) -> None:
    arrays, _ = load(GOLDEN / "model_wti_seqtransf.npz")
    state = part(arrays, "state.")
    state[name] = change(state[name])
    with pytest.raises(ValueError, match="state must"):
        drl_fast.DRL.from_upstream(state)


@pytest.mark.parametrize("state", [{0: torch.zeros(1)}, {"clip.visual.proj": 3}, [torch.zeros(1)]])
def test_a_state_that_does_not_map_names_to_tensors(state: Any) -> None:
    with pytest.raises(ValueError, match="state must map names to tensors, got"):
        drl_fast.DRL.from_upstream(state)


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, _ = load(GOLDEN / "model_dp_seqlstm.npz")
    model = drl_fast.DRL.from_upstream(part(arrays, "state."))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(state: object, file: str, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


# Inputs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> drl_fast.DRL:
    return small_model(32, 16, seed=0)[0].eval()


def test_captions_grouped_by_length_give_the_same_tokens(small: drl_fast.DRL) -> None:
    """The text tower runs on groups of equal length."""
    ids = torch.zeros(9, 16, dtype=torch.int64)
    for row, end in enumerate((3, 15, 1, 8, 7, 9, 3, 12, 0)):
        ids[row, : end + 1] = torch.arange(1, end + 2)
        ids[row, end] = 49407
    tokens, mask = small.encode_text(ids)
    whole = towers.hidden_states(small.clip, ids)
    torch.testing.assert_close(tokens[mask], whole[mask], rtol=1e-4, atol=1e-5)
    assert mask.sum(1).tolist() == [4, 16, 2, 9, 8, 10, 4, 13, 1]
    assert (tokens[~mask] == 0).all()
    assert small.encode_text(ids[:0])[0].shape == (0, 16, 128)


def test_long_captions_are_cut_and_counted(small: drl_fast.DRL) -> None:
    ids = torch.arange(1, 31).repeat(3, 1)
    ids[0, 20] = ids[1, 10] = ids[2, 29] = 49407
    with pytest.warns(RuntimeWarning, match="2 of 3 captions are longer than the CLIP's context of 16"):
        tokens, mask = small.encode_text(ids)
    assert tokens.shape == (3, 16, 128)
    assert mask.sum(1).tolist() == [16, 11, 16]
    same = ids[:, :16].clone()
    same[[0, 2], -1] = 49407
    torch.testing.assert_close(tokens, small.encode_text(same)[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.encode_text([1, 2]), ValueError, r"ids must be \(A, Nt\) token ids, got list"),
        (lambda m: m.encode_text(torch.zeros(2, 3)), TypeError, "ids must be integers"),
        (lambda m: m.encode_text(torch.full((2, 3), 60000)), ValueError, r"ids must lie in 0\.\.49407"),
        (lambda m: m.encode_video(torch.zeros(2, 3, 3, 31, 32)), ValueError, r"frames must be \(B, Nv, 3, 32, 32\)"),
        (lambda m: m.encode_video(torch.zeros(2, 3, 32, 32)), ValueError, "frames must be"),
        (lambda m: m.encode_video(torch.zeros(2, 0, 3, 32, 32)), ValueError, "frames must hold at least one frame a v"),
        (lambda m: m.encode_video(torch.zeros(2, 3, 3, 32, 32).int()), TypeError, "frames must be uint8"),
        (lambda m: m.encode_video(torch.zeros(2, 3, 3, 32, 32), torch.ones(2, 4)), ValueError, "mask must be .*2, 3"),
        (lambda m: m({"text_ids": torch.ones(2, 4).long()}), ValueError, "batch must hold 'video', got 'text_ids'"),
        (
            lambda m: m(torch.ones(2, 4).long()),
            TypeError,
            "batch must be a dict with 'text_ids' and 'video', got a t",
        ),
        (lambda m: drl_fast.DRL(m.clip, temporal="lstm"), ValueError, "temporal must be one of None"),
        (lambda m: drl_fast.DRL(m.clip, interaction="max"), ValueError, "interaction must be one of"),
        (lambda m: drl_fast.DRL(m.clip, cdcr=4), ValueError, "cdcr must be one of"),
        (lambda m: drl_fast.DRL("ViT-B-33"), ValueError, "nearest: ViT-B-32"),
    ],
)
def test_bad_input(small: drl_fast.DRL, call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(small)


@pytest.mark.parametrize(
    ("temporal", "interaction"),
    [
        (temporal, interaction)
        for temporal in (None, "seqLSTM", "seqTransf")
        for interaction in sorted(drl_fast.modules.INTERACTIONS)
        if temporal is None or interaction != "mean_maxsim"
    ],
)
def test_every_interaction_trains(small: drl_fast.DRL, interaction: str, temporal: str | None, tmp_path: Path) -> None:
    cdcr = {"dp": 1, "ti": 2, "wti": 3}.get(interaction, 0)
    model = drl_fast.DRL(small.clip, interaction=interaction, temporal=temporal, cdcr=cdcr, cdcr_alpha_off=0.01)
    ids = torch.tensor([[5, 49407, 0, 0], [5, 6, 7, 49407], [9, 8, 49407, 0]])
    inputs = {
        "text_ids": ids,
        "video": torch.rand(3, 4, 3, 32, 32),
        "video_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]]),
    }
    losses = model(inputs)
    assert losses.keys() == {"total", "info_nce", "cdcr"}
    losses["total"].backward()
    small.zero_grad()
    still = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None and "clip." not in name]
    assert still == []
    assert (float(losses["cdcr"]) > 0) == (cdcr > 0)
    owned = model({**inputs, "owner": torch.tensor([0, 0, 1])})
    assert owned["info_nce"] < losses["info_nce"]


def test_a_clip_that_cannot_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    """Rebuilt from its weights it would have another number of heads, and silently other scores."""
    model, _ = small_model(32, 16, seed=0)
    with pytest.raises(
        ValueError, match="clip must have an open_clip name, or OpenAI's form with heads 64 wide and QuickGELU"
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
