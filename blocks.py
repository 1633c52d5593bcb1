"""Prunable CNN and ViT blocks, and what the four stages share.

UPDP prunes depth: it replaces whole blocks of a network by smaller ones that merge into one layer
each (Liu et al., "UPDP: A Unified Progressive Depth Pruner for CNN and Vision Transformer", AAAI
2024). Every prunable block has a baseline form and a pruned one, and `lam`, the paper's λ, leads
from one to the other:

    lam = 0   the baseline block: timm's own forward, bit for bit
    lam = 1   the pruned block: linear up to its last activation (in a ViT: the MLP half), so that
              `fuse()` can make plain layers of it, with norms and skip folded in, exactly

The pruned block comes in two forms, which merge into layers of the same shape:

    reparam   the paper's: the block's own layers. With lam, activations inside become the identity,
              LayerNorm becomes BatchNorm, and an activation is inserted at the end. What is linear
              then is composed into one layer (reparameterisation).
    fitted    new layers of the merged shape, which `fit` solves in closed form so that they
              reproduce the block's output. lam blends the outputs. It prunes without training, and
              takes blocks whose own layers cannot be merged (squeeze-excite).

    timm class                    reparam form, lam = 1              ladder
    resnet.BasicBlock             conv1, bn1, centre of conv2, bn2   dense, 1x1, skip
    InvertedResidual              its convs and BNs                  dense, separable, 1x1, skip
    convnext.ConvNeXtBlock        conv_dw, BatchNorm, γ, fc2, fc1    separable, depthwise, skip
    vision_transformer.Block      BatchNorm, fc2, fc1 for the MLP    linear, skip
    vision_transformer.Attention  fitted only, if asked for          linear, skip

The ladder's names say what a block merges into: one conv (dense, 1x1, depthwise), a depthwise and a
1x1 conv (separable), one linear layer, or nothing beside the skip (where no conv is in it). The
first rung is the paper's. Lower ones are always fitted, each cheaper than the one before.

The blocks come first, then networks of them, then what the stages share.
"""
import argparse
import contextlib
import copy
import csv
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import threading
import time
import zlib

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data.loader import PrefetchLoader, fast_collate
from timm.layers import Conv2dSame, Mlp, conv2d_same
from timm.models import _efficientnet_blocks, convnext, resnet, vision_transformer
from timm.utils import reparameterize_model
from timm.utils.distributed import init_distributed_device_so
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data.distributed import DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

BatchNorm = nn.modules.batchnorm._BatchNorm  # 1d, 2d, Sync and timm's BatchNormAct2d alike


class UserError(ValueError):
    """A mistake that the user can correct. The scripts print it as one line, `error: …`."""


# ---- pieces of a block ---------------------------------------------------------------------------

def blend(baseline, pruned, lam):
    """(1 - lam)·baseline() + lam·pruned(); at 0 and 1 the other form is not computed."""
    if lam == 0:
        return baseline()
    if lam == 1:
        return pruned()
    return (1 - lam) * baseline() + lam * pruned()


def fade(act, z, lam):
    """act(z) at lam = 0, z at 1. Many activations work in place, but between 0 and 1, z is used
    twice."""
    return act(z) if lam == 0 else blend(lambda: act(z.clone()), lambda: z, lam)


