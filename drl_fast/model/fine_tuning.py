"""Train a CLIP's towers for less: checkpointed activations, compiled blocks, low-rank adapters, frozen blocks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import open_clip
import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from .towers import OF_LOSS, text_tower

# Where open_clip's models keep the repeated blocks: its own towers, timm's, and Hugging Face's BERT, T5 and M2M-100.
BLOCKS = {
    "image": ("visual.transformer.resblocks", "visual.trunk.blocks"),
    "text": (
        "transformer.resblocks",
        "text.transformer.resblocks",
        "text.transformer.encoder.layer",
        "text.transformer.block",
        "text.transformer.layers",
    ),
}
# Its blocks may take rotations of three dimensions, which no batch has.
TIMM = "visual.trunk.blocks"
# What stands behind the last block: names in the modules that hold the blocks. All others stand before the first.
BEHIND = (
    *("ln_post", "proj", "ln_final", "text_projection", "attn_pool"),
    *("norm", "fc_norm", "head"),
    *("final_layer_norm", "layer_norm", "pooler"),
)
# Compiled versions of a block's code: two towers, with and without gradients, in training and evaluation, some frozen.
VERSIONS = 64

Clip: TypeAlias = open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa
Model = TypeVar("Model", bound=nn.Module)


def find_blocks(clip: Clip, option: str) -> dict[str, list[nn.Module]]:
    """Return each tower's transformer blocks, by their path in the model: the image tower's, then the text tower's.

    Args:
        option: what needs them, as ``"lora=8"``, for the error.

    Raises:
        ValueError: a tower without transformer blocks, such as a ResNet.
    """
    found: dict[str, list[nn.Module]] = {}
    for side, paths in BLOCKS.items():
        for path in paths:
            with contextlib.suppress(AttributeError):
                found[path] = list(clip.get_submodule(path).children())
                break
        else:
            raise ValueError(
                f"clip must have towers of transformer blocks with {option}, got {_tower_name(clip, side)} as {side} "
                "tower; leave the option out, or choose a ViT"
            )
    return found


def _tower_name(clip: Clip, side: str) -> str:
    tower = clip.visual if side == "image" else text_tower(clip)
    inner = getattr(tower, "trunk", getattr(tower, "transformer", tower))
    return type(inner).__name__


# --- checkpointing ----------------------------------------------------------------------------------------------------
def checkpoint_towers(clip: Clip) -> None:
    """Keep only the inputs of the blocks for the backward, which computes the rest again: the same gradients.

    Raises:
        ValueError: a tower for which open_clip has no checkpointing; it is named.
    """
    towers = {"image": clip.visual, "text": clip.transformer if isinstance(clip, open_clip.CLIP) else clip.text}
    for side, tower in towers.items():
        error: Exception | None = None
        try:
            if hasattr(tower, "set_grad_checkpointing"):
                tower.set_grad_checkpointing(True)
            else:  # the original CLIP's text blocks
                tower.grad_checkpointing = True
        except Exception as raised:  # whatever the tower's library raises where it has none
            error = raised
        # Some towers ignore the call. Those that heed it mark themselves, or their blocks.
        marks = (vars(m).get("grad_checkpointing") or vars(m).get("gradient_checkpointing") for m in tower.modules())
        if error is not None or not any(marks):
            raise ValueError(
                f"checkpoint_towers must be false for this clip, got true: its {side} tower, "
                f"{_tower_name(clip, side)}, has no checkpointing; set chunk to bound memory instead"
            ) from error


# --- compilation ------------------------------------------------------------------------------------------------------
class _Compiled:
    """The compiled call of one block. Its inputs are laid out so that no later step compiles again."""

    def __init__(self, call: Callable[..., Any], pad: bool) -> None:
        self.call, self.pad = torch.compile(call, dynamic=True), pad

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A part of an attention mask has other strides than the whole mask.
        args, kwargs = _each(torch.Tensor.contiguous, args, kwargs)
        if not self.pad or len(x) != 1:
            return self.call(x, *args, **kwargs)
        # A single row would be compiled by itself. Masks of three dimensions and more have rows, too.
        args, kwargs = _each(lambda y: torch.cat([y, y]) if y.dim() >= 3 else y, args, kwargs)
        found = self.call(torch.cat([x, x]), *args, **kwargs)
        return found[:1] if isinstance(found, Tensor) else _each(lambda y: y[:1], tuple(found), {})[0]


def _each(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the tensors among arguments."""

    def changed(x: Any) -> Any:
        return change(x) if isinstance(x, Tensor) else x

    return tuple(map(changed, args)), {name: changed(x) for name, x in kwargs.items()}


def compile_towers(clip: Clip, device: torch.device) -> None:
    """Compile every block of both towers at its first call; names, copies and pickles stay as they are.

    One compiled block serves all blocks of its tower, any number of frames and captions, and any length of captions
    (of timm's towers a single frame is compiled by itself). Training, training in chunks and evaluation compile once
    each. A copy of the model is not compiled.

    This changes two settings of torch.compile for the process: a dimension is no longer assumed to equal another one
    that has the same size in the first step, and a function may have more compiled versions.

    Raises:
        ValueError: a tower without transformer blocks, or a machine that cannot compile.
    """
    import torch._dynamo.config
    import torch.fx.experimental._config

    found = find_blocks(clip, "compile=true")
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's own error is wrapped in several ways
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"compile must be false on a machine where torch.compile fails ({reason}), got true; install a C++ "
            "compiler such as g++ (on a GPU also Triton), or leave compile out"
        ) from error
    for path, blocks in found.items():
        for block in blocks:
            # Module.compile() sets this attribute, which copies and pickles leave out.
            block._compiled_call_impl = _Compiled(block._call_impl, pad=path != TIMM)


