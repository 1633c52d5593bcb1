"""Prunable CNN and ViT blocks, and what the four stages share.

UPDP prunes depth: it replaces whole blocks of a network by smaller ones that merge into one layer each
(Liu et al., "UPDP: A Unified Progressive Depth Pruner for CNN and Vision Transformer", AAAI 2024).
Every prunable block holds two forms, and its output is a mix of theirs:

    λ = 0   the baseline block: timm's own forward, bit for bit
    λ = 1   the pruned block: what is left of it without its inner activations is linear, and `fuse()` makes a single
            layer of that, with the BatchNorm and the skip folded in, exactly

    timm class                             its pruned form, beside the skip          merges into
    resnet.BasicBlock                      3x3 conv, BatchNorm                       one 3x3 conv
    _efficientnet_blocks.InvertedResidual  dense kxk conv, BatchNorm                 one dense kxk conv
    convnext.ConvNeXtBlock                 depthwise conv, BatchNorm, 1x1 conv       depthwise conv + 1x1 conv, plus skip
    vision_transformer.Block               BatchNorm, linear; attention as it was    attention + one linear layer
    vision_transformer.Attention           BatchNorm, linear (if asked for)          one linear layer

Merging all linear layers of a block would often give a dearer one (two 3x3 convs a 5x5). So the pruned form has the shape of
the merged layer from the start, and `fit` solves its weights for what the baseline block does, which no product of the
baseline's weights comes near.

In a notebook:

    model = timm.create_model("resnet34", pretrained=True)
    names = make_prunable(model, end_act=False) # ["layer1.0", "layer1.1", ...]
    fit(model, names[::2], batches)             # every other block, on some batches of images; no training
    set_subnet(model, names[::2])               # λ = 1
    smaller = merge(model)                      # plain layers, same outputs
    model, spec = load("runs/merged.pt")        # or any other stage's file

First half: the blocks, their merge and what it costs. Second half: processes, files, images, evaluation, training.
"""
import argparse
import contextlib
import copy
import csv
import itertools
import json
import math
import os
import random
import sys
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
from timm.models import _efficientnet_blocks, convnext, resnet, vision_transformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed, reparameterize_model
from timm.utils.distributed import init_distributed_device_so
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights
from torch.utils.data.distributed import DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

BatchNorm = nn.modules.batchnorm._BatchNorm  # 1d, 2d, Sync and timm's BatchNormAct2d alike


class UserError(ValueError):
    """A mistake the user can mend. The scripts print it as one line, `error: …`, and exit with status 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a block
# ---------------------------------------------------------------------------------------------------------------------

def blend(baseline, pruned, mix):
    """(1 - λ)·baseline() + λ·pruned(); at λ = 0 and λ = 1 the absent form is not computed."""
    if mix == 0:
        return baseline()
    if mix == 1:
        return pruned()
    return (1 - mix) * baseline() + mix * pruned()


def fold(conv, bn):
    """Weight and bias of `conv` followed by `bn` in eval mode."""
    return fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


def conv_like(conv, weight, bias, groups=1):
    """`conv` with other weights: its stride, padding and dilation stay, and its class (TF nets pad at run time)."""
    conv = copy.deepcopy(conv)
    conv.out_channels, conv.in_channels, conv.groups = len(weight), weight.shape[1] * groups, groups
    conv.weight = nn.Parameter(weight.contiguous())
    conv.bias = None if bias is None else nn.Parameter(bias.contiguous())
    return conv


def zero(layer):
    """`layer` with an output of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv_bn(like, in_channels, out_channels):
    """A dense conv with the stride, padding and kernel size of the conv `like`, and a BN that makes 0 of its output at first."""
    weight = nn.init.kaiming_normal_(like.weight.new_empty(out_channels, in_channels, *like.kernel_size), mode="fan_out")
    return nn.Sequential(conv_like(like, weight, None), zero(nn.BatchNorm2d(out_channels)).to(weight))


