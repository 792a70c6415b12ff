"""`nn.Conv2d`, as PEFT has LoRA on it: A is a convolution like the layer's, and B one of a single pixel.

    image --padded, one row for each place of the output--> rows [T, C * kh * kw] --lora_linear--> added to the output

A is without dilation and pads with zeros, whatever the layer does: so PEFT 0.21 computes.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.layers.host import Host, LoraLayer, routing_of
from xpu_lora_compile.ops import lora_linear


class ConvLayer(LoraLayer):
    """A convolution that adds `B[i] @ A[i] @ patch` at each place of the images of adapter i.

    Buffers: `lora_a` `[K, R, C * kh * kw]`, `lora_b` `[K, W, R]`, with scaling folded into B.
    """

    lora_features = 3
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each image's adapter added while a `bank.use` block runs."""
        images = input if input.dim() == 4 else input.unsqueeze(0)
        slots = routing_of(self).rows_of(self, images, 3)
        output = self.without_lora(input)
        if slots is None:
            return output
        base = (output if output.dim() == 4 else output.unsqueeze(0)).permute(0, 2, 3, 1)
        batch, height, width, columns = base.shape
        rows = self.patches(images).reshape(batch * height * width, self.lora_a.shape[2])
        indices = slots.unsqueeze(1).expand(batch, height * width).reshape(-1)
        ranks = None if rows.device.type == "cpu" else routing_of(self).ranks
        added = lora_linear(base.reshape(-1, columns), rows, [self.lora_a], [self.lora_b], indices, [0], ranks=ranks)
        result = added.view(batch, height, width, columns).permute(0, 3, 1, 2)
        # What follows may ask for a view of the memory format that the layer has without LoRA.
        return (result.contiguous() if output.is_contiguous() else result).view(output.shape)

    def patches(self, images: Tensor) -> Tensor:
        """What each place of the output sees, `[B, H', W', C, kh, kw]`: a view of the padded images.

        Args:
            images: `[B, C, H, W]`.
        """
        (high, wide), (down, right) = self.kernel_size, self.stride
        if self.padding == "same":
            top, left = (high - 1) // 2, (wide - 1) // 2
            sides = left, wide - 1 - left, top, high - 1 - top
        else:
            vertical, horizontal = (0, 0) if isinstance(self.padding, str) else self.padding
            sides = horizontal, horizontal, vertical, vertical
        padded = nn.functional.pad(images, sides) if any(sides) else images
        return padded.unfold(2, high, down).unfold(3, wide, right).permute(0, 2, 3, 1, 4, 5)


class Conv2d(Host):
    """A convolution of images with one group of channels.

    PEFT's A has no dilation, so that its result has other sizes than that of a layer with some; but for padding="same".
    """

    name = "nn.Conv2d"
    mixin = ConvLayer

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is nn.Conv2d, or a subclass with the same forward."""
        if not issubclass(kind, nn.Conv2d):
            return False
        return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward

    def takes(self, module: nn.Module) -> bool:
        """Return whether PEFT's A gives as many places as it does."""
        if not super().takes(module):
            return False
        conv = cast("nn.Conv2d", module)
        dilated = [size > 1 and step > 1 for size, step in zip(conv.kernel_size, conv.dilation, strict=True)]
        return conv.groups == 1 and (conv.padding == "same" or not any(dilated))

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return the sizes of A and B as matrices, which "all-linear" of PEFT leaves out."""
        conv = cast("nn.Conv2d", module)
        high, wide = conv.kernel_size
        features = conv.in_channels * high * wide
        return ModuleSizes("linear", features, conv.out_channels, padded=False, by_name=True, kernel=(high, wide))

    def weight_of(self, module: nn.Module) -> Tensor:
        """As `Host.weight_of`: `[O, C * kh * kw]`."""
        return super().weight_of(module).flatten(1)
