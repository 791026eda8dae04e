"""The code of README and the how-to pages: Python runs, diffs apply and keep scores, options exist.

The blocks of one page run in order in one namespace, as a reader would type them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
PAGES = ("README.md", "docs/drop_in.md", "docs/recipes.md", "docs/search.md", "docs/troubleshooting.md")
# Scores are cosines, and the hosts sum them in another order.
SAME = 1e-5


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page, "python")
    assert found
    if any("drl_fast.DRL" in block or "plot_matches" in block for block in found):
        pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)
    if "Retriever" in "".join(found):
        pytest.importorskip("lancedb")
    if page in ("docs/recipes.md", "docs/search.md"):
        _trained_run(tmp_path / "runs/clips/best")
    names = _run(page, found)
    assert names["drl_fast"].__name__ == "drl_fast"


def test_the_readmes_shapes() -> None:
    names = _run("README.md", blocks("README.md", "python"))
    assert names["logits"].shape == (8, 8)
    assert names["matches"].video_index.shape == (8, 8, 32)
    assert all(p.grad is not None for p in names["wti"].parameters())


def _run(page: str, found: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": page}
    for number, block in enumerate(found):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def _trained_run(folder: Path) -> None:
    """Save what the page's train command would, with random weights: the page's calls do not depend on scores."""
    import drl_fast
    from drl_fast.model.config import Inputs

    model = drl_fast.DRL("drl-small", interaction="wti")
    model.inputs = Inputs(max_words=32, rate=4.0, max_frames=6)
    model.save_pretrained(folder)


# --- diffs -----------------------------------------------------------------------------------------------------------
def sides(diff: str) -> tuple[str, str]:
    """Return the code before and after a diff."""
    lines = diff.splitlines()
    assert all(line == "" or line[0] in " +-" for line in lines)
    return tuple("\n".join(line[1:] for line in lines if line[:1] != drop) for drop in "+-")  # type: ignore[return-value]


def hosts() -> dict[str, tuple[str, str]]:
    """Return both sides of every diff, by the name of its class."""
    found = {}
    for page in ("README.md", "docs/drop_in.md"):
        for diff in blocks(page, "diff"):
            name = re.findall(r"^ class (\w+)", diff, re.M)
            assert len(name) == 1
            found[name[0]] = sides(diff)
    return found


HOSTS = hosts()
DIM, BATCH, WORDS, FRAMES = 24, 6, 7, 5


def load(code: str, name: str) -> type[nn.Module]:
    names: dict[str, Any] = {}
    exec(compile(code, name, "exec"), names)
    return names[name]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Build the host before and after its diff, with equal weights."""
    before, after = (load(code, name)(dim=DIM) for code in HOSTS[name])
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    assert unexpected == []
    assert all(entry.startswith("interaction.") for entry in missing)
    return before, after


def batch(*, padded: bool = True) -> list[Tensor]:
    """Draw tokens of texts and videos and both masks, as integers."""
    lengths = torch.randint(2, WORDS, (BATCH, 1)), torch.randint(2, FRAMES, (BATCH, 1))
    masks = [(torch.arange(n) < length).long() for n, length in zip((WORDS, FRAMES), lengths, strict=True)]
    if not padded:
        masks = [torch.ones_like(mask) for mask in masks]
    return [torch.randn(BATCH, WORDS, DIM), torch.randn(BATCH, FRAMES, DIM), *masks]


# How to compute a host's scores, and the dtype of its masks.
SCORES: dict[str, tuple[Callable[..., Any], torch.dtype]] = {
    "DRL": (lambda host, *tokens: host.wti_interaction(*tokens)[0], torch.float32),
    "Cap4Video": (lambda host, *tokens: host.eval().wti_interaction(*tokens), torch.float32),
    "UATVR": (lambda host, *tokens: host.similarity(*tokens), torch.float32),
    "ColBERT": (lambda host, *tokens: host.score(*tokens), torch.int64),
}


