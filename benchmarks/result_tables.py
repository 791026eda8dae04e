"""Tables of results: for the terminal, and for README.md and docs/, where marks name their table and its source.

    python benchmarks/result_tables.py               # write the pages' tables again
    python benchmarks/result_tables.py --check       # exit with 1 where pages differ from the committed results
    python benchmarks/result_tables.py --pictures    # draw the committed results' pictures again

Times compare as time relative to eager code; lower is better.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import plots
from problems import Shape

PAGES = ("README.md", *sorted(str(page.relative_to(harness.ROOT)) for page in harness.ROOT.glob("docs/*.md")))
MARK = re.compile(r"(<!-- table (?P<name>\w+) of (?P<file>\S+) -->\n).*?(?P<end><!-- end of table -->)", re.S)
NOTHING = "-"
SHAPES = "batch, words, frames"
Result = dict[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: list[list[str]]


# How bench_search.py scores windows that lie in memory.
MEMORY_FORMS = ("NumPy", "PyTorch", "maxsim-cpu", "drl-fast")


# --- cells ------------------------------------------------------------------------------------------------------------
def milliseconds(spread: dict[str, float] | None) -> str:
    if spread is None:
        return NOTHING
    return f"{spread['median']:.0f} ms" if spread["median"] >= 100 else f"{spread['median']:.3g} ms"


def quartiles(spread: dict[str, float] | None) -> str:
    """Write the median, and the quartiles where they are wider than the digits shown."""
    if spread is None:
        return NOTHING
    median, q1, q3 = (f"{spread[key]:.2f}" for key in ("median", "q1", "q3"))
    return median if q1 == q3 else f"{median} ({q1} to {q3})"


def relative(results: Result, name: str, base: str = "eager") -> str:
    """Write the time relative to another's, from ratios to the yardstick: those were taken within a round."""
    if name not in results or base not in results:
        return NOTHING
    return f"{results[name]['ratio']['median'] / results[base]['ratio']['median']:.2f}"


def megabytes(row: Result) -> str:
    return f"{row['mb']:.0f} MB" if row["status"] == "ok" else row["status"]


def bytes_of(size: float) -> str:
    value, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def shape_of(row: Result) -> str:
    return Shape(**row["shape"]).label()


def labels(result: Result, names: Sequence[str]) -> list[str]:
    return [result["contestants"][name]["label"] for name in names]


def medians(row: Result, name: str) -> str:
    return milliseconds(row["results"][name]["ms"] if name in row["results"] else None)


# --- every benchmark --------------------------------------------------------------------------------------------------
def runs(results: dict[str, Result]) -> Table:
    """Say what was measured where, by which command. The source is a folder of results."""
    rows = []
    for name, result in results.items():
        if "command" in result:
            where = result["machine"]["gpu"] or f"{result['machine']['cpu']}, {result['threads']} threads"
            stack = f"torch {result['versions']['torch']}, Python {result['versions']['python']}"
            when = [result["versions"]["commit"], result["date"][:10]]
            rows.append([name, where, stack, *when, f"`{result['command']}`"])
    return Table("Runs", ["result", "machine", "versions", "commit", "date", "command"], rows)


def contestants(result: Result) -> Table:
    """Show other people's packages: version, how each was called, or why it is missing."""
    rows = []
    for name, about in result["contestants"].items():
        if "version" in about:
            measured = any(name in row["results"] for row in result["time"])
            missing = next((row["absent"][name] for row in result["time"] if name in row["absent"]), "")
            note = about["note"] if measured else f"not measured: {missing}"
            rows.append([about["label"], about["version"] or NOTHING, note])
    return Table("Packages", ["package", "version", "how it is called"], rows)


def grid(title: str, corner: str, result: Result, cells: dict[tuple[str, str], str]) -> Table:
    """Lay out cells, which are known by row and contestant; rows come in the cells' order."""
    names = [name for name in result["contestants"] if any(name == column for _, column in cells)]
    heads = dict.fromkeys(head for head, _ in cells)
    rows = [[head, *(cells.get((head, name), NOTHING) for name in names)] for head in heads]
    return Table(title, [corner, *labels(result, names)], rows)


def memory(result: Result) -> Table:
    sizes = ("nt", "nv", "dim", "batch")
    measured = sorted(result.get("memory", []), key=lambda row: [row["shape"][size] for size in sizes])
    cells = {(shape_of(row), row["contestant"]): megabytes(row) for row in measured}
    return grid("Peak memory of a training step beyond its inputs", SHAPES, result, cells)


def budget(result: Result) -> Table:
    found = [row for row in result.get("budget", []) if row["fits"]]
    cells = {(f"{row['budget_mb']} MB", row["contestant"]): str(row["fits"]["batch"]) for row in found}
    return grid("Largest batch whose training step adds at most so much to its inputs", "budget", result, cells)