def on_rows(layers, x):
    """layers(x); tokens (B, N, C) go in as (B·N, C), over which a BatchNorm takes its average."""
    return layers(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.ndim == 3 else layers(x)


def replace_norm(norm, bn, like):
    """The BatchNorm `bn`, on the device of `like`, with weight and bias of `norm`, which it will
    replace. Its statistics are not those of any images yet: `recalibrate`, or train, before it is
    used."""
    bn = bn.to(like)
    for key, value in norm.named_parameters():  # weight, bias, or none
        getattr(bn, key).data.copy_(value.data)
    return bn


def weight_and_bias(layer):
    """Weight (C_out, C_in) and bias (C_out,) of a linear layer or a 1x1 conv."""
    weight = layer.weight.flatten(1)
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias


def compose(first, second):
    """Weight and bias of one layer that computes second(first(x)). Both are pairs of weight and
    bias; `second` is a matrix (O, M), `first` a matrix (M, I) or a kernel (M, I, k, k)."""
    (w1, b1), (w2, b2) = first, second
    return torch.einsum("om,mi...->oi...", w2, w1), w2 @ b1 + b2


def compose_mlp(mlp, scale=None):
    """Weight (C_out, C_in) and bias of scale * fc2(fc1(x)), in timm's Mlp without its activation.
    scale: None or (C_out,)."""
    weight, bias = compose(weight_and_bias(mlp.fc1), weight_and_bias(mlp.fc2))
    return (weight, bias) if scale is None else (weight * scale[:, None], bias * scale)


def fade_mlp(mlp, x, lam):
    """timm's Mlp on x (..., C), with its activation fading out. At lam = 1 fc2·fc1 is one matrix,
    at an eighth of the cost."""
    if lam == 0:
        return mlp(x)
    if lam == 1:
        return mlp.drop2(F.linear(x, *compose_mlp(mlp)))
    z = F.linear(x, *weight_and_bias(mlp.fc1))
    return mlp.drop2(F.linear(mlp.drop1(fade(mlp.act, z, lam)), *weight_and_bias(mlp.fc2)))


def own_mlp_obstacle(block):
    """Why the two linear layers of a block's MLP cannot be composed, or None."""
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
        return f"no plain MLP inside ({type(block.mlp).__name__})"


def own_convs_obstacle(convs, norms):
    """Why convs, each with a norm behind it, cannot be composed, or None."""
    if any(type(conv) not in (nn.Conv2d, Conv2dSame) or conv.bias is not None for conv in convs):
        return "convs with a bias, or of another kind, inside"
    if not all(isinstance(norm, BatchNorm) for norm in norms):
        return "no BatchNorm inside"


def inner(weight, size):
    """The inner size x size taps of a kernel (O, I, k, k)."""
    crop = (weight.shape[2] - size) // 2
    return weight[:, :, crop:crop + size, crop:crop + size]


def padding_for(conv, size):
    """Padding with which a kernel of size x size sees the same centres as that of `conv`."""
    less = (conv.kernel_size[0] - size) // 2
    return tuple(p - less * d for p, d in zip(conv.padding, conv.dilation))


def conv_like(conv, weight, bias=None, groups=1):
    """`conv` with another weight, perhaps of fewer taps, and bias. Stride and dilation stay, and so
    does the class: convs of TensorFlow's networks compute their padding at run time."""
    conv = copy.deepcopy(conv)
    conv.padding, conv.kernel_size = padding_for(conv, weight.shape[2]), tuple(weight.shape[2:])
    conv.in_channels, conv.out_channels = weight.shape[1] * groups, len(weight)
    conv.groups, conv.weight = groups, nn.Parameter(weight.contiguous())
    conv.bias = None if bias is None else nn.Parameter(bias)
    return conv


def fade_taps(conv, x, size, lam):
    """conv(x), with the taps outside of its inner size x size fading out."""
    crop = (conv.kernel_size[0] - size) // 2
    if lam == 0 or crop == 0:
        return conv(x)
    weight, padding = inner(conv.weight, size), padding_for(conv, size)
    if lam < 1:
        again = F.pad(x.new_full((size, size), lam), 4 * [crop])  # what the inner taps get back
        weight, padding = conv.weight * (1 - lam + again), conv.padding
    run = conv2d_same if isinstance(conv, Conv2dSame) else F.conv2d
    return run(x, weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def zero(layer):
    """`layer` with an output of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def new_conv(like, in_channels, out_channels, size, groups=1):
    """A size x size conv with random weights and the stride of the conv `like`."""
    weight = like.weight.new_empty(out_channels, in_channels // groups, size, size)
    nn.init.kaiming_normal_(weight, mode="fan_out")
    return conv_like(like, weight, groups=groups)


def add_identity(weight):
    """Adds the skip to a conv kernel with odd k: 1 at [i, i, centre, centre] of a dense one
    (C, C, k, k), at [i, 0, centre, centre] of a depthwise one (C, 1, k, k)."""
    channels = torch.arange(len(weight), device=weight.device)
    inner(weight, 1)[channels, channels % weight.shape[1]] += 1


def pixel_rows(x):
    """(B, C, H, W) as (B·H·W, C), tokens (B, N, C) as (B·N, C)."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2)


def solve(gram, cross, ridge):
    """W (d, O) with the least squared error of Wᵀx to y, for inputs x of covariance `gram` (d, d)
    and outputs y of covariance `cross` (d, O) with x. ridge: a share of each input's variance."""
    scale = (gram.diagonal().clamp(min=0) + 1e-12).rsqrt()[:, None]
    system = gram * scale * scale.T + ridge * torch.eye(len(gram)).to(gram)
    return scale * torch.linalg.solve(system, cross * scale)


def separate(gram, cross, channels, ridge, rounds=3):
    """Depthwise kernels (C, taps) on whose outputs a 1x1 conv fits best. `gram` and `cross` are of
    a conv's `linear_inputs`. It starts from the dense solution, of which each input channel's part
    (taps, O) is brought to rank 1; then kernels and 1x1 conv are solved in turn."""
    dense = solve(gram, cross, ridge).unflatten(0, (channels, -1))
    taps = dense.shape[1]
    own = gram.unflatten(0, (channels, taps)).unflatten(2, (channels, taps))
    own = own.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (C, taps, taps): each channel's covariance
    share = 1e-6 * own.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    root = torch.linalg.cholesky(own + share[:, None, None] * torch.eye(taps).to(own))
    left = torch.linalg.svd(root.mT @ dense, full_matrices=False)[0][:, :, :1]
    kernels = torch.linalg.solve_triangular(root.mT, left, upper=True).flatten()
    for _ in range(rounds):
        depthwise = torch.block_diag(*kernels.view(channels, 1, taps))
        point = solve(depthwise @ gram @ depthwise.T, depthwise @ cross, ridge)  # (C, O)
        point = point.repeat_interleave(taps, 0)
        kernels = solve(gram * (point @ point.T), (cross * point).sum(1, keepdim=True), ridge)
    return kernels.view(channels, taps)


def bn_linear(in_features, out_features, like):
    """A BatchNorm and a linear layer on rows, with an output of 0 at first."""
    layers = nn.BatchNorm1d(in_features), zero(nn.Linear(in_features, out_features))
    return nn.Sequential(*layers).to(like)


class Nothing(nn.Module):
    """What a block that is its skip alone adds to it."""

    def forward(self, x):
        return torch.zeros_like(x)


def bn_shift(bn):
    """What a BN in eval mode makes of 0, per channel."""
    return bn.bias - bn.weight * bn.running_mean * torch.rsqrt(bn.running_var + bn.eps)


def linear_after(bn, weight, bias):
    """One linear layer that computes weight·bn(x) + bias, in eval mode."""
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    linear = nn.Linear(*weight.shape[::-1], device="meta")
    linear.weight = nn.Parameter(weight * scale)
    linear.bias = nn.Parameter(bias + weight @ bn_shift(bn))
    return linear


def linear_with_skip(bn, weight, bias):
    """One linear layer that computes x + weight·bn(x) + bias, in eval mode."""
    linear = linear_after(bn, weight, bias)
    linear.weight += torch.eye(len(weight)).to(weight)
    return linear


class MergedBlock(nn.Module):
    """act(main(x) + skip(x)) of plain layers; skip is None where it is folded into main."""

    def __init__(self, main, skip=None, act=None):
        super().__init__()
        self.main, self.skip, self.act = main, skip, act or nn.Identity()

    def forward(self, x):
        y = self.main(x)
        return self.act(y if self.skip is None else y + self.skip(x))


# ---- the prunable blocks -------------------------------------------------------------------------
# `make_prunable` turns a timm block into one in place, by changing its class: weights, state-dict
# keys and isinstance checks stay timm's.

class Prunable:
    """What the families share. `self.rung` says what the pruned block is. It is of the fitted form
    if it has layers for that rung, `self.pruned`, else of the paper's. A family names its timm
    class and has

        obstacle(block)      why a block of the class is not prunable, or None
        own_obstacle(block)  why its own layers cannot be merged, or None; then it will be fitted
        ladder()             names of its rungs, the most expensive first
        prepare(end_act)     builds self.end_act if asked for: by default the MLP's activation
        skip_part(x)         what both forms are added to: the skip
        merged()             plain layers that compute the pruned form, in eval mode

        of the paper's form
        own_norm()           a BatchNorm that replaces another norm, or None
        own_layers(x, lam)   the block's own layers beside the skip, as lam leaves them

        of the fitted form
        new_layers(rung)     linear layers and a BatchNorm, for each rung but "skip"
        linear_inputs(x)     what the linear layers that `fit` solves work on, as rows
    """
    pruned = property(lambda self: self.fitted[self.rung] if self.rung in self.fitted else None)
    obstacle = own_obstacle = staticmethod(lambda block: None)  # unless a family says why not
    serial = False  # True: the layers work on the output of skip_part, as a ViT's MLP does
    end_act_default = True  # None: only where all blocks are pruned and a network would be linear

    def forward(self, x, **attn_args):
        if self.lam == 0:
            return super().forward(x, **attn_args)
        skip = self.skip_part(x, **attn_args)
        inside = skip if self.serial else x
        if self.pruned is None:  # the paper's form
            return self.end(skip + self.drop_path(self.own_layers(inside, self.lam)))
        return blend(
            lambda: skip + self.drop_path(self.own_layers(inside, 0)) if self.serial
            else super(Prunable, self).forward(x, **attn_args),
            lambda: self.end(skip + self.drop_path(on_rows(self.pruned, inside))), self.lam)

    def end(self, y):
        """The end activation. In the paper's form it fades in; else the output is blended."""
        if self.end_act is None or self.rung == "skip":
            return y
        return fade(self.end_act, y, 1 - self.lam if self.pruned is None else 0)

    def ladder(self):
        return ["linear", "skip"]

    def prepare(self, end_act):
        self.end_act = copy.deepcopy(self.mlp.act) if end_act else None

    def own_norm(self):
        return None

    def linear_inputs(self, x):
        return pixel_rows(x)

    def linear_part(self, x, **attn_args):
        """The baseline block's output, which `fit` makes pruned(x) + skip_part(x) reproduce."""
        return super().forward(x, **attn_args)

    def narrow(self, rung, mean, gram, cross, ridge):
        """Of the moments of linear_inputs those that the last layer of a rung works on."""
        return mean, gram, cross

    @torch.no_grad()
    def solve_rung(self, rung, mean, bias, gram, cross, ridge):
        """Solves the layers of a rung, for linear_inputs x of this mean (d,) and covariance `gram`
        (d, d), and wanted outputs of mean `bias` (O,) and covariance `cross` (d, O) with x."""
        if rung == "skip":
            return
        mean, gram, cross = self.narrow(rung, mean, gram, cross, ridge)
        *_, before, last = self.fitted[rung]
        weight, variance = solve(gram, cross, ridge).T, gram.diagonal().clamp(min=0)
        if rung == "depthwise":  # the kernels stay, and BN scales
            last.weight.copy_(weight.diagonal() * (variance + last.eps).sqrt())
            last.bias.copy_(bias)
            bn = last
        elif isinstance(last, BatchNorm):  # conv, BN
            bn, mean = last, weight @ mean
            variance = ((weight @ gram) * weight).sum(1).clamp(min=0)
            bn.weight.copy_((variance + bn.eps).sqrt())
            bn.bias.copy_(bias)
            before.weight.copy_(weight.view_as(before.weight))
        else:  # BN, linear
            bn, weight = before, weight * (variance + before.eps).sqrt()
            nn.init.ones_(bn.weight)
            nn.init.zeros_(bn.bias)
            last.bias.copy_(bias)
            last.weight.copy_(weight.view_as(last.weight))
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(variance)

    @torch.no_grad()
    def fuse(self):
        """The merged block at lam = 1, timm's own block at 0; ValueError in between, where there is
        no exact merge. timm's reparameterize_model calls this."""
        if self.lam == 1:
            return self.merged()
        if self.lam != 0:
            raise ValueError(f"a block at lam = {self.lam:g} is still in transition: only 0 and 1"
                             " merge exactly")
        for name in ("fitted", "end_act", "norm_bn", "lam", "rungs", "rung"):
            delattr(self, name)
        self.__class__ = self.timm_class
        return self


class PrunableConvs(Prunable):
    """What blocks have in common that are pruned to convs. `self.shape()` is a conv whose stride
    the new ones have, their channels in and out, and the kernel size of a dense one."""

    def new_layers(self, rung):
        like, inputs, outputs, size = self.shape()
        if rung == "separable":
            convs = [new_conv(like, inputs, inputs, size, inputs),
                     nn.Conv2d(inputs, outputs, 1, bias=False)]
        else:
            convs = [new_conv(like, inputs, outputs, 1 if rung == "1x1" else size)]
        bn = nn.BatchNorm2d(outputs)
        if getattr(self, "has_skip", True):  # else nothing would be left
            zero(bn)
        return nn.Sequential(*convs, bn).to(like.weight)

    def linear_inputs(self, x):
        """What each output pixel of a dense conv sees of x: (B·H·W, C·size²). A conv with one tap
        per output channel makes it, because that pads like the block's own."""
        like, channels, _, size = self.shape()
        one_tap = torch.eye(size ** 2).to(x).view(-1, 1, size, size).repeat(channels, 1, 1, 1)
        return pixel_rows(conv_like(like, one_tap, groups=channels)(x))

    def narrow(self, rung, mean, gram, cross, ridge):
        _, inputs, _, size = self.shape()
        if rung == "1x1":
            centre = slice(size ** 2 // 2, None, size ** 2)
            mean, gram, cross = mean[centre], gram[centre, centre], cross[centre]
        if rung == "separable":
            kernels = separate(gram, cross, inputs, ridge)
            weight = self.fitted[rung][0].weight
            weight.copy_(kernels.view_as(weight))
            kernels = torch.block_diag(*kernels[:, None])
            mean, gram, cross = kernels @ mean, kernels @ gram @ kernels.T, kernels @ cross
        return mean, gram, cross

    def convs(self):
        """The pruned form's convs beside the skip, with BN folded in."""
        if self.pruned is None:
            return [self.composed()]
        *convs, conv, bn = self.pruned
        return [*convs, fuse_conv_bn_eval(conv, bn)]


class PrunableBasicBlock(PrunableConvs, resnet.BasicBlock):
    """conv3x3-bn-act-conv3x3-bn + skip, act. Two 3x3 convs would compose to a 5x5, which costs more
    than both: so conv2 shrinks to its centre tap, and the two are one 3x3 conv, at half the
    cost."""
    timm_class = resnet.BasicBlock

    @staticmethod
    def obstacle(block):
        return None if isinstance(block.aa, nn.Identity) else "anti-aliasing inside"

    @staticmethod
    def own_obstacle(block):
        if block.se is not None:
            return "squeeze-excite inside"
        return own_convs_obstacle((block.conv1, block.conv2), (block.bn1, block.bn2))

    def prepare(self, end_act):  # the block has an end activation, act2
        self.drop_path = self.drop_path or nn.Identity()

    def ladder(self):
        return ["dense", "1x1"] + ["skip"] * (self.downsample is None)

    def shape(self):
        return self.conv1, self.conv1.in_channels, self.conv2.out_channels, 3

    def skip_part(self, x):
        return x if self.downsample is None else self.downsample(x)

    def end(self, y):
        return self.act2(y)

    def own_layers(self, x, lam):
        z = fade(self.act1, self.drop_block(self.bn1(self.conv1(x))), lam)
        z = self.bn2(fade_taps(self.conv2, z, 1, lam))
        return z if self.se is None else self.se(z)

    def composed(self):
        conv1 = fuse_conv_bn_eval(self.conv1, self.bn1)
        conv2 = fuse_conv_bn_eval(self.conv2, self.bn2)
        centre = inner(conv2.weight, 1).flatten(1), conv2.bias
        return conv_like(self.conv1, *compose((conv1.weight, conv1.bias), centre))

    def linear_part(self, x):  # before act2
        return self.own_layers(x, 0) + self.skip_part(x)

    def merged(self):
        if self.rung == "skip":
            act = copy.deepcopy(self.act2)
            act.inplace = False  # its input is the block's
            return act
        conv, skip = self.convs()[0], None
        if self.downsample is None:
            add_identity(conv.weight)
        elif isinstance(self.downsample[1], BatchNorm) and self.downsample[0].kernel_size == (1, 1):
            shortcut = fuse_conv_bn_eval(*self.downsample)  # it sees the pixels of the centre tap
            inner(conv.weight, 1).add_(shortcut.weight)
            conv.bias += shortcut.bias
        else:  # resnet-d averages first, over fewer pixels at an odd border: this stays a branch
            skip = copy.deepcopy(self.downsample)
        return MergedBlock(conv, skip, self.act2)


class PrunableInvertedResidual(PrunableConvs, _efficientnet_blocks.InvertedResidual):
    """1x1 conv-bn-act, depthwise conv-bn-act, 1x1 conv-bn (+ skip), merged into one dense conv: kxk
    where that costs less than the block, else the depthwise conv shrinks to its inner 3x3 taps.

    The depthwise conv pads with 0, but outside of the image a merged conv has what BN1 makes of 0.
    So this shift fades out as well, and BN2 absorbs it: at lam = 1 nothing that is padded carries a
    constant, and borders are exact."""
    timm_class = _efficientnet_blocks.InvertedResidual
    end_act_default = None  # it clips what comes through the skip, which has few channels

    @staticmethod
    def obstacle(block):
        convs = block.conv_pw, block.conv_dw, block.conv_pwl
        if not isinstance(block.aa, nn.Identity):
            return "anti-aliasing inside"
        if block.conv_s2d is not None or not all(isinstance(conv, nn.Conv2d) for conv in convs):
            return "convs of another kind inside (mixed, conditional, space-to-depth)"

    def merged_size(self):
        """Of the dense conv's kernel; None where any would cost more MACs than the block."""
        pw, dw, pwl, s2 = self.conv_pw, self.conv_dw, self.conv_pwl, math.prod(self.conv_dw.stride)
        baseline = s2 * pw.weight.numel() + dw.weight.numel() + pwl.weight.numel()
        sizes = [size for size in (dw.kernel_size[0], 3) if size % 2 and size <= dw.kernel_size[0]
                 and size ** 2 * pw.in_channels * pwl.out_channels < baseline]
        return sizes[0] if sizes else None

    @staticmethod
    def own_obstacle(block):
        pw, dw, pwl = block.conv_pw, block.conv_dw, block.conv_pwl
        if not isinstance(block.se, nn.Identity):
            return "squeeze-excite inside"
        if not PrunableInvertedResidual.merged_size(block):
            return "a dense 3x3 conv would be more expensive"
        if dw.groups < dw.in_channels:
            return "grouped convs inside"
        return own_convs_obstacle((pw, dw, pwl), (block.bn1, block.bn2, block.bn3))

    def prepare(self, end_act):
        act = getattr(self.bn2, "act", nn.ReLU())  # EvoNorm has none
        self.end_act = copy.deepcopy(act) if end_act else None
        if not self.has_skip:  # as in timm's own forward
            self.drop_path = nn.Identity()

    def ladder(self):
        # TensorFlow's padding would move a 1x1 conv with a stride off the centre tap
        centred = not isinstance(self.conv_dw, Conv2dSame) or max(self.conv_dw.stride) == 1
        return (["dense"] * bool(self.merged_size()) + ["separable"] + ["1x1"] * centred
                + ["skip"] * self.has_skip)

    def shape(self):
        size = self.merged_size() or 3
        return self.conv_dw, self.conv_pw.in_channels, self.conv_pwl.out_channels, size

    def skip_part(self, x):
        return x if self.has_skip else 0

    def own_layers(self, x, lam):
        bn1, bn2, norm = self.bn1, self.bn2, nn.BatchNorm2d.forward  # norm: without bn1's own act
        z = fade(bn1.act, norm(bn1, self.conv_pw(x)), lam) - lam * bn_shift(bn1).view(-1, 1, 1)
        z = fade(bn2.act, norm(bn2, fade_taps(self.conv_dw, z, self.merged_size(), lam)), lam)
        return self.bn3(self.conv_pwl(z))

    def composed(self):
        pw, dw, pwl = (fuse_conv_bn_eval(conv, bn) for conv, bn in (
            (self.conv_pw, self.bn1), (self.conv_dw, self.bn2), (self.conv_pwl, self.bn3)))
        taps = inner(dw.weight, self.merged_size())  # (M, 1, k, k), and pw.weight is (M, I, 1, 1)
        dense = taps * pw.weight, dw.bias
        return conv_like(self.conv_dw, *compose(dense, weight_and_bias(pwl)))

    def merged(self):
        if self.rung == "skip":
            return nn.Identity()
        convs = self.convs()
        if self.rung == "separable":
            skip = nn.Identity() if self.has_skip else None
            return MergedBlock(nn.Sequential(*convs), skip, self.end_act)
        if self.has_skip:
            add_identity(convs[0].weight)
        return MergedBlock(convs[0], act=self.end_act)


class PrunableConvNeXtBlock(Prunable, convnext.ConvNeXtBlock):
    """Depthwise 7x7-LN-fc1-GELU-fc2-γ + skip. A dense 7x7 would cost 5 to 6 times the block: so the
    depthwise conv stays, with its BN folded in, and γ·fc2·fc1 becomes one 1x1 conv. (The fitted
    form has a copy of the depthwise conv, a BatchNorm and a new 1x1 conv.)"""
    timm_class = convnext.ConvNeXtBlock
    own_obstacle = staticmethod(own_mlp_obstacle)

    def own_norm(self):
        bn = nn.BatchNorm2d(self.conv_dw.out_channels)
        return replace_norm(self.norm, bn, self.conv_dw.weight)

    def ladder(self):
        return ["separable", "depthwise"] + ["skip"] * isinstance(self.shortcut, nn.Identity)

    def new_layers(self, rung):
        dw, dim = copy.deepcopy(self.conv_dw), self.conv_dw.out_channels
        if rung == "depthwise":
            return nn.Sequential(dw, zero(nn.BatchNorm2d(dim))).to(dw.weight)
        return nn.Sequential(dw, nn.BatchNorm2d(dim), zero(nn.Conv2d(dim, dim, 1))).to(dw.weight)

    def skip_part(self, x):
        return self.shortcut(x)

    def own_layers(self, x, lam):
        z, last = self.conv_dw(x), not self.use_conv_mlp  # timm's norm may want channels last
        z = blend(lambda: self.norm(z.movedim(1, -1)).movedim(-1, 1) if last else self.norm(z),
                  lambda: self.norm_bn(z), lam)
        z = fade_mlp(self.mlp, z.movedim(1, -1), lam).movedim(-1, 1)
        return z if self.gamma is None else z * self.gamma.view(-1, 1, 1)

    def linear_inputs(self, x):
        return pixel_rows(self.conv_dw(x))

    def narrow(self, rung, mean, gram, cross, ridge):
        self.fitted[rung][0].load_state_dict(self.conv_dw.state_dict())
        if rung == "depthwise":  # each channel by itself
            gram, cross = gram.diagonal().diag(), cross.diagonal().diag()
        return mean, gram, cross

    def merged(self):
        if self.rung == "skip":
            return nn.Identity()
        if self.rung == "depthwise":
            conv, skip = fuse_conv_bn_eval(*self.pruned), self.shortcut
            if isinstance(skip, nn.Identity):
                add_identity(conv.weight)
                skip = None
            return MergedBlock(conv, skip, self.end_act)
        if self.pruned:
            dw, bn, pw = self.pruned
        else:
            weight, bias = compose_mlp(self.mlp, self.gamma)
            pw = conv_like(nn.Conv2d(1, 1, 1, device="meta"), weight[:, :, None, None], bias)
            dw, bn = self.conv_dw, self.norm_bn
        layers = nn.Sequential(fuse_conv_bn_eval(dw, bn), pw)
        return MergedBlock(layers, self.shortcut, self.end_act)


class PrunableViTBlock(Prunable, vision_transformer.Block):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). The attention half stays. In the MLP half, LN
    becomes BatchNorm over all tokens, and fc2·fc1 one C x C linear layer with the skip inside."""
    timm_class = vision_transformer.Block
    own_obstacle = staticmethod(own_mlp_obstacle)
    drop_path = property(lambda self: self.drop_path2)
    serial = True
    end_act_default = False  # the attention's softmax keeps the network nonlinear

    @staticmethod
    def obstacle(block):
        if not isinstance(getattr(block.mlp, "fc2", None), nn.Linear):
            return f"{type(block.mlp).__name__} as its MLP"

    def own_norm(self):
        bn = nn.BatchNorm1d(self.mlp.fc1.in_features)
        return replace_norm(self.norm2, bn, self.mlp.fc1.weight)

    def new_layers(self, rung):
        dim = self.mlp.fc2.out_features
        return bn_linear(dim, dim, self.mlp.fc2.weight)

    def skip_part(self, x, **attn_args):
        return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **attn_args)))

    def own_layers(self, x, lam):
        z = blend(lambda: self.norm2(x), lambda: on_rows(self.norm_bn, x), lam)
        return self.ls2(fade_mlp(self.mlp, z, lam))

    @torch.no_grad()
    def fuse(self):  # timm's block would pass a mask on to a merged attention
        merged_attn = self.lam == 0 and getattr(self.attn, "lam", 0) == 1
        return self.merged() if merged_attn else super().fuse()

    def merged(self):
        norm1, ls1 = self.norm1, self.ls1
        attn = self.attn.fuse() if isinstance(self.attn, Prunable) else self.attn
        if isinstance(attn, nn.Identity):
            norm1 = ls1 = None
        mlp = MergedBlock(nn.Sequential(self.norm2, self.mlp, self.ls2), nn.Identity())
        if self.lam == 1 and self.rung == "skip":
            mlp = nn.Identity()
        elif self.lam == 1:
            if self.pruned:
                linear = linear_with_skip(self.pruned[0], *weight_and_bias(self.pruned[1]))
            else:
                layers = compose_mlp(self.mlp, getattr(self.ls2, "gamma", None))
                linear = linear_with_skip(self.norm_bn, *layers)
            mlp = MergedBlock(linear, act=self.end_act)
        return MergedViTBlock(norm1, attn, ls1, mlp)


class MergedViTBlock(nn.Module):
    """timm's block with another second half, or with a linear layer, or nothing, for its
    attention."""

    def __init__(self, norm1, attn, ls1, mlp):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.mlp = norm1, attn, ls1, mlp

    def forward(self, x, **attn_args):
        if isinstance(self.attn, nn.Identity):
            return self.mlp(self.attn(x))
        attn_args = {} if isinstance(self.attn, nn.Linear) else attn_args
        return self.mlp(x + self.ls1(self.attn(self.norm1(x), **attn_args)))


class PrunableAttention(Prunable, vision_transformer.Attention):
    """The attention of a PrunableViTBlock, fitted only: a BatchNorm and one linear layer on every
    token by itself."""
    timm_class = vision_transformer.Attention
    own_obstacle = staticmethod(lambda block: "attention")

    def new_layers(self, rung):
        return bn_linear(self.qkv.in_features, self.proj.out_features, self.proj.weight)

    def prepare(self, end_act):
        self.drop_path = nn.Identity()

    def skip_part(self, x, **attn_args):
        return 0

    def merged(self):
        if self.rung == "skip":
            return nn.Identity()
        return linear_after(self.pruned[0], *weight_and_bias(self.pruned[1]))


FAMILIES = (PrunableBasicBlock, PrunableInvertedResidual, PrunableConvNeXtBlock, PrunableViTBlock)


# ---- a network of such blocks --------------------------------------------------------------------

def make_prunable(model, form="reparam", end_act=None, attention=False):
    """Turns a timm model's blocks prunable, in place. Nothing is pruned yet: the outputs stay the
    same bits. Load the weights before: pruned forms copy some of them.

    form: "reparam", the paper's, or "fitted". Blocks whose own layers cannot be merged are fitted
    in any case, and so are all rungs of the ladder but the first; until `fit` or training, a fitted
    form is its skip alone, if it has one.
    end_act: insert an activation at the end of pruned blocks that have none? None: in ConvNeXts.
    attention: let the attention of ViT blocks be pruned, too: "blocks.0.attn" is a choice beside
    "blocks.0", the block's MLP. Returns the module paths of the blocks, in running order. UserError
    where there is none."""
    if form not in ("reparam", "fitted"):
        raise ValueError(f"form is reparam or fitted, not {form}")

    def convert(module, family):
        own = form == "reparam" and not family.own_obstacle(module)
        old, module.__class__ = set(module.modules()), family
        module.lam, module.end_act, module.rungs = 0.0, None, module.ladder()
        module.rung = module.rungs[0]
        module.fitted = nn.ModuleDict({
            rung: Nothing() if rung == "skip" else module.new_layers(rung)
            for rung in module.rungs[own:]})
        module.norm_bn = module.own_norm() if own else None
        module.prepare(family.end_act_default if end_act is None else end_act)
        for new in set(module.modules()) - old:
            new.train(module.training)

    for module in list(model.modules()):
        for family in FAMILIES:
            if type(module) is family.timm_class and not family.obstacle(module):
                convert(module, family)
    blocks = prunable_blocks(model)
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no prunable block{listed(obstacles(model))}: use a timm"
            " model: resnet18, resnet34, mobilenetv2_*, efficientnet_*, convnext*, deit_*, vit_*")
    if attention:
        attns = [block.attn for block in blocks.values() if isinstance(block, PrunableViTBlock)
                 and type(block.attn) is PrunableAttention.timm_class]
        if len(attns) < 2:
            raise UserError(f"{type(model).__name__} has no attention that could be pruned: leave"
                            " out --attention")
        for attn in attns[:-1]:  # without any, the class token would see nothing of the image
            convert(attn, PrunableAttention)
    return list(prunable_blocks(model))


def prunable_blocks(model, path=""):
    """{module path: block}, in the order in which they run; a block's attention comes before it."""
    found = {}
    for name, child in model.named_children():
        found |= prunable_blocks(child, f"{path}.{name}" if path else name)
    return found | ({path: model} if isinstance(model, Prunable) else {})


def obstacles(model):
    """{module path: why it is not prunable} of the blocks of the families that stay as they are."""
    return {path: reason for path, module in model.named_modules() for family in FAMILIES
            if type(module) is family.timm_class and (reason := family.obstacle(module))}


def listed(reasons):
    return "".join(f"; {reason}: {', '.join(path for path in reasons if reasons[path] == reason)}"
                   for reason in dict.fromkeys(reasons.values()))


def set_subnet(model, prune, lam=1.0):
    """Sets lam, 0 to 1, of the blocks named in `prune`, and 0 for all others. prune: module paths,
    for the first rung of each block, or {module path: name of its rung}."""
    blocks, named = prunable_blocks(model), isinstance(prune, dict)
    if unknown := sorted(set(prune) - blocks.keys()):
        reasons = {path: reason for path, reason in obstacles(model).items() if path in unknown}
        raise UserError(f"no prunable block {', '.join(unknown)}{listed(reasons)}; this model has"
                        f" {', '.join(blocks)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam goes from 0 to 1, not {lam}")
    rungs = {path: prune[path] if named else blocks[path].rungs[0] for path in prune}
    for path, rung in rungs.items():
        if rung not in blocks[path].rungs:
            raise UserError(f"{path} cannot be pruned to {rung}; its rungs are"
                            f" {', '.join(blocks[path].rungs)}")
    for path, block in blocks.items():
        block.lam, block.rung = float(lam) if path in rungs else 0.0, rungs.get(path, block.rung)


@torch.no_grad()
def merge(model):
    """A merged copy of `model`, in eval mode: each block at lam = 1 becomes one or two plain
    layers, each other block timm's own, and every BN that follows a conv is folded into it.
    Computed in float64, returned in the model's own dtype."""
    dtype = next(model.parameters()).dtype
    merged = reparameterize_model(copy.deepcopy(model).double().eval(), inplace=True)
    last = None  # path and module of the leaf before: a conv's BN is registered right behind it
    for path, module in list(merged.named_modules()):
        if isinstance(module, BatchNorm):
            if last and isinstance(last[1], nn.Conv2d) \
                    and last[1].out_channels == module.num_features:
                merged.set_submodule(last[0], fuse_conv_bn_eval(last[1], module))
                # BatchNormAct2d has an activation inside, which stays
                merged.set_submodule(path, getattr(module, "act", nn.Identity()))
            last = None
        elif not list(module.children()):
            last = path, module
    return merged.to(dtype).eval()


@torch.no_grad()
def recalibrate(model, batches, norms=None):
    """Sets the statistics of the BNs `norms` (None: of all) to the average over `batches` (an
    iterable of images), whatever they were before; those of BNs that do not run stay. Leaves the
    model in eval mode.

    Like torch.optim.swa_utils.update_bn, but only the BNs are in train mode: drop-path and dropout
    stay off."""
    model.eval()
    norms = {module: module.momentum for module in model.modules()
             if isinstance(module, BatchNorm) and (norms is None or module in norms)}
    for bn in norms:
        bn.running_mean.nan_to_num_(0, 0, 0)  # the average starts with 0 times it, NaN would stay
        bn.running_var.nan_to_num_(0, 0, 0)
        bn.num_batches_tracked.zero_()
        bn.momentum = None  # cumulative average
        bn.train()
    for number, images in enumerate(batches if norms else ()):
        if len(images) > 1 or number == 0:  # one image may end as one pixel, which has no variance
            model(images)
    for bn, momentum in norms.items():
        bn.momentum = momentum
        bn.eval()


def with_pauses(function):
    """A generator that runs function(pause): each pause() is a yield. So a forward pass can stop
    between two blocks: it runs in a thread of its own, but never beside another."""
    turn, ended = threading.Barrier(2), []  # where one side waits while the other runs

    def body():
        turn.wait()
        try:
            ended.append(function(lambda: (turn.wait(), turn.wait())))
        except BaseException as error:
            ended.append(error)
        turn.wait()

    threading.Thread(target=body, daemon=True).start()
    while not ended:
        turn.wait()  # it goes on ...
        turn.wait()  # ... to a pause, or to its end
        if ended and ended[0]:
            raise ended[0]
        yield


@torch.no_grad()
def fit(model, prune, batches, in_turn=True, ridge=1e-2, pixels=8192, room=2**32):
    """Solves the fitted form of the blocks in `prune`, as for set_subnet (of the paper's form there
    is nothing to solve), by least squares on `batches` (an iterable of images): its output is to
    reproduce that of the block in the unpruned network. Nothing else in the model changes; all
    blocks are left at lam = 0.

    in_turn: on the inputs that a block gets while those of `prune` before it are pruned, so that
    each fit also corrects the errors of those before. The unpruned and the pruned network go
    through the blocks together, as two halves of each batch, and all batches wait at a block until
    it is solved: two forward passes, but the activations of all images are in memory, so that no
    more are taken than fit in `room` bytes at the blocks (images and stem take about as much
    again). Else on the unpruned network's inputs, and all rungs of a block at once.

    The normal equations are summed up in float64, over all processes, from at most `pixels` output
    pixels (or tokens) of a batch: theirs does not grow with the number of batches. `ridge`, a share
    of each input's variance, pulls towards a block that is its skip alone. (ReplaceMe, NeurIPS
    2025, fits linear maps in the place of language models' blocks.)"""
    set_subnet(model, prune)
    todo = [block for name, block in prunable_blocks(model).items() if name in prune
            and (block.pruned if in_turn else block.fitted)]
    sums = {block: [0, 0, torch.Generator().manual_seed(0)] for block in todo}

    class Reached(Exception):
        """The rest of the network need not run."""

    def half(x, i):
        return x.chunk(2)[i] if in_turn and torch.is_tensor(x) else x

    def visit(block, x, **kwargs):  # runs in place of the block
        skip = block.skip_part(x, **kwargs)
        inside = skip if block.serial else x
        if block.serial:
            wanted = half(skip, 0) + block.own_layers(half(inside, 0), 0)
        else:
            wanted = block.linear_part(half(x, 0), **kwargs)
        skip, inside = half(skip, 1), half(inside, 1)
        inputs, outputs = block.linear_inputs(inside), pixel_rows(wanted - skip)
        gram, cross, rng = sums[block]
        some = torch.randperm(len(inputs), generator=rng)[:pixels].to(x.device)
        inputs = F.pad(inputs[some].double(), (0, 1), value=1.0)  # a constant, for the bias
        sums[block] = gram + inputs.T @ inputs, cross + inputs.T @ outputs[some].double(), rng
        if block is todo[-1]:
            raise Reached
        del inputs, outputs, gram, cross
        wanted = wanted if block.end_act else block.end(wanted)  # a ResNet's own activation
        if not in_turn:
            return wanted
        held.append(3 * x.nbytes)  # that, the skip and the layer's output
        thread.pause()
        return torch.cat([wanted, block.end(skip + on_rows(block.pruned, inside))])

    def forward(images, pause=None):
        thread.pause = pause  # of this thread's walk
        with contextlib.suppress(Reached), torch.no_grad():  # a thread has its own grad mode
            model(torch.cat([images, images]) if in_turn else images)

    def solve_block(block):
        gram, cross, _ = sums.pop(block)
        average([gram, cross])
        gram, cross = gram / gram[-1, -1], cross / gram[-1, -1]
        mean, bias = gram[-1, :-1], cross[-1]
        gram, cross = gram[:-1, :-1] - mean[:, None] * mean, cross[:-1] - mean[:, None] * bias
        for rung in [block.rung] if in_turn else block.fitted:
            block.solve_rung(rung, mean, bias, gram, cross, ridge)

    thread, walks, held = threading.local(), [], []
    model.eval()
    set_subnet(model, [])
    for block in todo:
        block.forward = functools.partial(visit, block)
    try:
        for images in progress_bar(batches, "fit") if todo else ():
            if in_turn:
                walks.append(with_pauses(functools.partial(forward, images)))
                next(walks[-1], None)  # to the first block
                if sum(held) > room:
                    print(f"the fit takes {len(walks)} batches only: their activations fill its"
                          " memory")
                    break
            else:
                forward(images)
        for block in progress_bar(todo, "fit", 1, unit="block"):
            solve_block(block)
            for walk in walks if block is not todo[-1] else ():
                next(walk, None)
    finally:
        for block in todo:
            del block.forward


@torch.no_grad()
def cost(model, input_size):
    """{"params", "macs"} of a forward pass on (1, *input_size), counted on the meta device."""
    model = copy.deepcopy(model).to("meta").eval()
    model.requires_grad_(False)  # the counter fails on parameters that are inputs
    images = torch.empty(1, *input_size, device="meta",
                         dtype=next(model.parameters(), torch.empty(0)).dtype)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return {"params": sum(p.numel() for p in model.parameters()),
            "macs": counter.get_total_flops() // 2}


@torch.inference_mode()
def latencies(models, images, rounds=9):
    """Seconds per forward pass: lower quartile, median and upper quartile for each model, as an
    array (models, 3). They take many short turns, so that a busy moment of the machine hits few."""
    from torch.utils import benchmark  # here, because its import may print a warning about CUDA

    timers = [benchmark.Timer("model(images)", globals={"model": model, "images": images},
                              num_threads=torch.get_num_threads()) for model in models]
    counts = [max(1, round(0.1 / timer.timeit(3).mean)) for timer in timers]  # a tenth of a second
    turns = [[timer.timeit(count).mean for timer, count in zip(timers, counts)]
             for _ in range(rounds)]
    return np.quantile(turns, (0.25, 0.5, 0.75), axis=0).T


def compile_blocks(model):
    """torch.compile block by block: a whole network would be compiled anew for every subnet, a
    block once for lam = 0, once for 1 and once for all values between."""
    torch._dynamo.config.cache_size_limit = 64  # forms, shapes and modes of one block
    for module in model.modules():
        if isinstance(module, tuple(family.timm_class for family in FAMILIES)):
            module.compile()


def check_finite(model, what, hint=""):
    """UserError where a weight or a statistic is not finite."""
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"not all weights of {what} are finite{hint}")


def create_model(name, model_args, pretrained=False):
    """timm.create_model, with UserError for its errors. model_args travel in checkpoints: they may
    name no other files."""
    bad = [key for key in model_args if "pretrained" in key or "checkpoint" in key]
    if bad:
        raise UserError(f"{', '.join(bad)} among the arguments of a model: it may load no files")
    try:
        return timm.create_model(name, pretrained, **model_args)
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise UserError(f"timm cannot build {name} with {model_args}: {error}") from error


def build(checkpoint, baseline=False):
    """The network in a checkpoint, in eval mode: prunable with its subnet set, or merged. Or, if
    asked for, the timm model that was pruned, with its own weights."""
    model = create_model(checkpoint["model"], checkpoint["model_args"])
    if not baseline:
        make_prunable(model, checkpoint["form"], checkpoint["end_act"], checkpoint["attention"])
        set_subnet(model, checkpoint.get("prune", ()))
        model = merge(model) if checkpoint["stage"] == "merged" else model
    model.load_state_dict(checkpoint["baseline_state_dict" if baseline else "state_dict"])
    check_finite(model, f"this {checkpoint['stage']}")
    return model.eval()


# ---- what the stages share: flags and processes --------------------------------------------------

def run(main):
    """Runs a stage. What the user can correct ends it with one `error:` line and exit status 1."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:  # one from a loader's process has a traceback in its text
        lines = str(error).strip().splitlines() or [repr(error)]
        sys.exit("error: " + lines[-1].removeprefix("blocks.UserError: "))
    except KeyboardInterrupt:
        sys.exit(130)


def at_least(low, kind=int, high=float("inf")):
    """A type for argparse: numbers of `kind` from `low` to `high`."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own "invalid int value"
    return parse


def processes():
    """(number of this process, number of all) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors):
    """Averages each of `tensors` over all processes, in place and in one message."""
    if processes()[1] > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= processes()[1]
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(piece.view_as(tensor))


def progress_bar(items, name, rounds=0, **kwargs):
    """tqdm over `items`, in the first process and on a terminal only. If `rounds` times as many are
    to come, it says, once it has seen a few, how long they take: into a file as well."""
    def timed():
        wait, started = 3, None  # the first are slow
        for i, item in enumerate(items):
            if rounds and i == wait:
                started = time.time()
            if started and i > wait and time.time() - started > 5:
                left = (rounds * len(items) - i) * (time.time() - started) / (i - wait)
                if left > 60:
                    tqdm.write(f"{name}: about {left / 60:.0f} min to go")
                started = None
            yield item
    total = len(items) if hasattr(items, "__len__") else None
    return tqdm(timed(), name, total, leave=False, disable=None if processes()[0] == 0 else True,
                **kwargs)


def print_table(header, rows):
    """Rows of text, the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print(row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]), sep="  ")