def test_every_host_has_a_diff() -> None:
    """tests/test_drop_in_hosts.py trains those that pool in other ways."""
    weighted = {"Retrieval", "DRL", "CLIP4Clip", "Cap4Video", "UATVR", "ColBERT"}
    assert set(HOSTS) == weighted | {"PyLate", "VideoColBERT", "DiscoVLA", "XCLIP"}
    for before, after in HOSTS.values():
        assert "drl_fast" not in before
        assert "drl_fast" in after
        assert "einsum" not in after


@pytest.mark.parametrize("name", SCORES)
def test_a_diff_keeps_the_scores(name: str) -> None:
    before, after = pair(name)
    score, dtype = SCORES[name]
    for _ in range(3):
        text, video, text_mask, video_mask = batch()
        tokens = (text, video, text_mask.to(dtype), video_mask.to(dtype))
        with torch.no_grad():
            torch.testing.assert_close(score(after, *tokens), score(before, *tokens), atol=SAME, rtol=SAME)


def test_cap4videos_uniform_weights() -> None:
    before, after = (load(code, "Cap4Video")(dim=DIM, interaction="ti").eval() for code in HOSTS["Cap4Video"])
    text, video, text_mask, video_mask = batch()
    tokens = (text, video, text_mask.float(), video_mask.float())
    torch.testing.assert_close(after.wti_interaction(*tokens), before.wti_interaction(*tokens), atol=SAME, rtol=SAME)


def test_clip4clips_own_scores_are_those_of_dp() -> None:
    import drl_fast

    before, after = pair("CLIP4Clip")
    after.interaction = drl_fast.DP()
    tokens = batch()
    torch.testing.assert_close(
        after._loose_similarity(*tokens), before._loose_similarity(*tokens), atol=SAME, rtol=SAME
    )


@pytest.mark.parametrize("name", ["Retrieval", "DRL", "CLIP4Clip"])
def test_a_training_step(name: str) -> None:
    """Loss and gradients agree, except for CLIP4Clip, whose diff changes the interaction."""
    before, after = pair(name)
    # Without padding, CDCR equals the public code's, in which padding can win a match.
    tokens = batch(padded=name != "DRL")
    masks = [mask.float() for mask in tokens[2:]] if name == "DRL" else tokens[2:]
    losses = [host(*tokens[:2], *masks) for host in (before, after)]
    for loss in losses:
        loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in after.parameters())
    assert any(bool(p.grad.any()) for name, p in after.named_parameters() if "weight_fc" in name)
    if name == "CLIP4Clip":
        return
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    gradients = dict(after.named_parameters())
    for key, p in before.named_parameters():
        torch.testing.assert_close(
            gradients[key].grad, p.grad, atol=1e-3, rtol=1e-3, msg=lambda text, key=key: key + text
        )


@pytest.mark.parametrize("name", ["Cap4Video", "UATVR", "ColBERT"])
def test_gradients_reach_the_weights_of_the_host(name: str) -> None:
    _, after = pair(name)
    text, video, text_mask, video_mask = batch()
    logits = SCORES[name][0](after, text, video, text_mask.float(), video_mask.float())
    torch.nn.functional.cross_entropy(100 * logits, torch.arange(BATCH)).backward()
    grads = [p.grad for key, p in after.named_parameters() if key != "logit_scale"]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert any(bool(g.any()) for g in grads)