# --- the interaction --------------------------------------------------------------------------------------------------
def compared(result: Result, mode: str, title: str, rivals: Sequence[str]) -> Table:
    """Show one mode: milliseconds of eager code and ours, and everyone's time relative to eager."""
    measured = [row for row in result["time"] if row["mode"] == mode]
    names = ["drl_fast", *(name for name in rivals if any(name in row["results"] for row in measured))]
    rows = [beside_eager(row, names) for row in measured]
    heads = [SHAPES, "eager", "drl-fast", *(f"{label} / eager" for label in labels(result, names))]
    return Table(f"{title}, time relative to eager", heads, rows)


def beside_eager(row: Result, names: Sequence[str]) -> list[str]:
    shares = (relative(row["results"], name) for name in names)
    return [shape_of(row), medians(row, "eager"), medians(row, "drl_fast"), *shares]


def forward(result: Result) -> Table:
    return compared(result, "forward", "Forward", ("compile", "mm"))


def train(result: Result) -> Table:
    return compared(result, "train", "Forward + backward", ("compile", "mm"))


def maxsim(result: Result) -> Table:
    peers = ("maxsim-cpu", "numkong", "late-interaction-kernels", "flash-maxsim", "mm")
    return compared(result, "maxsim", "One direction (ColBERT's max-sim), forward", peers)


def summary(result: Result) -> Table:
    """Show training steps at the shapes that people train with."""
    rows = []
    for row in result["time"]:
        shape = Shape(**row["shape"])
        if row["mode"] == "train" and shape.batch >= 64 and (shape.dim, shape.dtype) == (512, "float32"):
            rows.append(beside_eager(row, ["drl_fast"]))
    return Table("Training steps", [SHAPES, "eager", "drl-fast", "relative to eager"], rows)


def pooling(result: Result) -> Table:
    """Show a training step of each similarity beside its eager form: time and peak memory."""
    used = {(row["contestant"], shape_of(row)): row for row in result["memory"]}
    rows = []
    for name in (name for name in result["contestants"] if f"eager_{name}" in result["contestants"]):
        for row in result["time"]:
            pair = (f"eager_{name}", name)
            cells = [*(medians(row, who) for who in pair), quartiles(row["against"].get(pair[0]))]
            found = [used.get((who, shape_of(row))) for who in pair]
            cells += [NOTHING if memory is None else megabytes(memory) for memory in found]
            cells.append(share_of(found[1], found[0]))
            rows.append([result["contestants"][name]["label"], shape_of(row), *cells])
    heads = ["similarity", SHAPES, "eager", "drl-fast", "time relative to eager"]
    heads += ["memory, eager", "memory, drl-fast", "memory relative to eager"]
    return Table("A training step of each similarity", heads, rows)


def rerank(result: Result) -> Table:
    """Show scoring and training steps of each form beside rerank: time and peak memory."""
    used = {(row["contestant"], row["mode"], str(row["shape"])): row for row in result["memory"]}
    rows = []
    for row in result["time"]:
        ours = used.get(("rerank", row["mode"], str(row["shape"])))
        shape = "({texts}, {words}, {candidates}, {frames})".format(**row["shape"])
        for name in (name for name in result["contestants"] if name != "rerank"):
            theirs = used.get((name, row["mode"], str(row["shape"])))
            cells = [medians(row, name), medians(row, "rerank"), quartiles(row["against"][name])]
            cells += [NOTHING if memory is None else megabytes(memory) for memory in (theirs, ours)]
            rows.append([result["contestants"][name]["label"], row["mode"], shape, *cells, share_of(ours, theirs)])
    heads = ["against", "", "texts, words, candidates, frames", "time", "rerank", "relative time"]
    return Table("Reranking", [*heads, "memory", "memory, rerank", "relative memory"], rows)


def share_of(ours: Result | None, theirs: Result | None) -> str:
    """Write one peak of memory relative to another, where both were measured."""
    if ours is None or theirs is None or {ours["status"], theirs["status"]} != {"ok"}:
        return NOTHING
    return f"{ours['mb'] / theirs['mb']:.2f}"


def profile(result: Result) -> Table:
    shapes = result["profile"]
    heads = [f"{shape_of(row)}: {row['ms']:.3g} ms" for row in shapes]
    rows = [[phase, *(f"{row['percent'][phase]:.0f} %" for row in shapes)] for phase in shapes[0]["percent"]]
    return Table("Where a training step goes, in percent of samples", ["phase", *heads], rows)


# --- the losses -------------------------------------------------------------------------------------------------------
def contrastive(result: Result) -> Table:
    names = ("eager", "two_steps", "fused")
    rows = []
    for row in result["time"]:
        shares = (quartiles(row["against"].get(other)) for other in ("eager", "two_steps"))
        rows.append([shape_of(row), *(medians(row, name) for name in names), *shares])
    heads = [SHAPES, *labels(result, names), "relative to eager", "relative to two steps"]
    return Table("A training step of the contrastive loss", heads, rows)