# ---- what the stages share: files ----------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, which takes its place at the end: nobody reads half a
    file. It has a name of its own, and the ending of `path`, which torch.export wants."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"tmp.{os.getpid()}.{name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def finish(out):
    """Removes what only an unfinished run needs: OUT.last, and half-written files."""
    if processes()[0] == 0:
        half = os.path.join(os.path.dirname(out), f"tmp.*.{os.path.basename(out)}")
        for path in glob.glob(half) + glob.glob(half + ".last") + glob.glob(out + ".last"):
            os.remove(path)


def save(checkpoint, path):
    """A checkpoint is one dict of tensors and plain values; "stage" is what it holds."""
    if processes()[0] == 0:
        with replacing(path) as temporary:
            try:
                torch.save({"format": 5, **checkpoint}, temporary)
            except RuntimeError as error:  # a full disk
                raise UserError(f"cannot write {path}: {error}") from error


def save_csv(rows, path):
    """Rows are dicts with the same keys."""
    if processes()[0] == 0:
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def save_json(content, path):
    if processes()[0] == 0:
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)


def read_checkpoint(path, *stages):
    """The dict that one of `stages` saved: "supernet", "subnet", "merged" or "unfinished run" (none
    named: any)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stage, version = checkpoint["stage"], checkpoint["format"]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage before, or name its file") from error
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"{path} is damaged or is not a checkpoint: write it again") from error
    if version != 5:
        raise UserError(f"{path} was written by another version of this project: write it again")
    if stages and stage not in stages:
        raise UserError(f"{path} holds: {stage}. This needs: {' or '.join(stages)}")
    return checkpoint


def read_subnet(path, model=None):
    """A subnet spec, checked: a dict with "prune", a list of module paths or a dict from them to
    rungs, and more. UserError where it is not for `model`, the supernet's."""
    try:
        with open(path, encoding="utf-8") as file:
            subnet = json.load(file)
        prune = subnet["prune"]
        names = [subnet["model"], *prune, *(prune.values() if isinstance(prune, dict) else ())]
        right = subnet["format"] == 1 and {*map(type, names)} == {str}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run 2_search.py, or write it by hand") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        right = False
    if not right:
        raise UserError(f'{path} is not JSON like {{"format": 1, "model": "x", "prune": ["y"]}}')
    if model not in (None, subnet["model"]):
        raise UserError(f"{path} is for {subnet['model']}, the supernet is a {model}")
    return subnet