def add_identity(weight):
    """Adds the skip to a conv kernel (C, C, k, k) with odd k, in place: 1 at [i, i, centre, centre]."""
    channels = torch.arange(len(weight), device=weight.device)
    weight[channels, channels, weight.shape[2] // 2, weight.shape[3] // 2] += 1


def pixel_rows(x):
    """(B, C, H, W) as (B·H·W, C), tokens (B, N, C) as (B·N, C)."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2)


def patches(conv, x):
    """What each output pixel of `conv` sees of x, (B·H·W, C·k·k). By a conv with one tap per channel, for it pads alike."""
    taps = math.prod(conv.kernel_size)
    one_tap = torch.eye(taps).to(x).view(taps, 1, *conv.kernel_size).repeat(conv.in_channels, 1, 1, 1)
    return pixel_rows(conv_like(conv, one_tap, None, groups=conv.in_channels)(x))


def linear_after(bn, linear):
    """One linear layer that does linear(bn(x)), in eval mode."""
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    bias = linear.bias + linear.weight @ (bn.bias - bn.running_mean * scale)
    linear = copy.deepcopy(linear)
    linear.weight, linear.bias = nn.Parameter(linear.weight * scale), nn.Parameter(bias)
    return linear


def linear_with_skip(bn, linear):
    """One linear layer that does x + linear(bn(x)), in eval mode."""
    linear = linear_after(bn, linear)
    linear.weight += torch.eye(len(linear.weight)).to(linear.weight)
    return linear


class MergedBlock(nn.Module):
    """act(main(x) + skip(x)), of plain layers only. What `fuse()` returns; skip is None where it is folded in."""

    def __init__(self, main, skip=None, act=None):
        super().__init__()
        self.main, self.skip, self.act = main, skip, act or nn.Identity()

    def forward(self, x):
        y = self.main(x)
        return self.act(y if self.skip is None else y + self.skip(x))


# ---------------------------------------------------------------------------------------------------------------------
# The prunable blocks. `make_prunable` turns a timm block into one in place, by changing its class: weights, state-dict
# keys and isinstance checks stay timm's, and with λ = 0 it runs timm's own forward.
# ---------------------------------------------------------------------------------------------------------------------

class Prunable:
    """What the families share. A family names its timm class, tells what stands against pruning a block (`obstacle`),
    builds the pruned form (`prepare`), runs it (`forward_pruned`) and merges it (`merged`). For `fit` it tells what is added
    to the pruned form's output (`skip_part`) and what its linear layer works on, as rows (`linear_inputs`).

    The pruned form is `self.pruned`, linear layers and a BatchNorm of its own: nothing that the baseline block has is
    changed by training it, but for what both share (a ViT block's attention, a ResNet's downsample)."""
    mix = 0.0  # λ
    end_act_default = True  # an activation behind a pruned block that has none there: many in a row would be linear without
    added = ("pruned", "end_act")  # modules that timm's block does not have

    def forward(self, x, **attn_args):
        return blend(lambda: super(Prunable, self).forward(x, **attn_args), lambda: self.forward_pruned(x), self.mix)

    def finish(self, y):
        return y if self.end_act is None else self.end_act(y)

    @staticmethod
    def obstacle(block):
        """Why a block of the class is not prunable, None where it is."""

    def linear_inputs(self, x):
        return patches(self.pruned[0], x)

    def linear_part(self, x):
        """What the baseline block gives, and what `fit` makes of pruned(x) + skip_part(x)."""
        return super().forward(x)

    @torch.no_grad()
    def set_linear(self, weight, bias, mean, covariance):
        """Makes W·(x - mean) + bias of the pruned form's linear layer and BN, for inputs x of that mean and covariance:
        W (C_out, d), bias (C_out,), mean (d,), covariance (d, d)."""
        *_, before, last = self.pruned
        if isinstance(last, BatchNorm):  # conv, BN
            linear, bn = before, last
            mean, variance = weight @ mean, ((weight @ covariance) * weight).sum(1).clamp(min=0)
            bn.weight.copy_((variance + bn.eps).sqrt())
            bn.bias.copy_(bias)
        else:  # BN, linear
            linear, bn, variance = last, before, covariance.diagonal().clamp(min=0)
            weight = weight * (variance + bn.eps).sqrt()
            nn.init.ones_(bn.weight)
            nn.init.zeros_(bn.bias)
            linear.bias.copy_(bias)
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(variance)
        linear.weight.copy_(weight.view_as(linear.weight))

    @torch.no_grad()
    def fuse(self):
        """The merged block at λ = 1, timm's own block at λ = 0; ValueError in between, where there is no exact merge."""
        if self.mix == 1:
            return self.merged()
        if self.mix != 0:
            raise ValueError(f"a block at λ = {self.mix:g} is still in transition: only λ = 0 and λ = 1 merge exactly")
        for name in self.added:
            if name in self._modules:
                delattr(self, name)
        del self.mix
        self.__class__ = self.timm_class
        return self


class PrunableBasicBlock(Prunable, resnet.BasicBlock):
    """conv3x3-bn-act-conv3x3-bn + skip, act. Two 3x3 convs with nothing between would compose to a 5x5, which is dearer
    than both: the pruned form is a single 3x3 conv, at half the cost."""
    timm_class = resnet.BasicBlock
    added = ("pruned",)  # its own act2 is the end activation

    @staticmethod
    def obstacle(block):
        if block.conv1.kernel_size != (3, 3):
            return "convs of another size"
        return None if isinstance(block.aa, nn.Identity) else "anti-aliasing inside"

    def prepare(self, end_act):
        self.pruned = conv_bn(self.conv1, self.conv1.in_channels, self.conv2.out_channels)

    def skip_part(self, x):
        return x if self.downsample is None else self.downsample(x)

    def forward_pruned(self, x):
        y = self.pruned(x)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return self.act2(y + self.skip_part(x))

    def linear_part(self, x):  # before act2
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return (y if self.se is None else self.se(y)) + self.skip_part(x)

    def merged(self):
        weight, bias = fold(*self.pruned)
        skip = None
        if self.downsample is None:
            add_identity(weight)
        elif isinstance(self.downsample[0], nn.Conv2d) and isinstance(self.downsample[1], BatchNorm) \
                and self.downsample[0].kernel_size == (1, 1):
            w, b = fold(*self.downsample)  # same stride, and hits the same pixels as the centre tap
            weight[:, :, 1:2, 1:2] += w
            bias = bias + b
        else:  # resnet-d averages first, over fewer pixels at an odd border: that stays a branch
            skip = copy.deepcopy(self.downsample)
        return MergedBlock(conv_like(self.pruned[0], weight, bias), skip, self.act2)


class PrunableInvertedResidual(Prunable, _efficientnet_blocks.InvertedResidual):
    """1x1 conv-bn-act, depthwise conv-bn-act, 1x1 conv-bn (+ skip). The pruned form is one dense kxk conv."""
    timm_class = _efficientnet_blocks.InvertedResidual

    @staticmethod
    def obstacle(block):
        pw, dw, pwl = block.conv_pw, block.conv_dw, block.conv_pwl
        if not isinstance(block.aa, nn.Identity):
            return "anti-aliasing inside"
        if getattr(block, "conv_s2d", None) is not None or not all(isinstance(conv, nn.Conv2d) for conv in (pw, dw, pwl)):
            return "convs of another kind inside (mixed, conditional, space-to-depth)"
        # MACs per output pixel; a dense 5x5 is often dearer than what it replaces
        taps, s2 = math.prod(dw.kernel_size), math.prod(dw.stride)
        baseline = s2 * pw.weight.numel() + dw.weight.numel() + pwl.weight.numel()
        if dw.kernel_size[0] % 2 == 0 or taps * pw.in_channels * pwl.out_channels >= baseline:
            return f"a dense {dw.kernel_size[0]}x{dw.kernel_size[1]} conv would be dearer"

    def prepare(self, end_act):
        self.pruned = conv_bn(self.conv_dw, self.conv_pw.in_channels, self.conv_pwl.out_channels)
        if not self.has_skip:  # a random conv, as nothing else would be left
            nn.init.ones_(self.pruned[1].weight)
        self.end_act = copy.deepcopy(getattr(self.bn2, "act", nn.ReLU())) if end_act else None  # EvoNorm has none of its own

    def skip_part(self, x):
        return x if self.has_skip else 0

    def forward_pruned(self, x):
        y = self.pruned(x)
        return self.finish(self.drop_path(y) + x if self.has_skip else y)

    def merged(self):
        weight, bias = fold(*self.pruned)
        if self.has_skip:
            add_identity(weight)
        return MergedBlock(conv_like(self.pruned[0], weight, bias), act=self.end_act)


class PrunableConvNeXtBlock(Prunable, convnext.ConvNeXtBlock):
    """Depthwise 7x7-LN-fc1-GELU-fc2-γ + skip. A dense 7x7 would be 5.8 times dearer than the block: the pruned form is a
    depthwise conv, which starts as the block's own, a BatchNorm in the LayerNorm's place, and one 1x1 conv."""
    timm_class = convnext.ConvNeXtBlock

    def prepare(self, end_act):
        dw, channels = copy.deepcopy(self.conv_dw), self.conv_dw.out_channels
        self.pruned = nn.Sequential(dw, nn.BatchNorm2d(channels), zero(nn.Conv2d(channels, channels, 1))).to(dw.weight)
        self.end_act = copy.deepcopy(self.mlp.act) if end_act else None

    def skip_part(self, x):
        return self.shortcut(x)

    def forward_pruned(self, x):
        return self.finish(self.drop_path(self.pruned(x)) + self.shortcut(x))

    def linear_inputs(self, x):
        return pixel_rows(self.pruned[0](x))

    def merged(self):
        dw, bn, pw = self.pruned
        depthwise = conv_like(dw, *fold(dw, bn), groups=dw.groups)
        return MergedBlock(nn.Sequential(depthwise, pw), self.shortcut, self.end_act)


class PrunableViTBlock(Prunable, vision_transformer.Block):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). The attention half stays; the MLP's pruned form is a BatchNorm and one
    C x C linear."""
    timm_class = vision_transformer.Block
    end_act_default = False  # the attention's softmax keeps the network nonlinear

    @staticmethod
    def obstacle(block):
        return None if isinstance(getattr(block.mlp, "fc2", None), nn.Linear) else f"{type(block.mlp).__name__} as its MLP"

    def prepare(self, end_act):
        like = self.mlp.fc2.weight
        self.pruned = nn.Sequential(nn.BatchNorm1d(len(like)), zero(nn.Linear(len(like), len(like)))).to(like)
        self.end_act = copy.deepcopy(self.mlp.act) if end_act else None

    def skip_part(self, x, **attn_args):
        return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **attn_args)))

    def forward(self, x, **attn_args):
        if self.mix == 0:
            return super(Prunable, self).forward(x, **attn_args)
        x = self.skip_part(x, **attn_args)
        return blend(lambda: x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))),
                     lambda: self.finish(x + self.drop_path2(self.pruned(x.flatten(0, 1)).view_as(x))), self.mix)

    def linear_inputs(self, x):
        return pixel_rows(self.skip_part(x))

    @torch.no_grad()
    def fuse(self):  # timm's block would hand a merged attention a mask
        return self.merged() if self.mix == 0 and getattr(self.attn, "mix", 0) == 1 else super().fuse()

    def merged(self):
        attn = self.attn.fuse() if isinstance(self.attn, Prunable) else self.attn
        mlp = MergedBlock(linear_with_skip(*self.pruned), act=self.end_act) if self.mix else \
            MergedBlock(nn.Sequential(self.norm2, self.mlp, self.ls2), nn.Identity())
        return MergedViTBlock(self.norm1, attn, self.ls1, mlp)


class MergedViTBlock(nn.Module):
    """timm's block with another second half, or with a linear layer as its `attn`: that has no use for attention's arguments."""

    def __init__(self, norm1, attn, ls1, mlp):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.mlp = norm1, attn, ls1, mlp

    def forward(self, x, **attn_args):
        x = x + self.ls1(self.attn(self.norm1(x), **({} if isinstance(self.attn, nn.Linear) else attn_args)))
        return self.mlp(x)


class PrunableAttention(Prunable, vision_transformer.Attention):
    """The attention of a PrunableViTBlock. The pruned form is a BatchNorm and one linear layer on every token by itself: with
    its MLP pruned as well, all that is left of the block is a LayerNorm and two C x C linear layers."""
    timm_class = vision_transformer.Attention
    added = ("pruned",)

    def prepare(self):
        dim, like = self.qkv.in_features, self.proj.weight
        self.pruned = nn.Sequential(nn.BatchNorm1d(dim), zero(nn.Linear(dim, len(like)))).to(like)

    def skip_part(self, x):
        return 0

    def forward_pruned(self, x):
        return self.pruned(x.flatten(0, 1)).view_as(x)

    def linear_inputs(self, x):
        return pixel_rows(x)

    def merged(self):
        return linear_after(*self.pruned)


FAMILIES = (PrunableBasicBlock, PrunableInvertedResidual, PrunableConvNeXtBlock, PrunableViTBlock)


# ---------------------------------------------------------------------------------------------------------------------
# A network of such blocks
# ---------------------------------------------------------------------------------------------------------------------

def make_prunable(model, end_act=None, attention=False):
    """Turns a timm model's blocks prunable, in place; nothing is pruned yet and the outputs stay the same bits. A pruned
    form is its skip alone until it is fitted or trained.

    end_act: insert an activation at the end of pruned blocks that have none? None: yes for CNNs, no for ViTs.
    attention: make the attention of ViT blocks prunable as well, all but the last: "blocks.0.attn" beside "blocks.0", its MLP.
    Returns the blocks' module paths, in running order. Raises UserError where the model has no prunable block.
    Call it after the weights are loaded: ConvNeXt's pruned form starts with a copy of the depthwise conv."""
    for module in list(model.modules()):
        for family in FAMILIES:
            if type(module) is family.timm_class and not family.obstacle(module):
                module.__class__, module.mix = family, 0.0
                module.prepare(family.end_act_default if end_act is None else end_act)
    if not prunable_blocks(model):
        raise UserError(f"{type(model).__name__} has no prunable block{listed(obstacles(model))}: use a ResNet of basic blocks"
                        " (resnet18, resnet34), a mobilenetv2_*, efficientnet_*, convnext*, deit_* or vit_*")
    if attention:
        attns = [block.attn for block in prunable_blocks(model).values()
                 if isinstance(block, PrunableViTBlock) and type(block.attn) is PrunableAttention.timm_class]
        if len(attns) < 2:
            raise UserError(f"{type(model).__name__} has no attention that could be pruned: leave out --attention")
        for attn in attns[:-1]:  # without any, the class token would never see the image
            attn.__class__, attn.mix = PrunableAttention, 0.0
            attn.prepare()
    return list(prunable_blocks(model))