def cdcr(result: Result) -> Table:
    """Show both forms beside their eager form; the last row is ``cross_correlation_loss`` alone."""
    rows = []
    for row in sorted(result["time"], key=lambda r: (r["mode"], r["shape"]["lengths"], r["shape"]["batch"])):
        shape = row["shape"]
        what = shape_of(row) if row["mode"] == "pairs" else f"{shape['batch'] * shape['nt']} x {shape['dim']} rows"
        cells = [what, medians(row, "outer")]
        for form in ("full", "diagonal"):
            plain = f"eager_{form}"
            cells += [medians(row, plain), medians(row, form), relative(row["results"], form, plain)]
        rows.append(cells)
    forms = [f"{form}: {what}" for form in ("full", "diagonal") for what in ("eager", "drl-fast", "relative")]
    return Table("CDCR, forward + backward", ["pairs, words, frames", "N x D x D form", *forms], rows)


# --- a whole training step --------------------------------------------------------------------------------------------
PARTS = {
    "text": "text tower",
    "image": "image tower",
    "temporal": "temporal transformer",
    "adam": "Adam",
    "ours": "weights, interaction, losses: drl-fast",
    "dense": "weights, interaction, losses: eager",
}


def model_time(result: Result) -> Table:
    """Show milliseconds, and each part's share of the step that has it."""
    steps = [row["ms"] for row in result["time"]]

    def share(part: str, ms: Result) -> str:
        share = 100 * ms[part]["median"] / ms["step_dense" if part == "dense" else "step"]["median"]
        return f"{milliseconds(ms[part])} ({share:.{2 if share < 99 else 3}g} %)"

    rows = [[name, *(share(part, ms) for ms in steps)] for part, name in PARTS.items()]
    for whole, name in (("step", "whole step, drl-fast"), ("step_dense", "whole step, eager")):
        rows.append([name, *(milliseconds(ms[whole]) for ms in steps)])
    # The result has the inverse, so the quartiles change places.
    gains = [row["dense_over_ours"] for row in result["time"]]
    turned = [{"median": 1 / g["median"], "q1": 1 / g["q3"], "q3": 1 / g["q1"]} for g in gains]
    rows.append(["loss alone, relative to eager", *map(quartiles, turned)])
    return Table("Time of a training step", ["part", *(f"batch {row['batch']}" for row in result["time"])], rows)


def model_memory(result: Result) -> Table:
    """Show what towers hold for the backward, what the loss adds to that at its peak, and the step's peak."""
    columns = {row["batch"]: _parts_memory(row["result"]) for row in result["phases"] if row["status"] == "ok"}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(f"{column[name]:.0f} MB" for column in columns.values())] for name in names]
    heads = ["part", *(f"batch {batch}" for batch in columns)]
    return Table("Memory of a training step beyond weights and Adam's state", heads, rows)


def _parts_memory(laps: list[Result]) -> dict[str, float]:
    found: dict[str, float] = {}
    for last, lap in itertools.pairwise(laps):
        phase = lap["phase"]
        if phase in ("ours", "dense"):
            found[f"added by {PARTS[phase]}"] = lap["peak_mb"] - last["held_mb"]
        elif phase in ("text", "image", "temporal"):
            # A tower's second lap is its backward.
            found.setdefault(f"held by the {PARTS[phase]}", lap["held_mb"] - last["held_mb"])
    return {**found, "peak of the whole step": max(lap["peak_mb"] for lap in laps if lap["phase"] != "dense")}


def towers(result: Result) -> Table:
    """Show what each option gains beside the plain step, the fastest first."""
    done = [row for row in result["options"] if row["status"] == "ok"]
    plain = next(row for row in done if row["option"] == "plain")["result"][-1]
    rows = []
    for row in sorted(done, key=lambda row: row["result"][-1]["ms"]["step"]):
        last = row["result"][-1]
        time, peak = last["ms"]["step"], last["peak_mb"]
        relative = [f"{time / plain['ms']['step']:.2g}", f"{peak / plain['peak_mb']:.2g}"]
        largest = f"{row['largest_batch']:,}"
        rows.append(
            [row["option"], seconds(time), relative[0], bytes_of(1e6 * peak), relative[1], largest, row["changes"]]
        )
    budget = f"largest batch in {bytes_of(1e6 * result['settings']['budget_mb'])}, extrapolated"
    heads = ["option", f"step of {plain['batch']} pairs", "relative time", "memory", "relative memory", budget]
    return Table("What makes a training step faster", [*heads, "what it changes"], rows)


def towers_parts(result: Result) -> Table:
    """Show each option's step by part."""
    done = [row for row in result["options"] if row["status"] == "ok"]
    parts = {**{part: PARTS[part] for part in ("text", "image", "temporal")}, "ours": "loss", "adam": "Adam"}
    rows = [[row["option"], *(seconds(row["result"][-1]["ms"][part]) for part in parts)] for row in done]
    return Table("A training step by part", ["option", *parts.values()], rows)