def start(parser, *inputs, last_output=lambda args: args.out, read=read_checkpoint):
    """How a stage begins: it parses its flags, joins torchrun's processes (only the first of them
    prints) and, with --resume, goes on with a run that was killed.

    inputs: the flags that name input files, whose content counts for what a run computes. read:
    opens the stage's last output. Returns (args, device, state): state is what the killed run left
    in OUT.last, or None. With it, flags that are not given are those of that run, and others than
    those are a UserError."""
    # Into files, too, line by line; and not every terminal knows every class name's letters
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args, state = parser.parse_args(), None
    last, done = args.out + ".last", last_output(args)
    if getattr(args, "resume", False) and (os.path.exists(last) or os.path.exists(done)):
        path = last if os.path.exists(last) else done
        state = (read_checkpoint if path == last else read)(path)
        parser.set_defaults(**state.get("flags", {}))
        args = parser.parse_args()
    if getattr(args, "plot", False) and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs one more package: pip install matplotlib")
    flag = f"--device {args.device}"
    try:
        device = torch.empty(0, device=init_distributed_device_so(args.device)["device"]).device
        flag = "--compile"
        if getattr(args, "compile", False):
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{flag} does not work here: {str(error).splitlines()[0]}") from error
    if processes()[0] > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    files = list(filter(os.path.isfile, [getattr(args, flag) or "" for flag in inputs]))
    if os.path.realpath(args.out) in map(os.path.realpath, files):
        raise UserError(f"--out {args.out} is an input, too: give another --out")
    args.checksums = {name: zlib.crc32(open(name, "rb").read()) for name in files}
    args.processes = processes()[1]
    if state:
        if not state.get("flags"):
            raise UserError(f"{path} was written by hand: leave out --resume to replace it")
        free = ["resume", "device", "workers", "out"]  # they do not change what is computed
        free += ["data_dir"] if "supernet" in inputs else []  # later stages know the images
        changed = [f"{flag} {old}, now {now}" for flag, old in state["flags"].items()
                   if flag not in free and (now := getattr(args, flag)) != old]
        if changed:
            raise UserError(f"{path} was made with other flags: {'; '.join(changed)}. Give the same"
                            " ones, or leave out --resume to start again")
        if path == done:
            print(f"{done} is finished: nothing to do")
            sys.exit()
    elif os.path.exists(last):
        print(f"{last} is of a run that was killed: --resume would go on with it")
    folder = os.path.dirname(os.path.abspath(args.out))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if os.path.isdir(args.out) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {args.out}: give another --out")
    return args, device, state