def prunable_blocks(model, path=""):
    """{module path: block}, in running order; a block's own attention comes before it."""
    found = {}
    for name, child in model.named_children():
        found |= prunable_blocks(child, f"{path}.{name}" if path else name)
    return found | ({path: model} if isinstance(model, Prunable) else {})


def obstacles(model):
    """{module path: why it is not prunable}, of the blocks that belong to the families and were left as they are."""
    return {path: reason for path, module in model.named_modules() for family in FAMILIES
            if type(module) is family.timm_class and (reason := family.obstacle(module))}


def listed(reasons):
    return "".join(f"; {reason}: {', '.join(path for path in reasons if reasons[path] == reason)}"
                   for reason in dict.fromkeys(reasons.values()))


def set_subnet(model, pruned, mix=1.0):
    """Puts the blocks named in `pruned` (module paths) at λ = mix, 0 to 1, and all others at λ = 0."""
    blocks, pruned = prunable_blocks(model), set(pruned)
    if unknown := sorted(pruned - blocks.keys()):
        reasons = {path: reason for path, reason in obstacles(model).items() if path in unknown}
        raise UserError(f"no prunable block {', '.join(unknown)}{listed(reasons)}; this model has {', '.join(blocks)}")
    if not 0 <= mix <= 1:
        raise ValueError(f"λ goes from 0 to 1, not {mix}")
    for path, block in blocks.items():
        block.mix = float(mix) if path in pruned else 0.0