def seconds(ms: float) -> str:
    return f"{ms / 1e3:.3g} s"


# --- training on features -------------------------------------------------------------------------------------------
def features_time(result: Result) -> Table:
    """Show a step on stored tokens by part, and an epoch of MSR-VTT's size: steps counted, not run."""
    rows = []
    for row in result["time"]:
        ms = row["ms"]
        module = row["temporal"] or "none"
        parts = (milliseconds(ms[part]) for part in ("load", "temporal", "ours", "dense", "optimizer", "step"))
        relative = {key: 1 / value for key, value in row["dense_over_ours"].items() if key != "rounds"}
        epochs = (f"{row[key] / 60:.1f} min" for key in ("epoch_seconds", "epoch_seconds_dense"))
        rows.append([f"{row['batch']}, {row['precision']}, {module}", *parts, f"{relative['median']:.2f}", *epochs])
    parts = ["load", "temporal module", "loss", "loss, eager", "Adam", "step", "step relative to eager"]
    heads = ["batch, precision, temporal module", *parts, "epoch", "epoch, eager"]
    return Table("A training step on features", heads, rows)


def features_memory(result: Result) -> Table:
    """Show the peak of a step beyond the head and Adam's state."""
    cells: dict[int, dict[str, str]] = {}
    for row in result["memory"]:
        name = "eager" if row["form"] == "dense" else f"chunk={row['chunk']}" if row["chunk"] else "drl-fast"
        cells.setdefault(row["batch"], {})[name] = megabytes(row)
    names = ("drl-fast", "eager", "chunk=256")
    rows = [[str(batch), *(found.get(name, NOTHING) for name in names)] for batch, found in cells.items()]
    precision = result["memory"][0]["precision"]
    return Table(f"Peak memory of a training step on features, {precision}, seqTransf", ["batch", *names], rows)


def features_ratios(result: Result) -> Table:
    """Show the time of each optimization relative to running without it."""
    (kept,), (weights,), (pair,) = (result[name] for name in ("kept", "backward", "pair"))
    found = {
        f"4 captions a video, batch {row['batch']}, {row['precision']}, against random captions": row["results"]["four"]
        for row in result["shared"]
    }
    found[f"contrastive loss, {shape_of(kept)}, logits and matches kept"] = kept["results"]["kept"]
    found[f"backward of the interaction, {shape_of(weights)}, of weights alone"] = weights["results"]["weights"]
    rows = [[name, quartiles(spread["ratio"])] for name, spread in found.items()]
    towers = pair["results"]["end_to_end"]["ratio"]["median"]
    rows.append([f"a pair on features, fp32, seqTransf, against {pair['clip']} end to end", f"{1 / towers:.4f}"])
    return Table("Time relative to running without it", ["", "relative time"], rows)


def features_rounding(result: Result) -> Table:
    rows = [
        [row["dtype"], f"{row['similarity_moved']:.1e}", f"{row['other_answers']} of {row['texts']}"]
        for row in result["rounding"]
    ]
    return Table("What rounding stored tokens changes", ["stored as", "largest change", "other top answers"], rows)


# --- prepared videos --------------------------------------------------------------------------------------------------
def prepared(result: Result) -> Table:
    """Show the time of a call for each number of queries, relative to the product."""
    names = ("float32", "float16", "bfloat16", "topk", "unprepared")
    rows = []
    for row in result["time"]:
        found = row["results"]
        cells = [milliseconds(found[name]["ms"]) for name in ("product", "float32")]
        cells += [quartiles(found[name]["ratio"]) for name in names]
        rows.append([str(row["queries"]), *cells, quartiles(found["float32"]["of_read"])])
    heads = ["queries", "product", "float32", *(f"{name} / product" for name in names), "float32 / reading"]
    return Table(f"Scoring {result['settings']['videos']:,} prepared videos", heads, rows)


def prepared_storage(result: Result) -> Table:
    """Show what preparing takes and what 16 bits change."""
    moved = {row["dtype"]: f"{row['largest']:.1e}" for row in result["error"]}
    rows = [
        [
            row["dtype"],
            milliseconds({"median": row["seconds"] * 1e3}),
            bytes_of(row["bytes"]),
            moved.get(row["dtype"], "0"),
        ]
        for row in result["prepare"]
    ]
    return Table("Preparing them", ["stored as", "time", "memory", "largest change of a score"], rows)


# --- the model of many GPUs -------------------------------------------------------------------------------------------
def scaling(result: Result) -> Table:
    rows = []
    for row in result["plan"]:
        cells = [bytes_of(way[key]) for way in row["ways"].values() for key in ("held", "sent")]
        rows.append([f"{row['work']['pairs'] >> 10}k on {row['work']['ranks']}", *cells])
    heads = ["pairs on GPUs", "gathered: held", "gathered: sent", "ring: held", "ring: sent"]
    return Table("Bytes a GPU and step by the model", heads, rows)