# ---- what the stages share: images and evaluation ------------------------------------------------

def read_image(dataset, index):
    """(RGB image, label). timm skips an image that it cannot read; here it is an error."""
    reader = getattr(dataset, "reader", None)  # a torchvision data set has none
    try:
        image, label = reader[index][:2] if reader else dataset[index]
        image = Image.open(image) if reader else image
        if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them at 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB"), int(label)
    except Exception as error:  # Pillow raises many kinds
        name = reader.filename(index, absolute=True) if reader else f"number {index}"
        raise UserError(f"cannot read image {name} ({type(error).__name__}): repair or remove it"
                        ) from error


class Images(torch.utils.data.Dataset):
    """Some images of a data set, transformed, and their labels. Item (epoch, i) is image i,
    augmented at random by a seed of (seed, epoch, i) alone: neither the number of loader processes
    nor what was loaded before counts. Item i is for transforms without random numbers."""

    def __init__(self, dataset, indices, transform, seed):
        self.dataset, self.indices, self.transform, self.seed = dataset, indices, transform, seed

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, item):
        epoch, i = item if isinstance(item, tuple) else (None, item)
        image, label = read_image(self.dataset, int(self.indices[i]))
        if epoch is None:
            return self.transform(image), label
        # timm's transforms use all three generators; without --workers the training does so, too
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(f"{self.seed}/{epoch}/{i}")
        np.random.seed(random.getrandbits(32))
        torch.default_generator.manual_seed(random.getrandbits(63))
        image = self.transform(image)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return image, label