@torch.no_grad()
def merge(model):
    """A merged copy of `model`, in eval mode: each block at λ = 1 is one or two plain layers, each other block is timm's
    own, and every BN that follows a conv is folded into it. Computed in float64, returned in the model's own dtype."""
    dtype = next(model.parameters()).dtype
    merged = reparameterize_model(copy.deepcopy(model).double().eval(), inplace=True)
    last = None  # path and module of the leaf before; in all the families a conv's BN is registered right behind it
    for path, module in list(merged.named_modules()):
        if isinstance(module, BatchNorm):
            if last and isinstance(last[1], nn.Conv2d) and last[1].out_channels == module.num_features:
                merged.set_submodule(last[0], fuse_conv_bn_eval(last[1], module))
                merged.set_submodule(path, getattr(module, "act", nn.Identity()))  # BatchNormAct2d brings its activation
            last = None
        elif not list(module.children()):
            last = path, module
    return merged.to(dtype)


@torch.no_grad()
def recalibrate(model, batches, leave=()):
    """Sets the statistics of every BN that runs to the average over `batches` (an iterable of images), whatever they were
    before: a subnet of shared weights has no statistics of its own. Leaves the model in eval mode, the BNs `leave` alone.

    Like torch.optim.swa_utils.update_bn, but only the BNs are in train mode: drop-path and dropout stay off."""
    model.eval()
    norms = {m: (m.momentum, m.running_mean.clone(), m.running_var.clone()) for m in model.modules()
             if isinstance(m, BatchNorm) and m not in leave}
    if not norms:
        return
    for bn in norms:
        bn.reset_running_stats()
        bn.momentum = None  # cumulative average
        bn.train()
    for number, images in enumerate(batches):
        if len(images) > 1 or number == 0:  # one image may end as one pixel, which has no variance; it is no loss
            model(images)
    for bn, (momentum, mean, variance) in norms.items():
        bn.momentum = momentum
        bn.eval()
        if bn.num_batches_tracked == 0:  # it is of a form that did not run
            bn.running_mean.copy_(mean)
            bn.running_var.copy_(variance)


@torch.no_grad()
def fit(model, names, batches, pruned=(), ridge=1e-2, pixels=8192):
    """Solves the pruned form of each block in `names`, by least squares on `batches` (an iterable of images): on the inputs
    that it gets where the blocks `pruned` are pruned, its output shall be the one that it has where nothing is. So each
    fit makes up for the errors of those before it. Nothing else in the model changes; all blocks are left at λ = 0.

    The normal equations are summed up in float64, over all processes, from at most `pixels` output pixels (or tokens) of a
    batch: memory does not grow with the number of batches. `ridge`, a share of each input's variance, pulls towards a block
    that is its skip alone, and makes every system solvable. (ReplaceMe, NeurIPS 2025, fits linear maps like this in
    the place of language transformers' blocks.)"""
    class Reached(Exception):
        pass

    def reach(images, pruned):
        """{block: its input}"""
        def hook(block, args):
            seen[block] = args[0]
            if len(seen) == len(names):  # the rest of the network need not run
                raise Reached

        seen = {}
        hooks = [blocks[name].register_forward_pre_hook(hook) for name in names]
        set_subnet(model, pruned)
        with contextlib.suppress(Reached):
            model(images)
        for handle in hooks:
            handle.remove()
        return seen

    blocks, sums, rng = prunable_blocks(model), {}, torch.Generator().manual_seed(0)
    model.eval()
    for images in batches:
        seen = reach(images, [])
        wanted = {block: block.linear_part(x) for block, x in seen.items()}
        for block, x in (reach(images, pruned) if pruned else seen).items():
            inputs, outputs = block.linear_inputs(x), pixel_rows(wanted[block] - block.skip_part(x))
            some = torch.randperm(len(inputs), generator=rng)[:pixels].to(x.device)
            inputs = F.pad(inputs[some].double(), (0, 1), value=1.0)  # a constant, for the bias
            gram, cross = sums.get(block, (0, 0))
            sums[block] = gram + inputs.T @ inputs, cross + inputs.T @ outputs[some].double()
    set_subnet(model, [])
    for block, (gram, cross) in sums.items():
        average([gram, cross])
        gram, cross = gram / gram[-1, -1], cross / gram[-1, -1]
        mean, bias = gram[-1, :-1], cross[-1]
        gram, cross = gram[:-1, :-1] - mean[:, None] * mean, cross[:-1] - mean[:, None] * bias  # centred
        scale = (gram.diagonal().clamp(min=0) + 1e-12).rsqrt()[:, None]
        weight = scale * torch.linalg.solve(gram * scale * scale.T + ridge * torch.eye(len(gram)).to(gram), cross * scale)
        block.set_linear(weight.T, bias, mean, gram)