def scaling_check(result: Result) -> Table:
    """Show the model's bytes beside those of the largest group's processes."""
    most = max((row["work"]["ranks"], row["work"]["pairs"]) for row in result["groups"])
    rows = []
    for row in result["groups"]:
        if (row["work"]["ranks"], row["work"]["pairs"]) == most:
            pairs = [row.get(what, {}).get(key) for what in ("sent", "held") for key in ("predicted", "measured")]
            rows.append([row["kind"], *(NOTHING if size is None else f"{size / 1e6:.2f} MB" for size in pairs)])
    heads = ["way or form", "sent, predicted", "measured", "held, predicted", "measured"]
    return Table("The model's bytes and those of real processes", heads, rows)


# --- the paper's ablation and the demo --------------------------------------------------------------------------------
MSRVTT = Path("benchmarks/results/msrvtt")


def ablation(result: Result) -> Table:
    """Show R@1 on MSR-VTT, text to video / video to text, published and measured.

    The measured column comes from files that ``drl-fast eval --out`` wrote: benchmarks/results/msrvtt/ROW.json, and
    zero_shot.json for the row that is not trained. Nothing else fills it.
    """
    rows = []
    for row in result["rows"]:
        verb, stem = ("train", row["config"]) if row["trained"] else ("eval", "zero_shot")
        measured = _measured(harness.ROOT / MSRVTT / f"{stem}.json", row)
        command = f"`drl-fast {verb} --config {row['config']} --dataset msrvtt`"
        rows.append([row["name"], command, _both_ways(row["published"]), _both_ways(measured)])
    return Table("Ablation", ["row", "command", "published R@1", "measured R@1"], rows)


def _both_ways(metrics: dict[str, dict[str, float]] | None) -> str:
    return NOTHING if metrics is None else " / ".join(f"{metrics[key]['R1']:.1f}" for key in ("t2v", "v2t"))


def _measured(path: Path, row: Result) -> dict[str, dict[str, float]] | None:
    """Return an evaluation's metrics, if there is one; it must be of this row and of the whole test part.

    Raises:
        ValueError: an evaluation of something else.
    """
    if not path.exists():
        return None
    found = harness.load(path)
    said = {key: found[key] for key in ("dataset", "part", "texts", "videos", "checkpoint", "untrained")}
    whole = list(said.values())[:4] == ["msrvtt", "test", 1000, 1000]
    if not whole or (row["trained"] and (found["checkpoint"] is None or found["untrained"] is not None)):
        raise ValueError(
            f"{path} must be what drl-fast eval wrote for {row['name']} on MSR-VTT's 1,000 test pairs, got {said}: "
            f"evaluate that row, or remove the file"
        )
    return found["metrics"]


def demo(result: Result) -> Table:
    """Show the demo's comparison, as the demo printed it."""
    rows = []
    for row in result["rows"]:
        metrics, interval = row["metrics"], row["R1_interval_95"]
        first, back = ("{:.1f} [{:.0f}, {:.0f}]".format(metrics[way]["R1"], *interval[way]) for way in ("t2v", "v2t"))
        rows.append([row["name"], first, *(f"{metrics['t2v'][key]:.1f}" for key in ("R5", "R10", "MdR", "MnR")), back])
    chance = result["chance"]
    rows.append(["chance", *(f"{chance[key]:.2f}" for key in ("R1", "R5", "R10", "MdR", "MnR", "R1"))])
    return Table("The demo", ["", "R@1", "R@5", "R@10", "MdR", "MnR", "v2t R@1"], rows)


# --- the static report ------------------------------------------------------------------------------------------------
ARCHS = ("sm_80", "sm_90", "sm_100")


def static(result: list[Result]) -> Table:
    """Show what each kernel compiles to: the largest of all its forms. Nothing was measured."""
    rows = []
    for kernel in dict.fromkeys(row["kernel"] for row in result):
        found = [row for row in result if row["kernel"] == kernel and "error" not in row]
        registers = [max((row["registers"] for row in found if row["arch"] == arch), default=0) for arch in ARCHS]
        spilled = sum(row["spill_bytes"] > 0 for row in found)
        shared = max((row["shared_bytes"] for row in found), default=0)
        used = [kind for kind in ("mma", "wgmma", "tcgen05") if any(row["tensor_core"] == kind for row in found)]
        cells = [str(len(found)), *(str(n) if n else NOTHING for n in registers), str(spilled)]
        rows.append([f"`{kernel}`", *cells, f"{shared / 1024:.1f} KB", ", ".join(used) or NOTHING])
    heads = ["kernel", "forms", *(f"registers, {arch}" for arch in ARCHS), "forms that spill", "shared", "tensor cores"]
    return Table("Compiled kernels, nothing measured", heads, rows)