def fingerprint(dataset):
    """A number that changes with the names, the labels and the order of a data set's images."""
    source = getattr(dataset, "reader", dataset)
    samples = getattr(source, "samples", None) or getattr(source, "targets", None) or [len(dataset)]
    root = str(getattr(source, "root", ""))
    text = [(sample[0].removeprefix(root), sample[1]) if isinstance(sample, tuple) else sample
            for sample in samples]
    return zlib.crc32(repr(text).encode())


class Shuffle(DistributedSampler):
    """This process's images, in a new order every epoch (`set_epoch`), as (epoch, i)."""

    def __iter__(self):
        return zip(itertools.repeat(self.epoch), super().__iter__())


def open_dataset(data, part):
    """The training images ("train") or those that top-1 is reported on ("val") of what `data`
    describes, as a timm data set."""
    name, root, options = data["dataset"], data["data_dir"], {}
    if not name:  # a folder of class folders
        root = os.path.join(root, part)
        if not os.path.isdir(root):
            raise UserError(f"no folder {root}: --data-dir needs the folders train and val, each"
                            " with one folder of images per class")
        if data.get("classes"):  # the folders of both parts, numbered alike
            options["class_map"] = {label: i for i, label in enumerate(data["classes"])}
    try:
        dataset = timm.data.create_dataset(
            name, root=root, split={"train": "train", "val": "validation"}[part],
            search_split=bool(name), download=data["download"], **options)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        known = f" (looking for classes {', '.join(data['classes'][:3])} ...)" if options else ""
        raise UserError(f"cannot open {name or root}: {str(error).splitlines()[0]}{known}"
                        ) from error
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError(f"{name} is a stream, of which no part can be held back: use another")
    if len(dataset) == 0:
        raise UserError(f"no images in {name or root}")
    return dataset