@torch.no_grad()
def cost(model, input_size):
    """{"params": …, "macs": …} of one forward pass on (1, *input_size), counted on the meta device: nothing is computed."""
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)  # the counter fails on parameters that are inputs
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *input_size, device="meta", dtype=next(model.parameters()).dtype))
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


@torch.inference_mode()
def latencies(models, images, rounds=9):
    """Seconds per forward pass, lower quartile, median and upper quartile for each model: an array (models, 3). They take
    many short turns: a busy moment of the machine hits few."""
    from torch.utils import benchmark  # here, because it may print a warning about CUDA as it is imported

    timers = [benchmark.Timer("model(images)", globals={"model": model, "images": images},
                              num_threads=torch.get_num_threads()) for model in models]  # it would use one
    counts = [max(1, round(0.1 / timer.timeit(3).mean)) for timer in timers]  # a tenth of a second each
    turns = [[timer.timeit(count).mean for timer, count in zip(timers, counts)] for _ in range(rounds)]
    return np.quantile(turns, (0.25, 0.5, 0.75), axis=0).T


# =====================================================================================================================
# Second half: what the stages share. Command line and processes
# =====================================================================================================================

def run(main):
    """Runs a stage; a mistake the user can mend ends it with one `error:` line and exit status 1."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        # an error from a loader's worker process arrives with that worker's traceback: its last line says what it is
        sys.exit("error: " + (str(error).strip().splitlines() or [repr(error)])[-1].removeprefix("blocks.UserError: "))
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


fraction = at_least(0, float, 1)


def pick_device(name, compiled=False):
    """torch.device of that name, or a UserError where this machine has none or, with `compiled`, where torch.compile does
    not work on it. Under torchrun it also joins the other processes and picks the one device that is this process's own;
    only the first process prints."""
    try:
        device = torch.empty(0, device=init_distributed_device_so(name)["device"]).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if compiled:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        except RuntimeError as error:
            raise UserError(f"--compile does not work here: {str(error).splitlines()[0]}") from error
    if processes()[0] > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def processes():
    """(number of this process, number of all) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_process_first():
    """The other processes wait until the first has come through: what it downloads or draws is there for them."""
    rank, world = processes()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def average(tensors):
    """Averages each of `tensors` over all processes, in place and in one message."""
    if processes()[1] > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= processes()[1]
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(piece.view_as(tensor))