# --- adapters ---------------------------------------------------------------------------------------------------------
class LinearAttention(nn.Module):
    """Self-attention of an ``nn.MultiheadAttention`` whose projections are linear layers, which adapters can wrap.

    ``nn.MultiheadAttention`` reads its weights past the layers that hold them. peft's adapter for it replaces the
    weights in every forward and subtracts its change afterwards, so that frozen weights drift by rounding, and sharded
    or compiled ones break.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        self.num_heads = attention.num_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=attention.in_proj_bias is not None, device="meta")
        self.in_proj.weight = attention.get_parameter("in_proj_weight")
        self.in_proj.register_parameter("bias", attention.in_proj_bias)
        self.out_proj = attention.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attend from (N, L, D) to itself; ``key`` and ``value`` are the query, as in all blocks of a tower.

        Args:
            attn_mask: (L, L) or (N heads, L, L), added to the products.
        """
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        packed = self.in_proj(query).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(found.transpose(1, 2).flatten(2)), None

    def restore(self) -> nn.MultiheadAttention:
        """Return the attention that this one was made of, with the weights of today."""
        bias = self.in_proj.bias is not None
        width = self.in_proj.in_features
        attention = nn.MultiheadAttention(width, self.num_heads, bias=bias, batch_first=True, device="meta")
        attention.in_proj_weight = self.in_proj.get_parameter("weight")
        attention.register_parameter("in_proj_bias", self.in_proj.bias)
        attention.out_proj = self.out_proj
        return attention


def add_adapters(clip: Clip, rank: int) -> None:
    """Freeze a CLIP and add adapters (LoRA) to all linear layers of its blocks. Its outputs stay the same.

    Adapters start from torch's random numbers, and at 0; their factor alpha / rank is 1. The temperature trains on.

    Raises:
        ValueError: peft is missing, a rank above the layers' width, or a tower without transformer blocks or with an
            attention of another form.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lora must be 0 without the package peft, got {rank}; install it with: pip install 'drl-fast[lora]'"
        ) from error
    targets = []
    for path, blocks in find_blocks(clip, f"lora={rank}").items():
        for i, block in enumerate(blocks):
            for name, module in list(block.named_modules()):
                if "in_proj_weight" in module._parameters:
                    block.set_submodule(name, LinearAttention(_checked(module, rank)))
                if isinstance(module, EvaAttention):
                    # Else it reads the weight past the layer, and the adapter of queries, keys and values does nothing.
                    module.qkv_bias_separate = True
            targets += [f"{path}.{i}.{name}" for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    narrowest = min(min(clip.get_submodule(name).weight.shape) for name in targets)
    if rank > narrowest:
        raise ValueError(
            f"lora must be at most {narrowest}, the width of the narrower tower's layers, got {rank}; try 8"
        )
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    peft.inject_adapter_in_model(config, clip)
    clip.logit_scale.requires_grad_(True)


def _checked(attention: nn.Module, rank: int) -> nn.MultiheadAttention:
    """Return an attention if :class:`LinearAttention` can replace it."""
    if (
        isinstance(attention, nn.MultiheadAttention)
        and attention._qkv_same_embed_dim
        and attention.batch_first
        and attention.dropout == 0
        and attention.bias_k is None
    ):
        return attention
    raise ValueError(
        f"lora must be 0 for this clip, got {rank}: adapters do not fit the attention of its blocks, "
        f"{type(attention).__module__}.{type(attention).__name__}; choose a ViT of the usual form, such as ViT-B-32"
    )


@torch.no_grad()
def merge_adapters(model: Model) -> Model:
    """Return a copy of a model whose ``clip`` has adapters, with the adapters added to the CLIP's weights.

    The copy is built as the model was before :func:`add_adapters`, and peft is not needed to read it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    clip = merged.get_submodule("clip")
    for name, module in list(clip.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            clip.set_submodule(name, module.get_base_layer())
    for name, module in list(clip.named_modules()):
        if isinstance(module, LinearAttention):
            clip.set_submodule(name, module.restore())
    del clip.peft_config
    return merged


# --- frozen blocks ----------------------------------------------------------------------------------------------------
def freeze_layers(clip: Clip, count: int) -> None:
    """Freeze both towers' embeddings and first ``count`` blocks. All that stands behind them trains, norms included.

    Raises:
        ValueError: a tower with fewer blocks, or without transformer blocks.

    Source: CLIP4Clip's ``freeze_layer_num``.
    """
    found = find_blocks(clip, f"freeze_layers={count}")
    fewest = min(map(len, found.values()))
    if count > fewest:
        raise ValueError(f"freeze_layers must be at most {fewest}, the blocks of the shorter tower, got {count}")
    for name, p in clip.named_parameters():
        path = next((path for path in found if name.startswith(f"{path}.")), None)
        if path is not None:
            behind = int(name.removeprefix(f"{path}.").partition(".")[0]) >= count
        else:
            behind = _stands_behind(name, found)
        if not behind and name not in OF_LOSS:
            p.requires_grad_(False)


def _stands_behind(name: str, paths: Iterable[str]) -> bool:
    """Return whether a parameter outside of the blocks stands behind them, by its name in the innermost holder."""
    holders = {""} | {f"{path.rsplit('.', i)[0]}." for path in paths for i in range(1, path.count(".") + 1)}
    holder = max((holder for holder in holders if name.startswith(holder)), key=len)
    return name.removeprefix(holder).partition(".")[0] in BEHIND


def count_parameters(clip: Clip) -> tuple[int, int]:
    """Return how many numbers of a CLIP's towers train, and how many there are, adapters included."""
    towers = [p for name, p in clip.named_parameters() if name not in OF_LOSS]
    return sum(p.numel() for p in towers if p.requires_grad), sum(p.numel() for p in towers)
