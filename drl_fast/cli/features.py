"""``drl-fast features``: encode a data set's captions and frames once, or import other encoders' tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..console import print_cut, print_line, print_machine, print_split, print_unreadable, progress
from ..data.datasets import load_split
from ..data.formats import PARTS
from ..data.split import Split, some
from ..engine.precision import PRECISIONS, autocast_for
from ..engine.processes import Processes, processes
from ..validation import option
from ._errors import report_errors
from ._options import Annotations, Dataset, Overrides, Strict, Videos, with_folders

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.feature_store import Contents, Side
    from ..data.loading import Unreadable
    from ..data.token_files import TokenFiles
    from ..engine.config import RunConfig
    from ..engine.encode import Encode
    from ..model.drl import DRL

STAGES = {"text": "captions", "video": "videos"}
# Files of imported tokens that are written together.
IMPORTED = 128


def features(
    out: Annotated[Path, typer.Option(help="Output folder: new, or one that the same command left unfinished.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="A row of the ablation, such as wti_cdcr, or a YAML file; only its CLIP and inputs are used."
        ),
    ] = None,
    dataset: Dataset = None,
    videos: Videos = None,
    annotations: Annotations = None,
    overrides: Overrides = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Import the videos' tokens from this folder instead: .npy, .npz, .safetensors, HDF5 or WebDataset "
            "tars, (frames, D) each, named by the captions' video.",
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="With --from: the captions, a CSV or JSONL file. Default: captions.csv in that folder."),
    ] = None,
    text_from: Annotated[
        Path | None,
        typer.Option(
            help="With --from: import the captions' tokens as well, (words, D) each, named by the captions' column id, "
            "or by their number from 0. Default: the configured CLIP encodes them."
        ),
    ] = None,
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="train, val or test; repeatable. Default: all three.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored tokens: fp16, bf16 or fp32.")] = "fp16",
    precision: Annotated[str, typer.Option(help="Of the towers: fp32, or bf16, which is faster on a GPU.")] = "fp32",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Decoding processes per process; default: the configuration's.")
    ] = None,
    strict: Strict = False,
) -> None:
    """Encode captions and frames once, so that train and eval --features run without the towers.

    The same command continues after Ctrl-C or a kill. Under torchrun, N processes share the work. Videos that are
    missing or cannot be read are named and left out.
    """
    with report_errors("train"), processes() as here:
        from ..data.feature_store import DTYPES
        from ..engine.config import RunConfig, merge, read_values

        option("dtype", dtype, tuple(DTYPES))
        option("precision", precision, PRECISIONS)
        parts = tuple(dict.fromkeys(splits or PARTS))
        for part in parts:
            option("split", part, PARTS)
        console = Console(quiet=not here.first)
        if source is None:
            for name, value in (("captions", captions), ("text-from", text_from)):
                if value is not None:
                    raise ValueError(f"{name} goes with --from, got {value} without it; add --from DIR")
            if config is None:
                raise ValueError("config must be a row or a YAML file, got none; for instance --config wti")
        elif workers is not None:
            raise ValueError(f"workers decode videos, got {workers} beside --from; drop it")
        elif dataset is not None or videos is not None or annotations is not None:
            raise ValueError("from goes without --dataset, --videos and --annotations; name captions by --captions")
        if text_from is not None and (config is not None or overrides or precision != "fp32"):
            raise ValueError(
                "text-from goes without --config, --set and --precision, which are options of CLIP; drop them"
            )
        named = "folder" if source is not None else dataset
        values = (
            merge({}, "--set", overrides or (), named)
            if config is None
            else read_values(config, overrides or (), named)
        )
        settings = RunConfig(**values)
        if workers is not None:
            settings = dataclasses.replace(settings, workers=workers)
        print_machine(console)
        work = _Encoding(settings, str(config or "wti"), parts, dtype, precision, strict, here, console)
        if source is None:
            work.encode(out, *with_folders(settings, videos, annotations)[1:])
        else:
            work.import_tokens(out, source, captions or source, text_from)


@dataclasses.dataclass
class _Encoding:
    """What the command does, with the options that both of its forms share."""

    settings: RunConfig
    row: str
    """The configuration to train with, for the last line."""
    parts: Sequence[str]
    dtype: str
    precision: str
    strict: bool
    here: Processes
    console: Console

    def encode(self, out: Path, videos: Path, annotations: Path) -> None:
        """Encode captions and video files with the configured CLIP."""
        from ..data.feature_store import Contents, Side, files_hash
        from ..engine.encode import VIDEOS, encode_videos, head_start

        splits = {
            part: load_split(self.settings.dataset, part, videos=videos, annotations=annotations, strict=self.strict)
            for part in self.parts
        }
        self._introduce(splits)
        contents = Contents.of(splits)
        model, text, captions = self._clip(contents)
        sampling = self.settings.sampling(*model.pictures)
        side = Side(
            len(contents.videos),
            model.dim,
            VIDEOS,
            sampling.max_frames,
            self._encoder(model, "video"),
            files_hash(contents.paths),
        )
        context = autocast_for(self.precision, self.here.device.type)
        encoders = {
            "text": captions,
            "video": encode_videos(model, contents.paths, contents.videos, sampling, self.settings.workers, context),
        }
        inputs = None if model.inputs is None else dataclasses.asdict(model.inputs)
        self._write(out, contents, {"text": text, "video": side}, encoders, head_start(model), inputs)

    def import_tokens(self, out: Path, source: Path, captions: Path, text_from: Path | None) -> None:
        """Import the videos' tokens; import the captions' too, or encode them with the configured CLIP."""
        from ..data.feature_store import Contents
        from ..data.imported import read_splits
        from ..data.token_files import TokenFiles

        files = TokenFiles(source)
        texts = None if text_from is None else TokenFiles(text_from)
        found = read_splits(captions, files, texts, self.parts)
        self._introduce(found.splits)
        missing = {name for split in found.splits.values() for name in (*split.missing, *split.uncaptioned)}
        for what, names, folder in (("videos", sorted(missing), source), ("captions", found.absent, text_from)):
            if names and self.strict:
                raise ValueError(
                    f"{folder} must hold tokens of all {what}, got none of {some(names)}; add them, or drop --strict"
                )
        if found.absent:
            print_line(
                self.console,
                f"left out: {len(found.absent)} captions have no tokens in {text_from}: {some(found.absent)}",
                "yellow",
            )
        contents = Contents.of(found.splits)
        video = _imported(files, contents.paths)
        if texts is None:
            _, text, encode_text = self._clip(contents)
        else:
            entries = [found.text_entries[caption] for caption in contents.texts]
            text, encode_text = _imported(texts, entries), _reader(texts, entries)
        encoders = {"text": encode_text, "video": _reader(files, contents.paths)}
        self._write(out, contents, {"text": text, "video": video}, encoders, {}, None)

    def _introduce(self, splits: Mapping[str, Split]) -> None:
        for split in splits.values():
            print_split(self.console, split)

    def _clip(self, contents: Contents) -> tuple[DRL, Side, Encode]:
        """Build the model whose CLIP encodes captions; return it with the text side and its encoder."""
        from ..data.feature_store import Side
        from ..engine.config import build_model
        from ..engine.encode import encode_captions
        from ..engine.features import TEXTS
        from ..model.clip import example_tag

        settings = self.settings
        if settings.init_from is None:
            # loss=sigmoid would reset the CLIP's logit scale. Store the CLIP's own, whatever the loss. A model in
            # init_from has a trained one.
            settings = dataclasses.replace(settings, loss="softmax")
        model, tokenizer = build_model(settings)
        model.to(self.here.device)
        if self.settings.pretrained is None and self.settings.init_from is None:
            print_line(
                self.console,
                "warning: CLIP's weights are random, and the features mean nothing; take trained ones with --set "
                f"pretrained={example_tag(self.settings.clip)}",
                "bold yellow",
            )
        words = model.words(self.settings.words)
        print_line(
            self.console,
            f"{self.settings.clip}, {self.settings.init_from or self.settings.pretrained or 'random weights'}, "
            f"{self.precision} on "
            f"{self.here.device}, stored as {self.dtype}",
        )
        print_cut(self.console, contents.texts, model, tokenizer, self.settings.words)
        context = autocast_for(self.precision, self.here.device.type)
        text = Side(len(contents.texts), model.dim, TEXTS, words, self._encoder(model, "text"))
        return model, text, encode_captions(model, tokenizer, contents.texts, words, context)

    def _encoder(self, model: DRL, side: str) -> dict[str, Any]:
        """Describe a tower, so that the same one can be found again."""
        weights = self.settings.pretrained
        if weights is not None and Path(weights).is_file():
            weights = str(Path(weights).resolve())
        source = self.settings.init_from and str(Path(self.settings.init_from).resolve())
        found = {"clip": self.settings.clip, "pretrained": weights, "init_from": source}
        expanded = {"query_expansion": True} if side == "text" and model.config.query_expansion else {}
        return {**found, "seed": self.settings.seed, "weights": model.encoder_hash(side), **expanded}

    def _write(
        self,
        out: Path,
        contents: Contents,
        sides: Mapping[str, Side],
        encoders: dict[str, Encode],
        start: dict[str, Tensor],
        inputs: dict[str, Any] | None,
    ) -> None:
        from ..data.feature_store import About, FeatureStore, start_bytes
        from ..engine.encode import write_store

        data, digest = start_bytes(start)
        about = About(
            self.settings.dataset,
            self.dtype,
            self.precision,
            inputs,
            contents.digest(),
            digest,
            sides["text"],
            sides["video"],
        )
        bars = progress(self.console)
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                if done:
                    print_line(self.console, f"continuing: {done} of {total} {STAGES[name]} are there already")
                tasks[name] = bars.add_task(STAGES[name], total=total, note="")
            bars.update(tasks[name], completed=done)

        def unreadable(video: Unreadable) -> None:
            if self.strict:
                raise ValueError(f"{video.name} cannot be read, and --strict wants all of them: {video.reason}")
            print_unreadable(Console(stderr=True), video)

        try:
            with bars:
                write_store(
                    out,
                    about,
                    contents,
                    data,
                    encoders,
                    self.here,
                    on_progress=show,
                    on_unreadable=unreadable,
                )
        except KeyboardInterrupt:
            print_line(self.console, f"stopped; the same command continues from what is in {out}")
            raise
        if not self.here.first:
            return
        absent = int((FeatureStore(out).counts("video") == 0).sum())
        if absent:
            print_line(self.console, f"left out: {absent} of {about.video.items} videos could not be decoded", "yellow")
        size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
        print_line(
            self.console,
            f"{about.text.items} captions and {about.video.items} videos in {out}, {size:.0f} MB; train on them with "
            f"drl-fast train --config {self.row} --features {out}",
        )


def _imported(files: TokenFiles, entries: Sequence[Path]) -> Side:
    """Describe a side whose tokens are imported; its width is that of the first entry."""
    from ..data.feature_store import Side, files_hash

    return Side(len(entries), files.read(entries[0]).shape[1], IMPORTED, None, None, files_hash(entries))


def _reader(files: TokenFiles, entries: Sequence[Path]) -> Encode:
    return lambda chunks: ([files.read(entries[item]) for item in chunk] for chunk in chunks)
