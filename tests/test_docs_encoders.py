"""The recipes for encoders that cannot run here: their scripts run with a stand-in for the encoder, then the commands.

A stand-in has the encoder's widths and layout of tokens, and random values.
"""

from __future__ import annotations

import csv
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
VIDEOS, CAPTIONS = 4, 8


class Inputs(dict):
    """What a tokenizer of Hugging Face's returns."""

    __getattr__ = dict.__getitem__

    def to(self, device: str) -> Inputs:
        return self


class InternVideo2:
    """Stage 2, 1B, by its shapes: patches of 1,408 channels, BERT's 1,024, both projected to 512."""

    def __init__(self) -> None:
        self.vision_encoder = SimpleNamespace(clip_projector=lambda patches: patches.mean(1)[:, :768])
        self.vision_proj, self.text_proj = nn.Linear(768, 512), nn.Linear(1024, 512)

    def eval(self) -> InternVideo2:
        return self

    def encode_vision(self, frames: Tensor, test: bool) -> tuple[Tensor, Tensor]:
        assert test
        assert frames.shape[1:] == (4, 3, 224, 224)
        return torch.randn(1, 1 + 4 * 256, 1408), torch.randn(1, 768)

    def encode_text(self, text: Any) -> tuple[Tensor, Tensor]:
        self.seen = torch.randn(1, text.input_ids.shape[1], 1024)
        return self.seen, self.seen[:, 0]


def internvideo2() -> dict[str, dict[str, Any]]:
    def tokenizer(caption: str, **options: Any) -> Inputs:
        assert options == {"truncation": True, "max_length": 40, "return_tensors": "pt"}
        words = 2 + len(caption.split())
        return Inputs(input_ids=torch.ones(1, words, dtype=torch.long), attention_mask=torch.ones(1, words))

    config = {"model": {"vision_encoder": {}}, "num_frames": 4, "device": "cpu", "max_txt_l": 40}
    return {
        "cv2": {"VideoCapture": lambda path: path},
        "demo": {},
        "demo.config": {"Config": SimpleNamespace(from_file=lambda _: config), "eval_dict_leaf": lambda x: x},
        "demo.utils": {
            "_frame_from_video": lambda _: iter([np.zeros((48, 64, 3), np.uint8)] * 9),
            "frames2tensor": lambda frames, fnum, device: torch.zeros(1, fnum, 3, 224, 224),
            "setup_internvideo2": lambda _: (InternVideo2(), tokenizer),
        },
    }


class Qwen3VLEmbedder:
    """The 2B model by its shapes: 2,048 channels, and ids laid out by its chat template."""

    START, END, VIDEO, WORD = 151644, 151645, 151656, 9
    FRAMES, PATCHES = 3, 4

    def __init__(self, path: str, **options: Any) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(video_token_id=self.VIDEO), device="cpu")
        ids = {"<|im_start|>": self.START}
        self.processor = SimpleNamespace(tokenizer=SimpleNamespace(convert_tokens_to_ids=ids.__getitem__))

    def format_model_input(self, **content: str) -> dict[str, str]:
        return content

    def _preprocess_inputs(self, conversations: list[dict[str, str]]) -> dict[str, Tensor]:
        (content,) = conversations
        shown = [self.WORD] * len(content.get("text", "").split())
        if "video" in content:
            assert Path(content["video"]).is_absolute()
            # A time stamp before each frame's patches.
            shown = ([self.WORD] * 3 + [self.VIDEO] * self.PATCHES) * self.FRAMES
        turns = [[self.WORD] * 6, shown]
        ids = [i for turn in turns for i in (self.START, self.WORD, self.WORD, *turn, self.END, self.WORD)]
        inputs = {"input_ids": torch.tensor([[*ids, self.START, self.WORD, self.WORD]])}
        return inputs | ({"video_grid_thw": torch.tensor([[self.FRAMES, 4, 4]])} if "video" in content else {})

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # Each token tells its position and its id, so that the test knows which ones were taken.
        (ids,) = inputs["input_ids"]
        tokens = torch.randn(1, len(ids), 2048)
        tokens[0, :, 0], tokens[0, :, 1] = torch.arange(len(ids)), ids % 100
        return {"last_hidden_state": tokens.bfloat16()}