def total(values, device):
    """Each of `values`, plain numbers, summed over all processes."""
    if processes()[1] == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def progress_bar(*args, **kwargs):
    """tqdm, in the first process and on a terminal only."""
    return tqdm(*args, leave=False, disable=None if processes()[0] == 0 else True, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Files between the stages
# ---------------------------------------------------------------------------------------------------------------------

def check_writable(path):
    """UserError where an output file cannot be written, before hours of work go into it."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: give another --out")


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, which takes its place at the end: a reader never sees half a file."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"tmp.{name}")  # torch.export wants the right ending
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save(checkpoint, path):
    """A checkpoint is one flat dict of tensors and plain values; "stage" names the script that wrote it."""
    if processes()[0] == 0:
        with replacing(path) as temporary:
            torch.save({"format": 1, **checkpoint}, temporary)


def save_csv(rows, path):
    """Rows are dicts with the same keys."""
    if processes()[0] == 0:
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def read(path, *stages):
    """The dict that one of `stages` saved: "supernet", "subnet", "merged", "unfinished run" (none named: any)."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: run the stage before this one, or name its file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stage = checkpoint["stage"]
    except Exception as error:
        raise UserError(f"{path} is damaged or not a checkpoint of this project: write it again") from error
    if stages and stage not in stages:
        raise UserError(f"{path} holds a {stage}, this needs a {' or '.join(stages)}")
    return checkpoint


def describe_run(args, *inputs, **more):
    """The flags that decide what a run computes, as {name: text}; for input files, named by flag, a checksum."""
    flags = {**vars(args), **more}
    for name in inputs:
        if flags[name]:
            with open(flags[name], "rb") as file:
                flags[name] = f"{flags[name]} (checksum {zlib.crc32(file.read()):08x})"
    return {name: str(value) for name, value in flags.items() if name not in ("resume", "device", "workers", "out")}


def read_state(args, flags, out=None):
    """What a run that was stopped left in OUT.last, or None where there is nothing to go on from. Ends the program where
    OUT (or `out`, the last that the stage writes) is finished already; UserError where OUT.last was made with other flags."""
    out = out or args.out
    path = args.out + ".last"
    if not args.resume:
        if os.path.exists(path):
            print(f"{path} is of a run that was stopped. This one starts again and overwrites it; --resume would go on.")
    elif os.path.exists(path):
        state = read(path, "unfinished run")
        changed = [name for name in flags if flags[name] != state["flags"].get(name)]
        if changed:
            raise UserError(f"{path} was made with other flags: " + "; ".join(
                f"{name} {state['flags'].get(name)}, now {flags[name]}" for name in changed)
                + ". Give the same ones, or leave out --resume to start again")
        return state
    elif os.path.exists(out):
        with contextlib.suppress(UserError):
            if (read_json if out.endswith(".json") else read)(out).get("flags") == flags:
                print(f"{out} is finished, and was made with these flags: nothing to do")
                sys.exit()
    return None


def save_state(args, flags, **state):
    """Renews OUT.last, from which `read_state` takes it up."""
    save({"stage": "unfinished run", "flags": flags, **state}, args.out + ".last")


def remove_state(args):
    """To be called when OUT is written."""
    if processes()[0] == 0 and os.path.exists(args.out + ".last"):
        os.remove(args.out + ".last")


def read_json(path, model=None):
    """A subnet spec; a person has to write no more than {"format": 1, "model": …, "prune": […]}. UserError where it is not
    for `model`, the supernet's."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: run 2_search.py first, or write it by hand")
    try:
        with open(path, encoding="utf-8") as file:
            spec = json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not (isinstance(spec, dict) and spec.get("format") == 1 and isinstance(spec.get("model"), str)
            and isinstance(spec.get("prune"), list) and all(isinstance(name, str) for name in spec["prune"])):
        raise UserError(f'{path} needs at least {{"format": 1, "model": "…", "prune": ["block", …]}}')
    if model not in (None, spec["model"]):
        raise UserError(f"{path} is for {spec['model']}, the supernet is a {model}")
    return spec


def create_model(name, **model_args):
    """timm.create_model with its mistakes as UserErrors."""
    if ":" not in name and not timm.is_model(name):
        similar = timm.list_models(f"*{name[:6]}*")[:8]
        raise UserError(f"timm has no model {name}" + (f"; similar: {', '.join(similar)}" if similar else ""))
    try:
        return timm.create_model(name, **model_args)
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise UserError(f"timm cannot build {name} with {model_args}: {error}") from error


def build(spec):
    """The model that a checkpoint's weights fit: prunable, its subnet chosen, merged where it is a merged network's."""
    model = create_model(spec["model"], **spec["model_args"])
    make_prunable(model, spec.get("end_act"), spec.get("attention"))
    set_subnet(model, spec.get("prune", ()))
    return merge(model) if spec["stage"] == "merged" else model


def restore(checkpoint):
    """`build` with the checkpoint's own weights, in eval mode."""
    model = build(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"this {checkpoint['stage']}'s weights are of blocks of another form: it was written by another version of"
                        " this project, write it again") from error
    return model.eval()


def load(path, device="cpu"):
    """Opens any stage's checkpoint. Returns (model in eval mode, spec): spec is the checkpoint without its weights, with
    "stage", "model", "model_args", "input_size" (C, H, W), "mean", "std", "classes", and "prune" once it is chosen."""
    checkpoint = read(path, "supernet", "subnet", "merged")
    model = restore(checkpoint)
    spec = {key: value for key, value in checkpoint.items() if not key.endswith("state_dict")}
    return model.to(device), spec


def load_baseline(checkpoint, device="cpu"):
    """The timm model that was pruned, with its own weights."""
    model = create_model(checkpoint["model"], **checkpoint["model_args"])
    model.load_state_dict(checkpoint["baseline_state_dict"])
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Images and evaluation
# ---------------------------------------------------------------------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """Some images of a timm data set, transformed, and their labels. cache: decoded once, if they fit into memory.

    Item (epoch, i) is image i, augmented by chance; the chance depends on seed, epoch and i alone: not on the number of
    loader processes, not on what was loaded before. Item i without an epoch is for transforms without chance.
    timm skips an image that it cannot read; here it is an error that names it."""
    in_memory = 2**31  # bytes of decoded images that fit; under torchrun each process holds its own

    def __init__(self, dataset, indices, transform, seed=0, cache=False):
        self.dataset, self.indices, self.transform, self.seed, self.cache = dataset, indices, transform, seed, None
        if not cache or len(self) == 0:
            return
        some = [self.decode(i)[0] for i in range(0, len(self), len(self) // 8 + 1)]
        if sum(3 * image.width * image.height for image in some) / len(some) * len(self) > self.in_memory:
            return
        pixels, where = [], []
        for i in progress_bar(range(len(self)), "decode", unit="img"):
            image, label = self.decode(i)
            pixels.append(torch.from_numpy(np.array(image)).flatten())
            where.append((image.height, image.width, label))
        # one tensor, which all loader processes share
        self.offsets = [0, *itertools.accumulate(map(len, pixels))]
        self.cache, self.where = torch.cat(pixels), where

    def __len__(self):
        return len(self.indices)

    def decode(self, i):
        """(RGB image, label) of the i-th of `indices`."""
        index = int(self.indices[i])
        try:
            if reader := getattr(self.dataset, "reader", None):
                file, label = reader[index][:2]
                image = Image.open(file)
            else:  # a torchvision data set
                image, label = self.dataset[index]
            return image.convert("RGB"), int(label)
        except Exception as error:  # Pillow raises many kinds
            name = reader.filename(index, absolute=True) if reader else f"number {index}"
            raise UserError(f"cannot read image {name} ({type(error).__name__}): mend or remove it") from error

    def __getitem__(self, item):
        epoch, i = item if isinstance(item, tuple) else (None, item)
        if self.cache is None:
            image, label = self.decode(i)
        else:
            height, width, label = self.where[i]
            image = Image.fromarray(self.cache[self.offsets[i]:self.offsets[i + 1]].view(height, width, 3).numpy())
        if epoch is None:
            return self.transform(image), label
        # timm's transforms draw from all three; without --workers the training itself draws from the same
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(f"{self.seed}/{epoch}/{i}")
        np.random.seed(random.getrandbits(32))
        torch.default_generator.manual_seed(random.getrandbits(63))
        image = self.transform(image)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return image, label


class Shuffle(DistributedSampler):
    """This process's share of the images in a new order every epoch, which `set_epoch` chooses, as (epoch, i)."""

    def __iter__(self):
        return zip(itertools.repeat(self.epoch), super().__iter__())


def open_dataset(spec, split):
    """The "train" or "val" split of the data that `spec` names, as a timm data set without transform."""
    name, root, split = spec["dataset"], spec["data_dir"], spec[f"{split}_split"]
    options = {}
    if not name:  # a folder of class folders
        root = os.path.join(root, split)
        if not os.path.isdir(root):
            raise UserError(f"no folder {root}: --data-dir needs the folders {spec['train_split']} and {spec['val_split']},"
                            " each with one folder of images per class")
        if spec.get("classes"):  # the folders of both splits, numbered alike
            options["class_map"] = {label: i for i, label in enumerate(spec["classes"])}
    try:
        dataset = timm.data.create_dataset(
            name, root=root, split=split, search_split=bool(name), download=spec.get("download", False), **options)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        known = f" (looking for the classes {', '.join(spec['classes'][:3])} …)" if options else ""
        raise UserError(f"cannot open {name or root}: {str(error).splitlines()[0]}{known}") from error
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError(f"{name} is a stream, of which no part can be held back: use a folder, torch/… or hfds/…")
    if len(dataset) == 0:
        raise UserError(f"no images in {name or root}")
    return dataset


def make_loader(spec, part, batch_size, device, workers=0, limit=None, share=False, augment=None):
    """timm's loader of normalised batches (B, C, H, W) and labels (B,) on `device`.

    part: "train" (without what is held back), "holdout" (the part of the training images that the search scores on) or
    "val". limit: only that many, drawn with the seed of the holdout. share: under torchrun, only this process's part.
    augment: args with seed, aa and reprob, to train on: shuffled, augmented, shared out, last batch dropped."""
    dataset = open_dataset(spec, "val" if part == "val" else "train")
    indices = torch.arange(len(dataset))
    if part != "val":
        if len(dataset) != spec["train_images"]:
            raise UserError(f"{spec['data_dir']} has {len(dataset)} training images, the checkpoint was made with"
                            f" {spec['train_images']}: name the same data with --data-dir")
        held = torch.zeros(len(dataset), dtype=torch.bool)
        held[spec["holdout"]] = True
        indices = indices[held if part == "holdout" else ~held]
    if limit and limit < len(indices):
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(spec["seed"]))[:limit]]
    rank, world = processes()
    if len(indices) < world and (share or augment):
        raise UserError(f"{part}: only {len(indices)} images for {world} processes: each needs one at least")
    if share:
        indices = indices[rank::world]
    random_flags = {"scale": spec["scale"], "auto_augment": augment.aa} if augment else {}
    try:
        transform = timm.data.create_transform(
            tuple(spec["input_size"]), is_training=bool(augment), color_jitter=0, use_prefetcher=True, mean=spec["mean"],
            std=spec["std"], interpolation=spec["interpolation"], crop_pct=spec["crop_pct"], **random_flags)
    except (AssertionError, KeyError, ValueError) as error:
        if not (augment and augment.aa):
            raise
        raise UserError(f"--aa {augment.aa}: not a policy in timm's notation, like rand-m9-mstd0.5-inc1") from error
    images = Images(dataset, indices, transform, augment.seed if augment else 0, cache=share or bool(augment))
    batch_size = min(batch_size, len(images) // world if augment else len(images))
    loader = torch.utils.data.DataLoader(
        images, batch_size, drop_last=bool(augment), num_workers=workers, persistent_workers=workers > 0,
        sampler=Shuffle(images, world, rank, seed=augment.seed, drop_last=True) if augment else None,
        generator=torch.Generator(),  # else an epoch's first draw is the loader's, or not, as --workers is
        collate_fn=fast_collate, pin_memory=torch.device(device).type == "cuda")
    return PrefetchLoader(loader, mean=spec["mean"], std=spec["std"], channels=spec["input_size"][0],
                          device=torch.device(device), re_prob=augment.reprob if augment else 0.)


@torch.no_grad()
def evaluate(model, batches, shared=False):
    """{"loss": mean cross entropy, "top1": %} over an iterable of (images, labels), in float32.
    shared: each process has a part of the batches, and gets the result of all."""
    model.eval()
    loss = correct = count = 0
    for images, labels in progress_bar(batches, "evaluate"):
        logits = model(images).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    if shared:
        loss, correct, count = total([loss, correct, count], next(model.parameters()).device)
    return {"loss": loss / count, "top1": 100 * correct / count}


# ---------------------------------------------------------------------------------------------------------------------
# Training: what stages 1 and 3 share. The loops stand there
# ---------------------------------------------------------------------------------------------------------------------

def add_training_flags(parser, lr, warmup):
    """Flags of both stages that train, with timm's names where timm has them."""
    parser.add_argument("--calibrate", type=at_least(0), default=4096, metavar="N",
                        help="training images to fit the pruned blocks on; 0: each starts as its skip alone")
    parser.add_argument("--batch-size", type=at_least(2), default=64, help="images per step; under torchrun, per process")
    parser.add_argument("--lr", type=at_least(0, float), default=lr, help="peak learning rate")
    parser.add_argument("--warmup", type=fraction, default=warmup, metavar="R",
                        help="share of the steps while the rate rises to --lr from a tenth of it; falls to 0 by a cosine later")
    parser.add_argument("--opt", default="adamw", help="a timm optimiser name")
    parser.add_argument("--weight-decay", type=at_least(0, float), default=0.05, help="not applied to norms and biases")
    parser.add_argument("--clip-grad", type=at_least(0, float), default=1.0, metavar="NORM", help="largest norm of the gradient; inf: any")
    parser.add_argument("--ema", type=fraction, metavar="DECAY",
                        help="also average the weights, e.g. 0.9999 (less in the first steps); the average is what counts")
    parser.add_argument("--mixup", type=at_least(0, float), default=0.0, metavar="ALPHA", help="mixup, e.g. 0.8")
    parser.add_argument("--cutmix", type=at_least(0, float), default=0.0, metavar="ALPHA", help="cutmix, e.g. 1.0")
    parser.add_argument("--smoothing", type=fraction, default=0.0, help="label smoothing, e.g. 0.1")
    parser.add_argument("--aa", metavar="POLICY", help="AutoAugment or RandAugment in timm's notation: rand-m9-mstd0.5-inc1")
    parser.add_argument("--reprob", type=fraction, default=0.0, help="probability of random erasing, e.g. 0.25")
    parser.add_argument("--amp", nargs="?", const="bfloat16", choices=("bfloat16", "float16"),
                        help="mixed precision: bfloat16, or float16 with a loss scaler")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each block: slow to start, faster later")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of everything that is left to chance")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.last, which every epoch renews, if it is there")