# --- commands ---------------------------------------------------------------------------------------------------------
def commands(page: str) -> list[list[str]]:
    """Return the arguments of every call of drl-fast, also of those by torchrun."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            start = next((i for i, word in enumerate(words) if word in ("drl-fast", "drl_fast.cli")), None)
            if start is not None:
                found.append(words[start + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("yaml")
    import typer

    from drl_fast.cli import app

    root = typer.main.get_command(app)
    known = {name: {flag for p in command.params for flag in p.opts} for name, command in root.commands.items()}  # type: ignore[attr-defined]
    for name in known:
        known[name].add("--help")
    for words in commands(page):
        if words[0].startswith("--"):
            assert words[0] in {"--help", "--version"}, words
            continue
        assert words[0] in known, words
        options = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
        assert options <= known[words[0]], words


@pytest.mark.parametrize("page", PAGES)
def test_keys_that_are_set_exist(page: str) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("yaml")
    import dataclasses

    from drl_fast.engine.config import RunConfig

    known = {field.name for field in dataclasses.fields(RunConfig)}
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"--set (\w+)=", text)) <= known


def test_keys_of_the_migration_table_exist() -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("yaml")
    import dataclasses

    from drl_fast.engine.config import RunConfig

    known = {field.name for field in dataclasses.fields(RunConfig)}
    text = (ROOT / "docs/drop_in.md").read_text(encoding="utf-8").partition("## From the public scripts")[2]
    rows = [row.split(" | ")[-1] for row in text.splitlines() if row.startswith("| ")]
    named = [re.findall(r"`(\w+)(?:=\S+)?`", row) for row in rows if re.search(r"\bkeys? `", row)]
    assert len(named) > 12
    values = {"dp", "xti", "wti", "ti", "null", "seqLSTM", "seqTransf", "bf16", "fp32", "tightTransf"}
    assert {key for keys in named for key in keys} - values <= known


@pytest.mark.parametrize("page", [*PAGES, "docs/api.md"])
def test_headings_that_links_name_exist(page: str) -> None:
    """tests/test_readme.py checks that the linked files exist."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for name, heading in re.findall(r"\]\(([^):#]*)#([^):]+)\)", text):
        path = (ROOT / page).parent / name if name else ROOT / page
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert heading in slugs, f"{page} links to {name}#{heading}"


# --- figures ----------------------------------------------------------------------------------------------------------
def test_figures_of_the_readme_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    results = ROOT / "benchmarks/results/amd-epyc-2t"
    wti = json.loads((results / "wti.json").read_text(encoding="utf-8"))
    memory = {row["contestant"]: row["mb"] for row in wti["memory"] if row["shape"]["batch"] == 256}
    assert f"adds {memory['drl_fast']:.0f} MB to its inputs, the usual einsum code {memory['eager']:.0f} MB" in text
    share = {}
    for record in wti["time"]:
        shape, times = record["shape"], record["results"]
        if record["mode"] == "train" and (shape["batch"], shape["nt"], shape["dim"]) == (256, 32, 512):
            share[shape["lengths"]] = times["drl_fast"]["ratio"]["median"] / times["eager"]["ratio"]["median"]
    full, real = share["full"], share["real"]
    assert f"the interaction alone takes {full:.2f} of the einsum code's time, {real:.2f} with" in text


def test_the_readme_says_what_a_whole_step_gains() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    model = json.loads((ROOT / "benchmarks/results/amd-epyc-2t/model.json").read_text(encoding="utf-8"))
    ms = {name: values["median"] for name, values in model["time"][-1]["ms"].items()}
    towers = 100 * (ms["text"] + ms["image"] + ms["temporal"]) / ms["step"]
    gain = 100 * (1 - ms["step"] / ms["step_dense"])
    assert (
        f"the towers take {towers:.0f} % of a ViT-B/32 training step on a CPU, and the whole step gains {gain:.1f} %"
        in text
    )


def test_figures_of_the_recipes_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "docs/recipes.md").read_text(encoding="utf-8").split())
    result = json.loads((ROOT / "benchmarks/results/amd-epyc-2t/contrastive.json").read_text(encoding="utf-8"))
    size = {"batch": 4096, "nt": 16, "nv": 8, "dim": 128}
    memory = {row["contestant"]: row["mb"] for row in result["memory"] if size.items() <= row["shape"].items()}
    assert f"add {memory['fused']:.0f} MB to their inputs" in text
    assert f"with `token_contrastive_loss`, {memory['two_steps']:.0f} MB with `info_nce`" in text


def test_public_names_exist() -> None:
    import drl_fast

    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w[\w.]*)\(", text, re.M)
    assert set(drl_fast.__all__) - {"Matches", "functional", "metrics", "modules"} <= set(rows)
    for name in rows:
        if name in ("DRL", "plot_matches"):
            pytest.importorskip("open_clip")
            pytest.importorskip("matplotlib")
        found: object = drl_fast
        for part in name.split("."):
            found = getattr(found, part)