def make_loader(data, part, batch_size, device, workers=0, limit=None, split=False, augment=None):
    """timm's loader of normalised batches (B, C, H, W) and labels (B,) on `device`.

    part: "train" (without what is held back), "holdout" (the training images that the search scores
    on) or "val". limit: only so many, chosen with the seed of the holdout. split: under torchrun,
    only this process's part. augment: flags with seed, aa and reprob, to train on: shuffled,
    augmented, split, the last incomplete batch left out."""
    dataset = open_dataset(data, "val" if part == "val" else "train")
    indices = torch.arange(len(dataset))
    if part != "val":
        if fingerprint(dataset) != data["fingerprint"]:
            raise UserError(f"{data['data_dir']} does not hold the {data['train_images']} training"
                            f" images that the supernet was made with, but {len(dataset)}, or other"
                            " names or labels: give their folder with --data-dir")
        held = torch.isin(indices, data["holdout"])
        indices = indices[held if part == "holdout" else ~held]
    if limit and limit < len(indices):
        generator = torch.Generator().manual_seed(data["seed"])
        indices = indices[torch.randperm(len(indices), generator=generator)[:limit]]
    rank, world = processes()
    if len(indices) < world and (split or augment):
        raise UserError(f"{part}: only {len(indices)} images for {world} processes")
    try:
        transform = timm.data.create_transform(
            tuple(data["input_size"]), is_training=bool(augment), color_jitter=0, mean=data["mean"],
            std=data["std"], interpolation=data["interpolation"], crop_pct=data["crop_pct"],
            scale=data["scale"], auto_augment=augment and augment.aa, use_prefetcher=True)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--aa {augment and augment.aa}: {error!r}; timm's notation is like"
                        " rand-m9-mstd0.5-inc1") from error
    seed = augment.seed if augment else 0
    images = Images(dataset, indices[rank::world] if split else indices, transform, seed)
    sampler = Shuffle(images, world, rank, seed=seed, drop_last=True) if augment else None
    loader = torch.utils.data.DataLoader(
        images, min(batch_size, len(sampler or images)), sampler=sampler, drop_last=bool(augment),
        num_workers=workers, persistent_workers=workers > 0, collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator())  # else the loader would use, or not, numbers of the training's
    return PrefetchLoader(loader, mean=data["mean"], std=data["std"], device=device,
                          re_prob=augment.reprob if augment else 0.)


@torch.no_grad()
def evaluate(model, batches, split=False):
    """{"loss": mean cross entropy, "top1": %} over an iterable of (images, labels), in float32.
    split: each process has a part of the batches, and gets the result of all."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
    for images, labels in progress_bar(batches, "evaluate"):
        logits = model(images).float()
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
        sums[2] += len(labels)
    if split:
        average([sums])
    loss, correct, count = sums.tolist()
    return {"loss": loss / count, "top1": 100 * correct / count}