def qwen3_vl() -> dict[str, dict[str, Any]]:
    names: dict[str, dict[str, Any]] = {"src": {}, "src.models": {}}
    return names | {"src.models.qwen3_vl_embedding": {"Qwen3VLEmbedder": Qwen3VLEmbedder}}


ENCODERS = {
    "InternVideo2": (internvideo2, "internvideo2", 512, 4),
    "Qwen3-VL-Embedding": (qwen3_vl, "qwen3_vl", 2048, Qwen3VLEmbedder.FRAMES + 1),
}


def section(title: str) -> str:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    return text.partition(f"\n### {title}\n")[2].partition("\n## ")[0].partition("\n### ")[0]


def run_script(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a recipe's script with its stand-in in ``folder``; return the folder of its tokens."""
    stand_in, name, *_ = ENCODERS[title]
    for module, values in stand_in().items():
        made = ModuleType(module)
        made.__dict__.update(values)
        monkeypatch.setitem(sys.modules, module, made)
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = [(f"v{n % VIDEOS}.mp4", "a dog runs" + " fast" * n) for n in range(CAPTIONS)]
        csv.writer(file).writerows([("video", "caption"), *rows])
    monkeypatch.chdir(folder)
    (script,) = re.findall(r"^```py\n(.*?)^```", section(title), re.M | re.S)
    exec(compile(script, f"docs/recipes.md, {title}", "exec"), {"__name__": "recipe"})
    return folder / name


@pytest.mark.parametrize("title", ENCODERS)
def test_a_recipe_runs_with_a_stand_in(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip")
    testing = pytest.importorskip("typer.testing")
    from drl_fast.cli import app
    from drl_fast.data.feature_store import FeatureStore

    torch.manual_seed(0)
    _, name, width, frames = ENCODERS[title]
    folder = run_script(title, tmp_path, monkeypatch)
    assert sorted(path.name for path in (folder / "frames").iterdir()) == [f"v{n}.npy" for n in range(VIDEOS)]
    assert all(np.load(path).shape == (frames, width) for path in (folder / "frames").iterdir())
    assert all(np.load(folder / "words" / f"{n}.npy").shape[1] == width for n in range(CAPTIONS))

    (block,) = re.findall(r"^```sh\n(.*?)^```", section(title), re.M | re.S)
    tiny = ["--set", "epochs=1", "--set", "batch=4", "--set", "precision=fp32"]
    for line in block.splitlines():
        program, command, *options = shlex.split(line)
        assert program == "drl-fast"
        result = testing.CliRunner().invoke(app, [command, *options, *(tiny if command == "train" else ())])
        assert result.exit_code == 0, result.output
    about = FeatureStore(tmp_path / f"{name}_features").about
    assert (about.text.width, about.video.width) == (width, width)
    assert (about.text.items, about.video.items) == (CAPTIONS, VIDEOS)


def test_qwens_words_and_frames_are_the_captions_and_the_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_script("Qwen3-VL-Embedding", tmp_path, monkeypatch)
    words = np.load(folder / "words/0.npy")
    # 11 tokens of the first turn, 3 that begin the second; the answer's last token is the fifth after the words.
    assert words[:, 0].tolist() == [14, 15, 16, 21]
    assert words[:, 1].tolist() == [Qwen3VLEmbedder.WORD] * 4
    frames = np.load(folder / "frames/v0.npy")
    assert frames[:-1, 1].tolist() == [Qwen3VLEmbedder.VIDEO % 100] * Qwen3VLEmbedder.FRAMES
    # 3 tokens of its time, then 4 patches: the mean position of each frame.
    assert frames[:, 0].tolist() == [18.5, 25.5, 32.5, 39]


def test_internvideo2s_pooled_word_stands_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[InternVideo2] = []
    made = InternVideo2.__init__

    def remember(self: InternVideo2) -> None:
        made(self)
        models.append(self)

    monkeypatch.setattr(InternVideo2, "__init__", remember)
    folder = run_script("InternVideo2", tmp_path, monkeypatch)
    (model,) = models
    words = torch.from_numpy(np.load(folder / "words" / f"{CAPTIONS - 1}.npy"))
    expected = model.text_proj(model.seen[0]).detach()
    torch.testing.assert_close(words, torch.cat([expected[1:], expected[:1]]))