def spills(result: list[Result]) -> Table:
    """List the forms that spill or do not compile. Nothing was measured."""
    rows = []
    for row in result:
        what = f"does not compile: `{row['error']}`" if "error" in row else f"{row['spill_bytes']} bytes spilled"
        if "error" in row or row["spill_bytes"]:
            rows.append([f"`{row['kernel']}`", row["arch"], row["dtype"], row["problem"], what])
    return Table("Forms that spill or do not compile", ["kernel", "GPU", "tokens", "first launched by", "what"], rows)


def predicted(result: Result) -> Table:
    """Show the cost model's times in ms. Nothing was measured."""
    shapes = result["shapes"]
    rows = []
    for name in ("forward", "backward"):
        for kernel in dict.fromkeys(row["kernel"] for shape in shapes for row in shape["kernels"][name]):
            cells = []
            for shape in shapes:
                found = [row for row in shape["kernels"][name] if row["kernel"] == kernel]
                cells.append(between(found[0]["low"], found[0]["high"]) if found else NOTHING)
            rows.append([f"{name}: `{kernel}`", *cells])
    for name in ("forward", "step"):
        title = "forward pass" if name == "forward" else "training step"
        rows.append([f"**{title}**", *(between(shape[name]["low"], shape[name]["high"]) for shape in shapes)])
        for rival, label in (("plain", "plain PyTorch"), ("premasked", "plain PyTorch, masked tokens zeroed first")):
            rows.append([f"{title}, {label}", *(f"{shape[rival][f'{name}_ms']:.3g}" for shape in shapes)])
    heads = [f"({', '.join(map(str, shape['shape']))})" for shape in shapes]
    return Table("Predicted times in ms, not measured", ["predicted, ms", *heads], rows)


def between(low: float, high: float) -> str:
    first, last = f"{low:.2g}", f"{high:.2g}"
    return first if first == last else f"{first} to {last}"


def launches(result: Result) -> Table:
    """Show launches and operations of a training step, and the host's time with launches that do nothing."""
    rows = []
    for name, label in (("ours", "drl-fast"), ("plain", "plain PyTorch")):
        for way in ("forward", "backward"):
            found = result[name][way]
            counts = [str(found.get(key, NOTHING)) for key in ("launches", "ops", "views")]
            times = [f"{found[key]:.0f} us" if key in found else NOTHING for key in ("launcher_us", "host_us")]
            rows.append([f"{label}, {way}", *counts, *times])
    heads = ["", "Triton launches", "PyTorch operations", "views", "host time, launcher", "host time, public function"]
    return Table("Launches of a training step", heads, rows)


# --- a GPU session ----------------------------------------------------------------------------------------------------
def gpu_forward(result: Result) -> Table:
    """Show a forward pass in ms, as called and, where the host takes part of the time, in a CUDA graph."""
    peers = ("flash-maxsim", "late-interaction-kernels")
    return _gpu_times(result, "forward", peers)


def gpu_step(result: Result) -> Table:
    return _gpu_times(result, "step", ())


def _gpu_times(result: Result, mode: str, peers: Sequence[str]) -> Table:
    rows = []
    for shape, row in result["steps"]["speed"].items():
        found = row[mode]["results"]
        for peer in peers:
            measured = result["steps"]["peers"].get(f"{peer} {shape}", {})
            found = found | {peer: measured[mode]["results"][peer]} if measured.get("status") == "ok" else found
        plain = min((name for name in ("max", "amax") if name in found), key=lambda name: found[name]["ms"]["median"])
        names = ["mm", plain, "max in a graph", *peers, "drl_fast", "drl_fast in a graph"]
        cells = [f"{found[name]['ms']['median']:.3g}" if name in found else NOTHING for name in names]
        faster = found[plain]["ms"]["median"] / found["drl_fast"]["ms"]["median"]
        rows.append([shape.replace(" bfloat16", ""), *cells, f"{faster:.2f}"])
    heads = [
        SHAPES,
        "one product",
        "plain PyTorch",
        "`max` in a graph",
        *peers,
        "drl-fast",
        "in a graph",
        "plain / drl-fast",
    ]
    title = {"forward": "Forward pass, ms", "step": "Training step, ms"}[mode]
    return Table(title, heads, rows)


def gpu_summary(result: Result) -> Table:
    """Show time and memory of a step at the lengths of real captions."""
    rows = []
    for shape, row in result["steps"]["speed"].items():
        if "real" in shape:
            times, used = row["step"]["results"], result["steps"]["memory"][shape]["mb"]
            plain = min(times[name]["ms"]["median"] for name in ("max", "amax") if name in times)
            least = min(used[name] for name in ("max", "amax") if name in used)
            ours = times["drl_fast"]["ms"]["median"]
            memory = [bytes_of(1e6 * least), bytes_of(1e6 * used["drl_fast"])]
            rows.append([shape.split(" bf")[0], f"{plain:.3g} ms", f"{ours:.3g} ms", *memory])
    heads = [SHAPES, "plain PyTorch", "drl-fast", "plain PyTorch, memory", "drl-fast, memory"]
    return Table("Training step on a GPU", heads, rows)


