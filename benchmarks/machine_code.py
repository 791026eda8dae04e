"""Read the machine code (SASS) that ptxas makes of a Triton kernel: loops, instructions by pipe, waits, barriers.

NVIDIA does not document this code. The mnemonics and their pipes below are those of compute capability 8.0 to 10.0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
TARGET = re.compile(r"\(?`?\(?(\.L_x_\d+)")
TENSOR = {"mma": "HMMA", "wgmma": "HGMMA", "tcgen05": "UTC"}
# The first pattern that a mnemonic matches names its pipe. Uniform instructions (U...) run once per warp on a data
# path of their own; they are in "other", as are branches, barriers and waits.
PIPES = {
    "tensor": "H?MMA HGMMA UTC.*MMA",
    "copy": "LDGSTS UTMA.* UBLKCP",
    "local": "LDL STL",
    "ldg": "LDG LD",
    "stg": "STG ST RED ATOMG?",
    "lds": "LDS LDSM ATOMS LDTM",
    "sts": "STS STSM STTM",
    "shfl": "SHFL",
    "mufu": "MUFU I2F F2I F2F FRND POPC FLO",
    "fma": "FFMA2? FMUL2? FADD2? IMAD HFMA2 HADD2 HMUL2",
    "other": "U.* R2UR S2R S2UR CS2R LDC.* VOTE.* BRA BRX BSSY BSYNC BREAK CALL RET EXIT NOP NANOSLEEP ELECT BMOV LEPC "
    "BAR WARPSYNC.* WARPGROUP .*DEPBAR SYNCS MEMBAR FENCE ERRBAR CCTL.* DFMA DADD DMUL DSETP",
    "alu": ".*",
}


class Code:
    """A kernel's instructions, in basic blocks."""

    def __init__(self, sass: str) -> None:
        self.instructions: list[tuple[str, str, str]] = []  # mnemonic, operands, whole line
        labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(self.instructions)
            elif found := INSTRUCTION.match(line):
                self.instructions.append((found[1], found[2], line))
        self.labels = labels

    @cached_property
    def blocks(self) -> list[range]:
        """Basic blocks, in the order of the code."""
        n = len(self.instructions)
        starts = {0, *self.labels.values()}
        starts |= {i + 1 for i, (name, _, _) in enumerate(self.instructions) if name in ("BRA", "EXIT", "RET", "BRX")}
        ordered = sorted(start for start in starts if start < n)
        return [range(a, b) for a, b in zip(ordered, [*ordered[1:], n], strict=True)]

    @cached_property
    def successors(self) -> list[list[int]]:
        at = {block.start: i for i, block in enumerate(self.blocks)}
        result = []
        for i, block in enumerate(self.blocks):
            name, operands, line = self.instructions[block[-1]]
            conditional = re.search(r"\*/\s+@|\bU?P\d", line.partition("BRA")[0] + operands.partition("`")[0])
            following = [i + 1] if i + 1 < len(self.blocks) else []
            if name == "BRA":
                target = TARGET.search(operands)
                to = [at[self.labels[target[1]]]] if target and self.labels.get(target[1]) in at else []
                following = [*to, *(following if conditional else [])]
            elif name in ("EXIT", "RET", "BRX") and not conditional:
                following = []
            result.append(following)
        return result

    @cached_property
    def dominators(self) -> list[set[int]]:
        """Of each block: the blocks on every path to it. Blocks that the entry does not reach have none."""
        n = len(self.blocks)
        before: list[list[int]] = [[] for _ in range(n)]
        for i, following in enumerate(self.successors):
            for j in following:
                before[j].append(i)
        found: list[set[int] | None] = [None] * n
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for i in range(1, n):
                known = [found[j] for j in before[i] if found[j] is not None]
                if not known:
                    continue
                new = set.intersection(*known) | {i}  # type: ignore[arg-type]
                if new != found[i]:
                    found[i], changed = new, True
        return [x or set() for x in found]

    @cached_property
    def loops(self) -> list[tuple[set[int], set[int]]]:
        """Natural loops as (blocks, the blocks that each iteration runs), the innermost first; no spinning waits."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for i, following in enumerate(self.successors):
            for j in following:
                before[j].append(i)
        bodies: dict[int, set[int]] = {}
        latches: dict[int, list[int]] = {}
        for i, following in enumerate(self.successors):
            for head in following:
                if head in self.dominators[i]:
                    body, stack = bodies.setdefault(head, {head}), [i]
                    latches.setdefault(head, []).append(i)
                    while stack:
                        block = stack.pop()
                        if block not in body:
                            body.add(block)
                            stack.extend(before[block])
        found = []
        for head, body in bodies.items():
            if sum(len(self.blocks[i]) for i in body) <= 8:
                continue  # waits for a copy, or the endless loop after the end
            always = set.intersection(*(self.dominators[i] for i in latches[head])) & body
            found.append((body, always))
        return sorted(found, key=lambda loop: len(loop[0]))

    def count(self, blocks: Iterator[int] | set[int] | range) -> Counter[str]:
        """Count the instructions of some blocks by pipe."""
        return Counter(pipe(self.instructions[at][0]) for i in blocks for at in self.blocks[i])

    def has(self, blocks: set[int], name: str) -> bool:
        return any(self.instructions[at][0].startswith(name) for i in blocks for at in self.blocks[i])

    def mnemonics(self, name: str) -> int:
        return sum(mnemonic.startswith(name) for mnemonic, _, _ in self.instructions)

    @property
    def tensor_core(self) -> str:
        """Name the tensor-core instruction in use, "" if there is none."""
        kinds = [kind for kind in ("tcgen05", "wgmma") if self.mnemonics(TENSOR[kind])]
        return kinds[0] if kinds else "mma" if self.mnemonics("HMMA") else ""

    @property
    def serialised(self) -> bool:
        """Say whether each of several WGMMA waits for the one before. ptxas does that without a message."""
        lines = [line for name, _, line in self.instructions if name == "HGMMA"]
        return len(lines) > 1 and all("gsb0" in line for line in lines)

    def product_loop(self) -> tuple[Counter[str], Counter[str], Counter[str]] | None:
        """Count instructions by pipe in the innermost loop with tensor-core products; None if there is none.

        Three parts: what each iteration runs; what some iterations run, or the next loop around it (the work after
        a product's last step); all other code.
        """
        loops = [loop for loop in self.loops if any(self.has(loop[0], name) for name in ("HGMMA", "HMMA", "UTC"))]
        if not loops:
            return None
        body, always = loops[0]
        # One thread of a block issues them there, so they stand behind a branch.
        always = always | {i for i in body if self.has({i}, "UTC") or self.has({i}, "UTMALDG")}
        outer = next((loop[0] for loop in loops[1:] if loop[0] > body), set()) if body == always else body
        rest = set(range(len(self.blocks))) - body - outer
        return self.count(always), self.count((outer | body) - always), self.count(rest)

    def hot_loop(self) -> tuple[Counter[str], int]:
        """Return pipes and bytes per thread, loaded from or stored to global memory, of the loop that moves most."""
        everything = set(range(len(self.blocks)))
        candidates = [body for body, _ in self.loops if self.bytes_moved(body)] or [everything]
        inner = [a for a in candidates if not any(b < a for b in candidates)]
        best = max(inner, key=self.bytes_moved)
        return self.count(best), self.bytes_moved(best)

    def bytes_moved(self, blocks: set[int]) -> int:
        """Sum the bytes per thread of global loads, stores and copies."""
        total = 0
        for i in blocks:
            for at in self.blocks[i]:
                name, operands, _ = self.instructions[at]
                if name in ("LDG", "STG", "LDGSTS"):
                    width = re.search(r"\.(128|64|[US]?16|[US]?8)\b", operands)
                    total += {"128": 16, "64": 8, "16": 2, "8": 1}[width[1].lstrip("US")] if width else 4
        return total

    def missing_barriers(self, warps: int, operand_bytes: int) -> list[str]:
        """List writes to shared memory that may overtake another warp group's WGMMA.

        A wait for WGMMA covers only the own warp group (4 warps). Before shared memory that the WGMMA reads is written
        again, all warps must therefore pass a barrier after the wait. Triton could leave it out until its pull request
        11056 (issue 11047). Checked on every path from a wait: asynchronous copies and stores to shared memory. Writes
        that start beyond ``operand_bytes`` are left out: no WGMMA reads there, because Triton places the largest of its
        long-lived buffers first and scratch memory after them.
        """
        if warps <= 4:
            return []
        found: dict[int, str] = {}
        waiting = [False] * len(self.blocks)
        todo = list(range(len(self.blocks)))
        while todo:
            i = todo.pop()
            open_ = waiting[i]
            for at in self.blocks[i]:
                name, operands, line = self.instructions[at]
                if name == "WARPGROUP" and operands.startswith(".DEPBAR"):
                    open_ = True
                elif name == "BAR":
                    open_ = False
                elif open_ and _writes_operands(name, operands, operand_bytes):
                    found[at] = " ".join(line.split())
            for j in self.successors[i]:
                if open_ and not waiting[j]:
                    waiting[j] = True
                    todo.append(j)
        return [found[at] for at in sorted(found)]


def _writes_operands(name: str, operands: str, operand_bytes: int) -> bool:
    if name in ("UTMALDG", "UBLKCP"):
        return True
    if name not in ("STS", "STSM", "LDGSTS"):
        return False
    offset = re.search(r"^[^\[]*\[[^\]]*\+0x([0-9a-f]+)\]", operands)
    return (int(offset[1], 16) if offset else 0) < operand_bytes


@cache
def pipe(mnemonic: str) -> str:
    """Return the pipe that executes an instruction."""
    return next(name for name, patterns in PIPES.items() if re.fullmatch("|".join(patterns.split()), mnemonic))