NOT_FINITE = ". Try a lower --lr or no --amp; OUT.last keeps the last epoch that was well"


class Training:
    """All that changes while a model trains: weights, optimiser, learning rate, loss scale, averaged weights.

    `steps` in all; the learning rate rises over the first args.warmup of them, stays until the share `hold`, then falls.
    `state_dict` holds what it takes to go on from there, bit for bit."""

    def __init__(self, model, args, steps, hold=0.0):
        self.model, self.args, self.device = model, args, next(model.parameters()).device
        # Fused where torch has it: at 32 px on a CPU the plain loop over the parameters takes a third of the step
        fused = {"fused": True} if args.opt in ("adam", "adamw", "sgd") else {}
        try:
            self.optimizer = create_optimizer_v2(  # no decay for norms and biases
                model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, **fused)
        except (ValueError, AssertionError, KeyError) as error:
            raise UserError(f"--opt {args.opt}: {error}") from error
        self.warmup = round(args.warmup * steps)
        self.hold = max(self.warmup, round(hold * steps))
        self.scheduler = CosineLRScheduler(self.optimizer, max(1, steps - self.hold), warmup_t=self.warmup,
                                           warmup_lr_init=args.lr / 10, warmup_prefix=True, t_in_epochs=False)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "float16")
        # λ is no parameter: it is not averaged, and the copy's own has to be set
        self.ema = ModelEmaV3(model, args.ema, use_warmup=True) if args.ema else None
        if args.compile:
            compile_blocks(model)

    @property
    def result(self):
        """The model that counts: the averaged one, where there is one."""
        return self.ema.module if self.ema else self.model

    def start(self, step):
        """Sets the learning rate of this step, counted from 0, and returns it."""
        self.scheduler.step_update(min(step, self.warmup) + max(0, step - self.hold))
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self):
        return torch.autocast(self.device.type, getattr(torch, self.args.amp or "bfloat16"), enabled=bool(self.args.amp))

    def backward(self, loss):
        """Adds to the gradients; several calls may make up one step."""
        self.scaler.scale(loss).backward()

    def update(self, step):
        """One step with the gradients so far. They are averaged over the processes here, once, not in every backward
        pass as DistributedDataParallel does it: a supernet's step has several, and leaves out other weights in each."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        average([parameter.grad for parameter in parameters])
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(parameters, self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model, step)

    def end_epoch(self):
        """Before the epoch's state is saved. Every process has BN statistics of its own images: all get their average.
        UserError where a step (the last one, or a smaller subnet's pass) has spoilt the weights."""
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise UserError("weights are not finite at the end of the epoch" + NOT_FINITE)
        parts = [self.model, self.ema.module] if self.ema else [self.model]
        average([buffer for part in parts for buffer in part.buffers() if buffer.is_floating_point()])

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler,
                **({"ema": self.ema.module} if self.ema else {})}

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def make_mixup(args, loader, num_classes):
    """(images, labels) -> (images, labels): timm's mixup and cutmix, with soft labels (B, classes), or nothing."""
    if not (args.mixup or args.cutmix):
        return lambda images, labels: (images, labels)
    if loader.loader.batch_size % 2:
        raise UserError(f"--mixup and --cutmix need an even --batch-size, not {loader.loader.batch_size}")
    return timm.data.Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


