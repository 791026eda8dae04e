"""Video-ColBERT's row: query expansion, what it may be combined with, and models that are saved, joined and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import drl_fast
from drl_fast.model import towers
from drl_fast.model.config import Config
from drl_fast.model.head import Head
from tests.modules.test_mean_maxsim import assert_same, plain, plain_dual_loss, plain_levels

from ..engine.runs import tower

pytestmark = pytest.mark.usefixtures("one_thread")
ROW: dict[str, Any] = {"interaction": "mean_maxsim", "temporal": None, "query_expansion": True, "loss": "sigmoid"}
END = 59


def model_of(**options: Any) -> drl_fast.DRL:
    torch.manual_seed(0)
    return drl_fast.DRL(tower(), **{**ROW, **options}).eval()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.tensor(
        [[58, 4, END, 0, 0, 0, 0, 0, 0, 0], [58, 5, 6, 7, 8, 9, 1, 2, 3, END], [58, 4, 9, END, *[0] * 6]]
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]])
    return {"text_ids": ids, "video": torch.rand(3, 4, 3, 32, 32), "video_mask": mask}


def test_padding_counts_as_words() -> None:
    model, ids = model_of(), batch()["text_ids"]
    plain_model = model_of(query_expansion=False)
    tokens, mask = model.encode_text(ids)
    assert mask.all()
    torch.testing.assert_close(tokens, towers.hidden_states(model.clip, ids))
    words, real = plain_model.encode_text(ids)
    assert real.sum(1).tolist() == [3, 10, 4]
    torch.testing.assert_close(tokens[real], words[real])
    assert tokens[~real].abs().amax(dim=1).min() > 1e-3  # the tower encodes padding
    assert (tokens[0, 3:] - tokens[2, 3:]).abs().max() > 1e-3  # which attends to the words before it


def test_ids_after_the_end_token_are_padding() -> None:
    model, ids = model_of(), batch()["text_ids"]
    other = ids.clone()
    other[0, 4:] = 7
    assert torch.equal(model.encode_text(other)[0], model.encode_text(ids)[0])
    assert model.encode_text(ids[:0])[0].shape == (0, 10, 32)


def test_scores_are_the_papers() -> None:
    model = model_of().double()
    tokens = model.encode({name: x.double() if name == "video" else x for name, x in batch().items()})
    want = plain(model.interaction, *tokens)
    torch.testing.assert_close(model.similarity(*tokens), want, atol=1e-12, rtol=0)


def test_the_loss_is_the_papers() -> None:
    model, found = model_of().double(), []
    assert (model.logit_scale.item(), model.logit_bias.item()) == (pytest.approx(10), -10)
    inputs = {name: x.double() if name == "video" else x for name, x in batch().items()}
    for dense in (False, True):
        model.zero_grad()
        loss = model(inputs)["total"]
        if dense:
            levels = plain_levels(model.interaction, *model.encode(inputs))
            loss = plain_dual_loss(*levels, model.logit_scale, model.logit_bias)
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}})
    assert_same(*found, 1e-10)
    assert found[0]["clip.logit_scale"] != 0
    assert found[0]["logit_bias"] != 0


def test_a_step_lowers_the_loss() -> None:
    model, inputs = model_of(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(inputs)["total"]
    before.backward()
    optimizer.step()
    assert model(inputs)["total"] < before.detach() - 1e-3


@pytest.mark.parametrize("interaction", ["wti", "dp"])
def test_the_sigmoid_loss_of_other_interactions(interaction: str) -> None:
    model = model_of(interaction=interaction, query_expansion=False)
    tokens = model.encode(batch())
    scaled = model.logit_scale * model.similarity(*tokens) + model.logit_bias
    z = 2 * torch.eye(3) - 1
    torch.testing.assert_close(model(batch())["total"], -(z * scaled).sigmoid().log().sum() / 3)


def test_weights_trained_by_the_other_loss_are_refused(tmp_path: Path) -> None:
    Head(32, **{**ROW, "loss": "softmax"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="loss 'softmax' there and 'sigmoid' here"):
        Head(32, **ROW).load_weights(tmp_path)


def test_the_temporal_transformer_starts_as_clips() -> None:
    model = model_of()
    ours, clips = (blocks.state_dict() for blocks in (model.interaction.temporal.transformer, model.clip.transformer))
    assert ours.keys() == clips.keys()
    assert all(torch.equal(x, clips[name]) for name, x in ours.items())
    assert model.interaction.max_positions == 16


def test_a_saved_model_scores_as_before(tmp_path: Path) -> None:
    head = Head(32, **ROW, max_positions=5).eval()
    text, video = torch.randn(3, 4, 32), torch.randn(2, 5, 32)
    head.save_pretrained(tmp_path)
    again = Head.from_pretrained(tmp_path)
    assert again.config == head.config == Config(**ROW)
    assert torch.equal(again.similarity(text, video), head.similarity(text, video))


def test_a_head_joined_with_its_towers_expands_queries() -> None:
    towers = model_of(interaction="dp", query_expansion=False)
    head = Head(32, **ROW, max_positions=16).eval()
    joined = drl_fast.DRL.from_head(head, towers)
    assert joined.config.query_expansion
    tokens = joined.encode(batch())
    assert tokens.text_mask.all()
    assert torch.equal(joined.similarity(*tokens), head.similarity(*tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {**ROW, "temporal": "seqTransf"},
            "temporal must be None with interaction='mean_maxsim', .* use temporal=None",
        ),
        ({**ROW, "interaction": "wti"}, "query_expansion must be False with interaction='wti', got True; use inter"),
        ({**ROW, "cdcr": 1}, "cdcr must be 0 with query_expansion, .*, got 1; use cdcr=0"),
        ({**ROW, "loss": "hinge"}, "loss must be one of 'softmax', 'sigmoid', got 'hinge'"),
        ({**ROW, "masking": "exclude"}, "masking must be left out with interaction='mean_maxsim', whose rule is fixed"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Head(32, **options)


def test_query_expansion_is_a_bool() -> None:
    with pytest.raises(TypeError, match="query_expansion must be"):
        Config(**{**ROW, "query_expansion": 2})
