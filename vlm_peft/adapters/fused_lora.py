"""Fused LoRA: peft's linear layers in training, in two or three matrix products and nothing else.

Stage: between peft's wrapping and `layer.compile()`; called before training. peft casts the input to fp32, scales and
adds in kernels of their own, and reads the same input once per layer. Here the layers compute
y = x W^T + (x A^T)(s B)^T in the compute dtype over peft's own weights, and layers that share their input (query, key
and value; gate and up) are one layer: their A stacked, their B block by block, their frozen W in one buffer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that read one input."""


# Operators of their own: what a compiler makes of an autograd function depends on its version, and a gradient that
# it loses is lost in silence. What lies inside is not worth fusing with its surroundings: all of it is matrix products.
@torch.library.custom_op("vlm_peft::lora_product", mutates_args=())
def _lora_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, is_wide: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(M, K)`, `(N, K)`, `(N,)`, fp32 `(R, K)` and `(N, R)` -> x W^T + bias + (x A^T) B^T and x A^T."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    reduced = x @ a.t()
    if is_wide:
        # LoRA as further columns of the frozen product writes y once.
        return nn.functional.linear(torch.cat([x, reduced], 1), torch.cat([weight, b], 1), bias), reduced
    return _add_product(nn.functional.linear(x, weight, bias), reduced, b.t()), reduced


@_lora_product.register_fake
def _(x, weight, bias, a, b, is_wide):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(a))


@torch.library.custom_op("vlm_peft::lora_product_backward", mutates_args=())
def _lora_product_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    reduced: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    is_wide: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x in its dtype, of A and B in fp32."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    gradient = gradient.contiguous()
    if is_wide:
        x_gradient, reduced_gradient = (gradient @ torch.cat([weight, b], 1)).split([x.shape[1], len(a)], 1)
    else:
        x_gradient, reduced_gradient = gradient @ weight, gradient @ b
    return (
        _add_product(x_gradient, reduced_gradient, a),
        _outer(reduced_gradient, x),
        _outer(reduced, gradient).t().contiguous(),
    )


@_lora_product_backward.register_fake
def _(gradient, x, reduced, weight, a, b, is_wide):
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, weight, _, a, b, ctx.is_wide = inputs
    ctx.save_for_backward(x, output[1], weight, a, b)


def _backward(ctx, gradient, _):
    x_gradient, a_gradient, b_gradient = _lora_product_backward(gradient, *ctx.saved_tensors, ctx.is_wide)
    return x_gradient, None, None, a_gradient, b_gradient, None


_lora_product.register_autograd(_backward, setup_context=_keep_for_backward)


def _is_half(x: torch.Tensor) -> bool:
    """Whether sums of this operand's products are to be had in fp32, or added by a kernel of ours."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _outer(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """h^T x in fp32."""
    return torch.mm(h.t(), x, out_dtype=torch.float32) if _is_half(x) else (h.t() @ x).float()


def _add_product(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + h b."""
    if not _is_half(y):
        return torch.addmm(y, h, b)
    from ..model.cuda.skinny import add_product

    return add_product(y, h, b)


class _SharedInput:
    """Layers that read one input, computed together when the first of them is asked.

    Args:
        layers (`Sequence[FusedLinear]`): One, or several whose frozen weights lie in one buffer from here on. Several
            take LoRA as further columns of the frozen product: one more copy of the input instead of one more pass
            over the output.
    """

    def __init__(self, layers: Sequence["FusedLinear"]):
        self.layers = list(layers)
        self.sizes = [layer.base_layer.out_features for layer in layers]
        bases: list[Any] = [layer.base_layer for layer in layers]
        self.weight: torch.Tensor = bases[0].weight
        self.bias: torch.Tensor | None = bases[0].bias
        if len(layers) > 1:
            self.weight = torch.cat([base.weight.detach() for base in bases])
            for base, part in zip(bases, self.weight.split(self.sizes), strict=True):
                base.weight.data = part
            if self.bias is not None:
                self.bias = torch.cat([base.bias.detach() for base in bases])
                for base, part in zip(bases, self.bias.split(self.sizes), strict=True):
                    base.bias.data = part
        self.input: torch.Tensor | None = None
        self.outputs: list[Any] = []

    def __call__(self, layer: "FusedLinear", x: torch.Tensor) -> torch.Tensor:
        """Of `x` `(..., K)`, the output `(..., N)` of one of the layers; the others' wait until they are asked."""
        if len(self.layers) == 1:
            return self._compute(x)
        if self.input is not x:
            self.input, self.outputs = x, list(self._compute(x).split(self.sizes, -1))
        y, self.outputs[layer.place] = self.outputs[layer.place], None
        if all(output is None for output in self.outputs):
            self.input, self.outputs = None, []
        return y

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        reducing: list[Any] = [layer.lora_A[layer.fused_adapter].weight for layer in self.layers]
        growing = [
            layer.lora_B[layer.fused_adapter].weight * layer.scaling[layer.fused_adapter] for layer in self.layers
        ]
        a = torch.cat(reducing) if len(reducing) > 1 else reducing[0]
        b = torch.block_diag(*growing) if len(growing) > 1 else growing[0]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        y, _ = _lora_product(rows, self.weight.to(dtype), bias, a, b, len(self.layers) > 1)
        return y.view(*x.shape[:-1], -1)


class FusedLinear(lora.Linear):
    """peft's linear layer with [`fuse_lora`] on: the same parameters and methods, another forward in training."""

    shared_input: _SharedInput
    place: int
    fused_adapter: str

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As peft's; in evaluation, merged, disabled, or with other adapters than at [`fuse_lora`], peft's own."""
        if args or kwargs or not all(layer.is_fused for layer in self.shared_input.layers):
            return super().forward(x, *args, **kwargs)
        return self.shared_input(self, x)

    @property
    def is_fused(self) -> bool:
        """Whether the layer computes what was fused, now."""
        return (
            self.training
            and not self.disable_adapters
            and not self.merged
            and len(self.active_adapters) == 1
            and self.active_adapters[0] == self.fused_adapter
        )


def fuse_lora(model: nn.Module) -> list[str]:
    """Lets peft's LoRA layers train in fewer kernels, in place; parameters, files and merging stay peft's.

    Query, key and value are computed in one product, gate and up too: their frozen weights become views of one buffer.
    Gradients are peft's: equal in fp32, and in the compute dtype of autocast rounded at other places. Call it with the
    model on its device and in its dtype, after peft's wrapping and before `layer.compile()`.

    Args:
        model (`nn.Module`): With LoRA layers somewhere inside.

    Returns:
        `list[str]`: The layers that stay peft's, as `name: reason`.
    """
    left_out: list[str] = []
    fused: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLayer) and type(module) is not FusedLinear:
            reason = _why_not(module)
            if reason is not None:
                left_out.append(f"{name}: {reason}")
            else:
                module.__class__ = FusedLinear
                module.fused_adapter = module.active_adapters[0]
                fused[name] = module
    while fused:
        parent, _, own = next(iter(fused)).rpartition(".")
        names = next((names for names in _SHARED_INPUT if own in names), ())
        neighbours = [f"{parent}.{name}" for name in names]
        if not all(name in fused for name in neighbours) or not _fit([fused[name] for name in neighbours]):
            neighbours = []
        layers = [fused.pop(name) for name in neighbours or [next(iter(fused))]]
        group = _SharedInput(layers)
        for place, layer in enumerate(layers):
            layer.shared_input, layer.place = group, place
    return left_out


def unfuse_lora(model: nn.Module) -> None:
    """Gives every layer of [`fuse_lora`] peft's own forward back, in place."""
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = lora.Linear  # type: ignore[assignment]
            del module.shared_input, module.place, module.fused_adapter


@contextmanager
def lora_in_place(model: nn.Module) -> Iterator[None]:
    """Runs the block with LoRA added to the weights of plain linear layers: a token is generated in half the time.

    Afterwards the layers have their own weights again, not what is left of a sum.

    Args:
        model (`nn.Module`): With LoRA layers somewhere inside; quantized ones and those with a form of their own stay.
    """
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, lora.Linear)]
    layers = [
        layer
        for layer in adapted
        if type(layer.get_base_layer().weight) is nn.Parameter
        and not (layer.merged or layer.disable_adapters or layer.lora_variant or any(layer.lora_bias.values()))
    ]
    weights = [layer.get_base_layer().weight.data for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge(safe_merge=True)
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()


def _fit(layers: list[FusedLinear]) -> bool:
    weights = [layer.base_layer.weight for layer in layers]
    biases = [layer.base_layer.bias for layer in layers]
    return (
        len({(layer.in_features, weight.dtype, weight.device) for layer, weight in zip(layers, weights, strict=True)})
        == 1
        and len({None if bias is None else bias.dtype for bias in biases}) == 1
        and len({layer.fused_adapter for layer in layers}) == 1
    )


def _why_not(layer: lora.LoraLayer) -> str | None:
    """Why a layer cannot be fused, if so."""
    base = layer.get_base_layer()
    if type(layer) is not lora.Linear:
        return f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}, not a plain linear layer"
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter:
        return f"its base is {type(base).__name__} of {type(base.weight).__name__}, not a plain linear layer"
    if len(layer.active_adapters) != 1 or list(layer.lora_A) != list(layer.active_adapters):
        return f"adapters {', '.join(layer.lora_A)}, not one"
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_variant:
        return type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
    if getattr(layer.lora_dropout[adapter], "p", 0) > 0:
        return f"dropout {layer.lora_dropout[adapter].p}"
    if layer.lora_bias[adapter]:
        return "lora_bias"
    if layer.fan_in_fan_out:
        return "its weight is stored transposed"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "its base trains"
    if hasattr(base, "_hf_hook"):
        return "its base is offloaded"
    return None