def fit_blocks(model, groups, spec, args, device):
    """Fits groups of blocks in closed form, each group in the network with those before it pruned."""
    started, pruned = time.time(), []
    loader = make_loader(spec, "train", args.batch_size, device, args.workers, limit=args.calibrate, share=True)
    for group in groups:
        fit(model, group, (images for images, _ in loader), pruned)
        pruned += group
    images, = total([len(loader.loader.dataset)], device)
    print(f"fitted {len(pruned)} blocks on {images:g} training images in {time.time() - started:.1f} s", flush=True)


def label_loss(logits, labels, smoothing):
    """Cross entropy with labels (B,), smoothed, or with mixed ones (B, classes), which mixup has smoothed already."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)


def compile_blocks(model):
    """torch.compile, block by block: a whole network would be compiled anew for every subnet, a block is for λ = 0, for
    λ = 1 and once for all that lies between."""
    torch._dynamo.config.cache_size_limit = 64  # forms, shapes and modes of one forward; beyond that it would run as before
    for module in model.modules():
        if isinstance(module, tuple(family.timm_class for family in FAMILIES)):
            module.compile()


class Epoch:
    """Progress bar, mean loss and speed of one epoch of training, over all processes. Sets its order of the images and
    its seed: nothing in it depends on what was drawn in earlier ones."""

    def __init__(self, name, loader, seed, number):
        random_seed(1000 * seed + number, processes()[0])
        loader.sampler.set_epoch(number)
        batch, world = loader.loader.batch_size, processes()[1]
        self.bar = progress_bar(desc=name, total=len(loader) * batch * world, unit="img")
        self.images, self.sum, self.count, self.waiting, self.started = batch * world, 0.0, 0, None, time.time()

    def update(self, loss, **where):
        """Counts one step's loss. A loss is only read at the next step: the GPU has the next batch by then.
        UserError where it is not finite, with what `where` says of its step."""
        self.read()
        self.waiting = loss.detach(), where

    def read(self):
        if self.waiting:
            loss, where = self.waiting[0].item(), self.waiting[1]
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at " + ", ".join(f"{key} {value:g}" for key, value in where.items())
                                + NOT_FINITE)
            self.sum, self.count = self.sum + loss, self.count + 1
            self.bar.update(self.images)
            self.bar.set_postfix(loss=f"{self.sum / self.count:.3f}", refresh=False)

    def finish(self):
        """{"loss": mean, "images_per_s": …}"""
        self.read()
        self.bar.close()
        speed = self.count * self.images / (time.time() - self.started)
        loss, count = total([self.sum, self.count], self.waiting[0].device)
        return {"loss": loss / count, "images_per_s": round(speed, 1)}


def print_best(name, log):
    """Best and last top-1 of some epochs. The best is for information: val is never chosen on."""
    if log:
        best = max(log, key=lambda row: row["val_top1"])
        print(f"{name}: best top-1 {best['val_top1']:.2f} % after epoch {best['epoch']}, last {log[-1]['val_top1']:.2f} %")


def print_table(header, rows):
    """Rows of text, the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths))))