def gpu_memory(result: Result) -> Table:
    """Show a step's memory beyond its inputs, of the plain form that needs less, and ours."""
    rows = []
    for shape, row in result["steps"]["memory"].items():
        plain, ours = min(row["mb"][name] for name in ("max", "amax") if name in row["mb"]), row["mb"]["drl_fast"]
        if "real" not in shape:  # the same, since memory depends on shapes only
            rows.append([shape.replace(" bfloat16", ""), f"{plain:.0f} MB", f"{ours:.0f} MB", f"{plain / ours:.1f}"])
    batches = {name: result["steps"]["batch"][name]["batch"] for name in ("max", "drl_fast")}
    rows.append(
        ["largest batch in 8 GB, inputs included", *(str(batches[name]) for name in ("max", "drl_fast")), NOTHING]
    )
    return Table("Memory of a training step", [SHAPES, "plain PyTorch", "drl-fast", "plain / drl-fast"], rows)


def gpu_blocks(result: Result) -> Table:
    """Show a training step's ms by the size of the blocks of coefficients: as called, and in a CUDA graph."""
    shapes = {
        "1024": "(1024, 32, 12)",
        "1024 real": "real lengths",
        "long": "(1024, 64, 64)",
        "long real": "real lengths",
    }
    rows = []
    for block in result["blocks"]:
        cells = [f"{block['ms'][shape]['called']:.3g}, {block['ms'][shape]['graph']:.3g}" for shape in shapes]
        rows.append([f"{block['mib']} MiB, {block['columns']} columns", *cells])
    return Table("Training step by size of blocks", ["ms as called, in a graph", *shapes.values()], rows)


def gpu_products(result: Result) -> Table:
    """Show a training step's ms in a CUDA graph with our products in the backward, and with the library's."""
    block = next(block for block in result["blocks"] if (block["mib"], block["columns"]) == (128, 16384))["ms"]
    shapes = {
        "1024": "(1024, 32, 12)",
        "1024 real": "(1024, 32, 12), real lengths",
        "long real": "(1024, 64, 64), real lengths",
    }
    rows = [
        [label, f"{block[shape]['graph']:.3g}", f"{block[shape + ' mm']['graph']:.3g}"]
        for shape, label in shapes.items()
    ]
    return Table("Products of the backward", ["ms in a graph", "`multiply_tiles`", "`torch.mm`"], rows)


# --- search -----------------------------------------------------------------------------------------------------------
def _ms(row: Result | None, key: str = "ms") -> list[str]:
    """Return the median and the 99th percentile of a query's time."""
    if not row or row["status"] != "ok":
        return [NOTHING] * 2
    return [milliseconds({"median": row[key][percentile]}) for percentile in ("p50", "p99")]


def search_windows(result: Result) -> Table:
    """Show exact search in an index, and the same scores from memory."""
    rows = []
    for row in result["windows"]:
        if row["status"] != "ok":
            rows.append([f"{row['windows']:,}", row["status"], *[NOTHING] * (6 + len(MEMORY_FORMS))])
            continue
        memory = {r["form"]: r for r in result["memory"] if r["windows"] == row["windows"] and r["status"] == "ok"}
        recall = row.get("candidates_recall")
        rows.append(
            [
                f"{row['windows']:,}",
                milliseconds({"median": row["first_ms"]}),
                *_ms(row),
                *(_ms(memory.get(form))[0] for form in MEMORY_FORMS),
                f"{row['peak_mb']:.0f} MB",
                bytes_of(1e6 * row["index_mb"]),
                f"{row['windows_per_second']:.0f}",
                f"{recall:.2f}" if recall is not None else NOTHING,
            ]
        )
    heads = ["windows", "first query", "median", "p99", *(f"{form}, from memory" for form in MEMORY_FORMS)]
    return Table(
        "Exact search",
        [*heads, "memory of a search", "index", "windows written a second", "recall of candidates"],
        rows,
    )


def search_vectors(result: Result) -> Table:
    """Show LanceDB's index of pooled vectors."""
    rows = [
        [
            f"{row['windows']:,}",
            *_ms(row),
            _ms(row, "brute_force_ms")[0],
            f"{row['recall']:.2f}",
            bytes_of(1e6 * row["index_mb"]),
            f"{row['write_seconds']:.0f} s, {row['index_seconds']:.0f} s",
        ]
        for row in result["vectors"]
        if row["status"] == "ok"
    ]
    heads = ["windows", "median", "p99", "all vectors, from memory", "recall of the 10 nearest", "index"]
    return Table("Candidates by pooled vectors", [*heads, "writing, indexing"], rows)


def search_tokens(result: Result) -> Table:
    """Show LanceDB's own search with several vectors a row."""
    rows = []
    for row in result["tokens"]:
        if row["status"] != "ok":
            rows.append([f"{row['windows']:,}", row["status"], *[NOTHING] * 4])
            continue
        times = f"{row['write_seconds']:.0f} s, {row['index_seconds']:.0f} s"
        rows.append([f"{row['windows']:,}", *_ms(row), f"{row['recall']:.2f}", bytes_of(1e6 * row["index_mb"]), times])
    return Table("Multivectors", ["windows", "median", "p99", "recall at 10", "index", "writing, indexing"], rows)


# --- a study ----------------------------------------------------------------------------------------------------------
def token_merging(result: Result) -> Table:
    """Show what merging saves in an image tower, and how far it moves frame tokens; random weights."""
    rows = []
    plain = {row["tower"]: row["memory"] for row in result["towers"] if row["form"] == "plain"}
    for row in result["towers"]:
        times = [
            cell
            for mode in ("forward", "step")
            for cell in (milliseconds(row[mode]["ms"]), quartiles(row[mode]["ratio"]))
        ]
        away = [f"{row['distance'][key]:.1e}" if "distance" in row else NOTHING for key in ("mean", "neighbours")]
        memory = [megabytes(row["memory"]), share_of(row["memory"], plain[row["tower"]])]
        rows.append([f"{row['tower']}, {row['form']}", *times, *memory, *away])
    heads = ["tower, merging", "forward", "of plain", "forward + backward", "of plain", "memory", "of plain"]
    return Table(
        "Token merging in an image tower, random weights",
        [*heads, "1 - cosine to plain", "between neighbouring frames"],
        rows,
    )


def token_merging_search(result: Result) -> Table:
    """Show R@1 of small trained towers, with and without merging."""
    rows = []
    for row in result["search"]:
        low, high = row["interval"]
        found = f"{row['R1']:.1f} [{low:.0f}, {high:.0f}]"
        rows.append([row["trained"], row["tested"], found, f"{max(row['distance'], 0.0):.1e}"])
    heads = ["trained with", "tested with", "R@1 [95 %]", "1 - cosine to the same model tested plain"]
    return Table("Token merging and search", heads, rows)


_EVERY = (runs, contestants, memory, budget, forward, train, maxsim, summary, profile, contrastive, cdcr, model_time)
_MORE = (pooling, rerank, model_memory, scaling, scaling_check, ablation, demo, static, spills, predicted, launches)
_GPU = (gpu_summary, gpu_forward, gpu_step, gpu_memory, gpu_blocks, gpu_products)
_SEARCH = (search_windows, search_vectors, search_tokens)
_FEATURES = (features_time, features_memory, features_ratios, features_rounding)
_PREPARED = (prepared, prepared_storage)
_TOWERS = (towers, towers_parts)
_MERGING = (token_merging, token_merging_search)
_ALL = (*_EVERY, *_MORE, *_GPU, *_FEATURES, *_PREPARED, *_SEARCH, *_TOWERS, *_MERGING)
TABLES: dict[str, Callable[[Any], Table]] = {table.__name__: table for table in _ALL}
# What a benchmark prints at its end.
SHOWN: dict[str, tuple[Callable[[Result], Table], ...]] = {
    "wti": (forward, train, maxsim, memory, budget),
    "pooling": (pooling,),
    "rerank": (rerank,),
    "contrastive": (contrastive, memory, budget),
    "cdcr": (cdcr, memory),
    "features": _FEATURES,
    "prepared": _PREPARED,
    "model": (model_time, model_memory, memory, budget),
    "towers": _TOWERS,
    "scaling": (scaling,),
    "search": _SEARCH,
    "scaling_check": (scaling_check,),
    "token_merging": _MERGING,
}


# --- how they are shown -----------------------------------------------------------------------------------------------
def text(table: Table) -> str:
    """Write a table for the terminal."""
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    lines = [table.title]
    for row in (table.columns, *table.rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join(lines)


def show(result: Result) -> None:
    """Print the tables of a benchmark's result that have rows."""
    for make in SHOWN[result["benchmark"]]:
        table = make(result)
        if table.rows:
            print(f"\n{text(table)}")


def markdown(table: Table) -> str:
    head, *rows = (f"| {' | '.join(line)} |" for line in (table.columns, *table.rows))
    return "\n".join([head, "|---|" + "---:|" * (len(table.columns) - 1), *rows]) + "\n"


def render(page: str) -> str:
    """Fill every marked table of a page from the result file or folder that its mark names."""

    def fill(match: re.Match[str]) -> str:
        source = harness.ROOT / match["file"]
        folder = {path.stem: harness.load(path) for path in sorted(source.glob("*.json"))}
        table = TABLES[match["name"]](folder or harness.load(source))
        return f"{match[1]}\n{markdown(table)}\n{match['end']}"

    return MARK.sub(fill, page)


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    stale = []
    for name in PAGES:
        page = harness.ROOT / name
        old = page.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(name)
            print(f"{name}: tables {'differ from the results' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    if "--pictures" in arguments:
        for name in plots.DRAWN:
            for result in sorted(harness.RESULTS.glob(f"*/{name}.json")):
                plots.draw(harness.load(result), result)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
