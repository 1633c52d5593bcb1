"""Prunable CNN and ViT blocks, and what the four stages share.

UPDP (Liu et al., AAAI 2024) prunes depth: it replaces whole blocks of a network by smaller ones,
which merge into one or two layers each. `lam`, the paper's λ, leads from baseline to pruned form:

    lam = 0   timm's own forward, bit for bit
    lam = 1   linear up to its last activation (in a ViT: the MLP half), so that `fuse()` can make
              plain layers of it, with norms and skip folded in, exactly

The pruned block comes in two forms, which merge into layers of the same shape:

    reparam   the paper's: the block's own layers, composed into one. With lam, activations inside
              become the identity, LayerNorm BatchNorm, and an activation is inserted at the end
    fitted    new layers of the merged shape, which `fit` solves in closed form; lam blends the
              outputs. For blocks whose own layers cannot be merged, too, and without training

What a block merges into is a rung of its ladder (README.md lists them). The first is the paper's,
lower ones are always fitted, each cheaper than the one before; `skip` is nothing beside the skip.

In this file: λ; what all blocks share, and one family whole; networks, and how they merge; the
other families; the fit; then what the stages share: costs, files, start-up, images, training.
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
import pathlib
import random
import sys
import tempfile
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
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, distribute_bn, random_seed, reparameterize_model
from timm.utils.distributed import init_distributed_device_so
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

BatchNorm = nn.modules.batchnorm._BatchNorm  # 1d, 2d, Sync and timm's BatchNormAct2d alike
timm.data.add_img_extensions((".bmp", ".tif", ".tiff", ".webp"))  # else its folders lack them


class UserError(ValueError):
    """A mistake that the user can correct. The scripts print it as one line, `error: …`."""


# ---- λ -------------------------------------------------------------------------------------------

def blend(baseline, pruned, lam):
    """(1 - lam)·baseline() + lam·pruned(); at 0 and 1 the other form is not computed."""
    if lam == 0:
        return baseline()
    if lam == 1:
        return pruned()
    return (1 - lam) * baseline() + lam * pruned()


def fade(act, z, lam):
    """act(z) at lam = 0, z at 1. Many activations work in place, but in between z is used twice."""
    return act(z) if lam == 0 else blend(lambda: act(z.clone()), lambda: z, lam)


def centre_taps(weight, size):
    """The inner size x size taps of a kernel (O, I, k, k)."""
    crop = (weight.shape[2] - size) // 2
    return weight[:, :, crop:crop + size, crop:crop + size]


def padding_for(conv, size):
    """Padding with which a kernel of size x size sees the same centres as that of `conv`."""
    less = (conv.kernel_size[0] - size) // 2
    return tuple(p - less * d for p, d in zip(conv.padding, conv.dilation))


def fade_taps(conv, x, size, lam):
    """conv(x), with the taps outside of its inner size x size fading out."""
    if size == conv.kernel_size[0]:
        return conv(x)
    weight, padding = centre_taps(conv.weight, size), padding_for(conv, size)
    run = conv2d_same if isinstance(conv, Conv2dSame) else F.conv2d
    return blend(lambda: conv(x), lambda: run(
        x, weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups), lam)


# ---- what the families of blocks share -----------------------------------------------------------

class Prunable:
    """A block that can be pruned. `make_prunable` turns a timm block into one in place, by changing
    its class: weights, state-dict keys and isinstance checks stay timm's. `self.rung` says what it
    is pruned to: of the fitted form if `self.fitted` has layers for that rung, else of the paper's.
    A family names its timm class and has, beside methods in the place of those below,

        skip_module()            the skip; None, as by default, where there is none
        reparam_layers(x, lam)   the block's own layers beside the skip: at 0 timm's, at 1 linear
        composed()               those at lam = 1, in eval mode, as a list of plain layers
        fitted_layers(rung)      new linear layers and a BatchNorm for each rung but "skip", a list
    """
    stays_nonlinear = False  # True: what pruning leaves of the block is not linear (attention)
    why_not_prunable = why_not_reparam = staticmethod(lambda block: None)  # or a reason
    skip_module = lambda self: None
    reparam_norm = lambda self: (None, None)  # or a norm, and a BatchNorm that takes its place
    last_act = lambda self: None if self.rung == "skip" else self.end_act
    act_to_insert = lambda self: copy.deepcopy(self.mlp.act) if hasattr(self, "mlp") else None
    ladder = lambda self: ["linear"]  # the rungs above "skip", the most expensive first
    linear_inputs = lambda self, x: pixel_rows(x)  # what the layers that `fit` solves work on

    def forward(self, x, **attn_args):
        if self.lam == 0:
            return super().forward(x, **attn_args)
        skip, inside = self.split(x, **attn_args)
        if self.rung not in self.fitted:  # the paper's form
            return self.join(skip, self.reparam_layers(inside, self.lam), self.lam)
        return blend(lambda: self.join(skip, self.reparam_layers(inside, 0, **attn_args), 0),
                     lambda: self.join(skip, on_rows(self.fitted[self.rung], inside), 1), self.lam)

    def split(self, x, **attn_args):
        """(skip, inside): what both forms are added to, and what their layers work on."""
        skip = self.skip_module()
        return 0 if skip is None else skip(x), x

    def join(self, skip, branch, lam):
        """The block's output: the skip, what is beside it, and the last activation."""
        if torch.is_tensor(skip) and self.drop_path is not None:
            branch = self.drop_path(branch)
        y, act = skip + branch, self.last_act()  # timm's own, or an inserted one, which fades in
        return y if act is None else fade(act, y, 1 - lam if act is self.end_act else 0)

    def solve_rung(self, rung, mean, gram, cross, bias, ridge):
        """Solves a rung's layers, for linear_inputs of this mean (d,) and covariance `gram` (d, d),
        and wanted outputs of mean `bias` (O,) and covariance `cross` (d, O) with them."""
        *_, bn, last = self.fitted[rung]
        weight, variance = solve(gram, cross, ridge).T, gram.diagonal().clamp(min=0)
        set_bn(bn, mean, variance, torch.ones_like(mean), torch.zeros_like(mean))
        last.weight.copy_((weight * (variance + bn.eps).sqrt()).view_as(last.weight))
        last.bias.copy_(bias)

    @torch.no_grad()
    def fuse(self):
        """The merged block at lam = 1, timm's own at 0. timm's reparameterize_model calls this."""
        if self.lam == 1:
            return self.merged()
        if self.lam != 0:
            raise ValueError(f"a block in transition, at lam = {self.lam:g}, has no exact merge")
        del self.fitted, self.end_act, self.norm_bn, self.lam, self.rungs, self.rung
        self.__class__ = self.timm_class
        return self

    def merged(self):
        """Plain layers that compute the pruned block, in eval mode."""
        skip, act = self.skip_module(), self.last_act()
        if self.rung == "skip":
            act = act or nn.Identity()
            act.inplace = False  # its input is the block's
            return act
        layers = fold_norms(self.fitted[self.rung]) if self.rung in self.fitted else self.composed()
        if len(layers) == 1:
            skip = fold_skip(layers[0], skip)
        return MergedBlock(layers[0] if len(layers) == 1 else nn.Sequential(*layers), skip, act)


class MergedBlock(nn.Module):
    """act(main(x) + skip(x)) of plain layers; skip is None where it is folded into main."""

    def __init__(self, main, skip, act):
        super().__init__()
        self.main, self.skip, self.act = main, skip, act or nn.Identity()

    def forward(self, x):
        y = self.main(x)
        return self.act(y if self.skip is None else y + self.skip(x))


def is_conv1x1(skip):
    """A 1x1 conv and a BatchNorm? (resnet-d's averages before: fewer pixels at an odd border.)"""
    return isinstance(skip, nn.Sequential) and isinstance(skip[1], BatchNorm) \
        and skip[0].kernel_size == (1, 1)


def fold_skip(layer, skip):
    """Adds the skip to a linear layer or a conv's centre taps, in place, or returns it."""
    centre = layer.weight if layer.weight.ndim == 2 else centre_taps(layer.weight, 1)[:, :, 0, 0]
    if isinstance(skip, nn.Identity):  # a depthwise conv has one input for each channel
        (centre if centre.shape[1] == 1 else centre.diagonal()).add_(1)
    elif is_conv1x1(skip):
        shortcut = fuse_conv_bn_eval(*skip)  # it sees the pixels of the centre tap
        centre += shortcut.weight[:, :, 0, 0]
        layer.bias += shortcut.bias
    else:
        return skip


def compose(first, second):
    """Weight and bias of one layer that computes second(first(x)). Both are pairs of weight and
    bias; `second` is a matrix (O, M), `first` a matrix (M, I) or a kernel (M, I, k, k)."""
    (w1, b1), (w2, b2) = first, second
    return torch.einsum("om,mi...->oi...", w2, w1), w2 @ b1 + b2


def conv_like(conv, weight, bias, groups=1):
    """`conv` with another weight, perhaps of fewer taps, and bias. Stride and dilation stay, and so
    does the class: convs of TensorFlow's networks compute their padding at run time."""
    conv = copy.deepcopy(conv)
    conv.padding, conv.kernel_size = padding_for(conv, weight.shape[2]), tuple(weight.shape[2:])
    conv.in_channels, conv.out_channels = weight.shape[1] * groups, len(weight)
    conv.groups, conv.weight = groups, nn.Parameter(weight.contiguous())
    conv.bias = None if bias is None else nn.Parameter(bias)
    return conv


def fold_norms(layers):
    """The layers, each BatchNorm folded into the conv before it or the linear layer behind it."""
    plain = []
    for layer in layers:
        if isinstance(layer, BatchNorm) and plain:
            plain[-1] = fuse_conv_bn_eval(plain[-1], layer)
        elif plain and isinstance(plain[-1], BatchNorm):
            plain[-1] = linear_after(plain[-1], *weight_and_bias(layer))
        else:
            plain.append(layer)
    return plain


def set_bn(bn, *values):  # mean, variance, weight, bias
    for tensor, value in zip((bn.running_mean, bn.running_var, bn.weight, bn.bias), values):
        tensor.copy_(value)


def zero(layer):
    """`layer` with an output of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def on_rows(layers, x):
    """layers(x), 0 without any; tokens (B, N, C) go in as (B·N, C), for a BatchNorm's average."""
    if isinstance(layers, nn.Sequential) and not len(layers):  # only the skip is left
        return torch.zeros_like(x)
    return layers(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.ndim == 3 else layers(x)


def pixel_rows(x):
    """(B, C, H, W) as (B·H·W, C), tokens (B, N, C) as (B·N, C)."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2)


class PrunableConvs(Prunable):
    """Blocks of convs, each with a norm behind it (`convs` names both), that are pruned to convs.
    `self.shape()` is a conv whose stride the new ones have, their channels in and out, and the
    kernel size of a dense one; `self.rank` the channels between the two of "lowrank"."""
    folded = lambda self: [fuse_conv_bn_eval(conv, bn) for conv, bn in self.own_layers(self)]

    @classmethod
    def own_layers(cls, block):
        return [(getattr(block, conv), getattr(block, norm)) for conv, norm in cls.convs.items()]

    @classmethod
    def why_not_prunable(cls, block):
        if not isinstance(block.aa, nn.Identity):
            return "anti-aliasing inside"
        plain = all(isinstance(conv, nn.Conv2d) for conv, _ in cls.own_layers(block))
        if getattr(block, "conv_s2d", None) or not plain:
            return "convs of another kind inside (mixed, conditional, space-to-depth)"

    @classmethod
    def why_not_reparam(cls, block):
        if not isinstance(block.se, (nn.Identity, type(None))):
            return "squeeze-excite inside"
        for conv, norm in cls.own_layers(block):
            if type(conv) not in (nn.Conv2d, Conv2dSame) or conv.bias is not None:
                return "convs with a bias, or of another kind, inside"
            if not isinstance(norm, BatchNorm):
                return "no BatchNorm inside"

    def fitted_layers(self, rung):
        like, inputs, outputs, size = self.shape()
        size = size if rung in ("dense", "separable") else 1
        inner = {"separable": inputs, "lowrank": getattr(self, "rank", None)}.get(rung)
        groups = inputs if rung == "separable" else 1
        weight = like.weight.new_empty(inner or outputs, inputs // groups, size, size)
        nn.init.kaiming_normal_(weight, mode="fan_out")
        convs = [conv_like(like, weight, None, groups)]
        if inner:
            convs.append(nn.Conv2d(inner, outputs, 1, bias=False))
        bn = nn.BatchNorm2d(outputs)  # without it, networks of many fitted blocks train worse
        return [*convs, bn if self.skip_module() is None else zero(bn)]  # or nothing would be left

    def linear_inputs(self, x):
        """What each output pixel of a dense conv sees of x: (B·H·W, C·size²). A conv with one tap
        per output channel makes it, because that pads like the block's own."""
        like, channels, _, size = self.shape()
        one_tap = torch.eye(size ** 2).to(x).view(-1, 1, size, size).repeat(channels, 1, 1, 1)
        return pixel_rows(conv_like(like, one_tap, None, channels)(x))

    def solve_rung(self, rung, mean, gram, cross, bias, ridge):
        (*first, conv, bn), (_, inputs, _, size) = self.fitted[rung], self.shape()
        if rung == "1x1":
            centre = slice(size ** 2 // 2, None, size ** 2)
            mean, gram, cross = mean[centre], gram[centre, centre], cross[centre]
        if rung == "separable":
            kernels = separate(gram, cross, inputs, ridge)
            first[0].weight.copy_(kernels.view_as(first[0].weight))
            kernels = torch.block_diag(*kernels[:, None])
            mean, gram, cross = kernels @ mean, kernels @ gram @ kernels.T, kernels @ cross
        weight = last = solve(gram, cross, ridge).T
        if rung == "lowrank":  # reduced-rank regression: the leading directions of its outputs
            last = torch.linalg.eigh(weight @ cross).eigenvectors[:, -self.rank:]  # (O, rank)
            first[0].weight.copy_((last.T @ weight).view_as(first[0].weight))
            weight = last @ last.T @ weight
        variance = ((weight @ gram) * weight).sum(1).clamp(min=0)
        conv.weight.copy_(last.view_as(conv.weight))
        set_bn(bn, weight @ mean, variance, (variance + bn.eps).sqrt(), bias)


# ---- one family ----------------------------------------------------------------------------------

class PrunableBasicBlock(PrunableConvs, resnet.BasicBlock):
    """conv3x3-bn-act-conv3x3-bn + skip, act. Two 3x3 convs would compose to a 5x5, which costs more
    than both: so conv2 shrinks to its centre tap, and one 3x3 conv is left, at half the cost."""
    timm_class = resnet.BasicBlock
    convs = {"conv1": "bn1", "conv2": "bn2"}
    skip_module = lambda self: self.downsample or nn.Identity()
    last_act = lambda self: self.act2
    ladder = lambda self: ["dense", "1x1"]
    shape = lambda self: (self.conv1, self.conv1.in_channels, self.conv2.out_channels, 3)

    def reparam_layers(self, x, lam):
        z = fade(self.act1, self.drop_block(self.bn1(self.conv1(x))), lam)
        z = self.bn2(fade_taps(self.conv2, z, 1, lam))
        return z if self.se is None else self.se(z)

    def composed(self):
        conv1, conv2 = self.folded()
        centre = centre_taps(conv2.weight, 1).flatten(1), conv2.bias
        return [conv_like(self.conv1, *compose((conv1.weight, conv1.bias), centre))]


# ---- networks of blocks --------------------------------------------------------------------------

def make_prunable(model, form="reparam", end_act=None, attention=False):
    """Turns a timm model's blocks prunable, in place, and returns their module paths, in running
    order. Nothing is pruned yet: the outputs stay the same bits. Load the weights before: pruned
    forms copy some of them. UserError where there is no such block.

    form: "reparam" or "fitted", as are blocks whose own layers cannot be merged and lower rungs in
    any case; until `fit` or training, a fitted form is its skip alone, if it has one. end_act:
    insert an activation at the end of pruned blocks that have none? None: see `default_end_act`.
    attention: let attention be pruned, too: "blocks.0.attn" beside "blocks.0", the block's MLP."""
    if form not in ("reparam", "fitted"):
        raise ValueError(f"form is reparam or fitted, not {form}")
    if prunable_blocks(model):
        raise ValueError("this network's blocks are prunable already")

    def convert(block, family):
        reparam = form == "reparam" and not family.why_not_reparam(block)
        block.__class__ = family
        block.lam, block.end_act, block._compiled_call_impl = 0.0, None, None  # timm's was compiled
        block.rungs = block.ladder() + ["skip"] * isinstance(block.skip_module(), nn.Identity)
        block.rung = block.rungs[0]
        block.fitted = nn.ModuleDict({
            rung: nn.Sequential(*(block.fitted_layers(rung) if rung != "skip" else ()))
            for rung in block.rungs[reparam:]})
        norm, block.norm_bn = block.reparam_norm() if reparam else (None, None)
        for new in filter(None, (block.fitted, block.norm_bn)):
            new.to(next(block.parameters())).train(block.training)
        if norm:  # statistics of no images yet: `recalibrate`, or train, before use
            block.norm_bn.load_state_dict(dict(norm.named_parameters()), strict=False)  # or none

    for module, family in itertools.product(model.modules(), FAMILIES):
        if type(module) is family.timm_class and not family.why_not_prunable(module):
            convert(module, family)
    if not (blocks := prunable_blocks(model)):
        kinds = sorted({type(module).__name__ for module in model.modules()})
        kinds = ", ".join(kind for kind in kinds if "Block" in kind or "Bottleneck" in kind)
        why = not_prunable(model) or kinds and f"; it is made of {kinds}"
        raise UserError(f"{type(model).__name__} has no prunable block{why}: use a timm model:"
                        " resnet18, resnet50, mobilenetv2_*, efficientnet_*, convnext*, deit_*,"
                        " vit_* (weights of torchvision's resnets fit timm's)")
    if attention:
        attns = [block.attn for block in blocks.values() if isinstance(block, PrunableViTBlock)
                 and type(block.attn) is PrunableAttention.timm_class]
        if len(attns) < 2:
            raise UserError(f"{type(model).__name__} has no attention that could be pruned: leave"
                            " out --attention")
        for attn in attns[:-1]:  # without any, the class token would see nothing of the image
            convert(attn, PrunableAttention)
    if default_end_act(model, form) if end_act is None else end_act:
        insert_end_acts(model)
    return list(prunable_blocks(model))


def default_end_act(model, form, prune=()):
    """Whether blocks get an activation at their end, if only those in `prune` are pruned. In a CNN
    of which all are pruned nothing else is nonlinear. While some stay, it is better only in
    ConvNeXts of the paper's form: it would clip the few channels in inverted residuals' skips."""
    blocks = prunable_blocks(model)
    if blocks.keys() == set(prune) and not not_prunable(model):
        return not any(block.stays_nonlinear for block in blocks.values())
    return form == "reparam" and all(isinstance(b, PrunableConvNeXtBlock) for b in blocks.values())


def insert_end_acts(model):
    for block in prunable_blocks(model).values():
        block.end_act = block.act_to_insert()


def prunable_blocks(model):
    """{module path: block}, in the order in which they run; a block's attention comes before it."""
    children_first = timm.models.named_modules(model, include_root=True)
    return {path: module for path, module in children_first if isinstance(module, Prunable)}


def not_prunable(model, among=None):
    """Why blocks of the families (those `among` these paths) stay as they are; "" if none does."""
    reasons = {}
    for (path, module), family in itertools.product(model.named_modules(), FAMILIES):
        if type(module) is family.timm_class and (among is None or path in among):
            reasons.setdefault(family.why_not_prunable(module), []).append(path)
    return "".join(f"; {why}: {', '.join(paths)}" for why, paths in reasons.items() if why)


def set_subnet(model, prune, lam=1.0):
    """Sets lam, 0 to 1, of the blocks named in `prune`, and 0 for all others. prune: module paths,
    for the first rung of each block, or {module path: name of its rung}."""
    blocks = prunable_blocks(model)
    if unknown := sorted(set(prune) - blocks.keys()):
        raise UserError(f"no prunable block {', '.join(unknown)}{not_prunable(model, unknown)};"
                        f" this model has {', '.join(blocks)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam goes from 0 to 1, not {lam}")
    if not isinstance(prune, dict):
        prune = {path: blocks[path].rungs[0] for path in prune}
    for path, rung in prune.items():
        if rung not in blocks[path].rungs:
            raise UserError(f"{path} cannot be pruned to {rung}; its rungs are"
                            f" {', '.join(blocks[path].rungs)}")
    for path, block in blocks.items():
        block.lam, block.rung = float(lam) if path in prune else 0.0, prune.get(path, block.rung)


@torch.no_grad()
def merge(model):
    """A merged copy of `model`, in its dtype and eval mode, computed in float64: pruned blocks are
    one or two plain layers, the others timm's own, and BNs part of the convs before them."""
    dtype = next(model.parameters()).dtype
    merged = reparameterize_model(copy.deepcopy(model).double().eval(), inplace=True)
    layers = [(path, module) for path, module in merged.named_modules()
              if isinstance(module, BatchNorm) or not list(module.children())]
    for (name, conv), (path, bn) in itertools.pairwise(layers):  # a conv's BN comes right behind it
        if isinstance(conv, nn.Conv2d) and isinstance(bn, BatchNorm) \
                and conv.out_channels == bn.num_features:
            merged.set_submodule(name, fuse_conv_bn_eval(conv, bn))
            # BatchNormAct2d has an activation inside, which stays
            merged.set_submodule(path, getattr(bn, "act", nn.Identity()))
    return merged.to(dtype).eval()


def images_in(batch):
    """The images of a batch, which may be a pair of images and labels."""
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not torch.is_tensor(images):
        raise UserError(f"a batch is a tensor of images, or begins with one, not {type(batch)}")
    return images


@torch.no_grad()
def recalibrate(model, batches, norms=None, unpruned=None):
    """Sets the statistics of the BNs `norms` (None: of all), where they run, to the average over
    `batches` (as for `fit`). Leaves the model in eval mode. unpruned: the unpruned network's
    `bn_statistics` on these: they then move by what pruning changes, as few images tell a change
    better than a statistic. (swa_utils.update_bn would turn drop-path and dropout on.)"""
    model.eval()
    paths = {path: module for path, module in model.named_modules()
             if isinstance(module, BatchNorm) and (norms is None or module in norms)}
    momenta = [bn.momentum for bn in paths.values()]
    for bn in paths.values():
        bn.running_mean.nan_to_num_(0, 0, 0)  # the average starts with 0 times it, NaN would stay
        bn.running_var.nan_to_num_(0, 0, 0)
        bn.num_batches_tracked.zero_()
        bn.momentum = None  # cumulative average
        bn.train()
    number, single = 0, False
    try:
        for number, images in enumerate(map(images_in, batches) if paths else (), 1):
            if single:
                raise UserError("BN statistics need batches of two images or more")
            single = len(images) == 1  # the last: it may end as one pixel, which has no variance
            if number == 1 or not single:
                model(images)
        if paths and not number:
            raise UserError("no images to take BN statistics of")
    finally:
        for bn, momentum in zip(paths.values(), momenta):
            bn.momentum = momentum
            bn.eval()
    for path, bn in paths.items():
        if path in (unpruned or ()) and bn.num_batches_tracked:
            (mean, var), (seen_mean, seen_var) = unpruned[path]
            bn.running_mean.sub_(seen_mean).add_(mean)  # so what does not change stays bit for bit
            bn.running_var.add_(bn.eps).div_(seen_var + bn.eps).mul_(var)


def bn_statistics(unpruned, batches):
    """{path of each BN: ((mean, variance), the same on `batches`)}, for `recalibrate`."""
    seen = copy.deepcopy(unpruned)
    recalibrate(seen, batches)
    return {path: tuple((bn.running_mean.clone(), bn.running_var.clone()) for bn in (own, other))
            for (path, own), other in zip(unpruned.named_modules(), seen.modules())
            if isinstance(own, BatchNorm) and other.num_batches_tracked}  # of those that ran


def not_fitted(model):
    """All modules but fitted layers, of which the BNs have the statistics of their fit."""
    fitted = {m for block in prunable_blocks(model).values() for m in block.fitted.modules()}
    return set(model.modules()) - fitted


# ---- the other families --------------------------------------------------------------------------

class PrunableBottleneck(PrunableConvs, resnet.Bottleneck):
    """conv1x1-bn-act-conv3x3-bn-act-conv1x1-bn + skip, act. A dense conv costs as much as the block
    or more: so conv2 shrinks to its centre tap, and two 1x1 convs are left, or one, where that is
    cheaper: the inner width is half the outer or more, or a 1x1 conv in the skip goes into it."""
    timm_class = resnet.Bottleneck
    convs = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
    skip_module = PrunableBasicBlock.skip_module
    last_act = lambda self: self.act3
    shape = lambda self: (self.conv2, self.conv1.in_channels, self.conv3.out_channels, 1)
    rank = property(lambda self: self.conv3.in_channels)

    def ladder(self):
        _, inputs, outputs, _ = self.shape()
        one = is_conv1x1(self.downsample) or inputs * outputs <= self.rank * (inputs + outputs)
        return ["1x1" if one else "lowrank"]

    def reparam_layers(self, x, lam):
        z = fade(self.act1, self.bn1(self.conv1(x)), lam)
        z = self.drop_block(self.bn2(fade_taps(self.conv2, z, 1, lam)))
        z = self.bn3(self.conv3(fade(self.act2, z, lam)))
        return z if self.se is None else self.se(z)

    def composed(self):
        conv1, conv2, conv3 = self.folded()
        centre = torch.block_diag(*centre_taps(conv2.weight, 1).flatten(1).chunk(conv2.groups))
        first, shift = compose((conv1.weight, conv1.bias), (centre, conv2.bias))
        both, bias = compose((first, shift), weight_and_bias(conv3))
        if self.rung == "1x1":
            return [conv_like(self.conv2, both, bias)]
        conv3.bias = nn.Parameter(bias)  # with all that is constant, as in the fitted form
        return [conv_like(self.conv2, first, None), conv3]


class PrunableInvertedResidual(PrunableConvs, _efficientnet_blocks.InvertedResidual):
    """1x1 conv-bn-act, depthwise conv-bn-act, 1x1 conv-bn (+ skip), merged into one dense conv: kxk
    where that costs less than the block, else the depthwise conv shrinks to its inner 3x3 taps.

    The depthwise conv pads with 0, but outside of the image a merged conv has what BN1 makes of 0.
    So this shift fades out, too, and BN2 absorbs it: at lam = 1 borders are exact."""
    timm_class = _efficientnet_blocks.InvertedResidual
    convs = {"conv_pw": "bn1", "conv_dw": "bn2", "conv_pwl": "bn3"}
    skip_module = lambda self: nn.Identity() if self.has_skip else None
    act_to_insert = lambda self: copy.deepcopy(getattr(self.bn2, "act", nn.ReLU()))  # EvoNorm: ReLU
    shape = lambda self: (self.conv_dw, self.conv_pw.in_channels, self.conv_pwl.out_channels,
                          self.merged_size() or 3)

    @classmethod
    def why_not_reparam(cls, block):
        if not cls.merged_size(block):
            return "a dense 3x3 conv would be more expensive"
        sizes = {block.conv_pw.kernel_size, block.conv_pwl.kernel_size}
        if block.conv_dw.groups < block.conv_dw.in_channels or sizes != {(1, 1)}:
            return "grouped or larger convs inside"
        return super().why_not_reparam(block)

    def merged_size(self):
        """Of the dense conv's kernel; None where any would cost more MACs than the block."""
        pw, dw, pwl, s2 = self.conv_pw, self.conv_dw, self.conv_pwl, math.prod(self.conv_dw.stride)
        macs = s2 * pw.weight.numel() + dw.weight.numel() + pwl.weight.numel()  # per output pixel
        sizes = (dw.kernel_size[0], min(dw.kernel_size[0], 3)) if dw.kernel_size[0] % 2 else ()
        return next((k for k in sizes if k ** 2 * pw.in_channels * pwl.out_channels < macs), None)

    def ladder(self):
        # TensorFlow's padding would move a 1x1 conv with a stride off the centre tap
        centred = not isinstance(self.conv_dw, Conv2dSame) or max(self.conv_dw.stride) == 1
        return ["dense"] * bool(self.merged_size()) + ["separable"] + ["1x1"] * centred

    def reparam_layers(self, x, lam):
        bn1, bn2, norm = self.bn1, self.bn2, nn.BatchNorm2d.forward  # norm: without bn1's own act
        if lam == 0:
            z = self.se(bn2(self.conv_dw(bn1(self.conv_pw(x)))))
        else:
            z = fade(bn1.act, norm(bn1, self.conv_pw(x)), lam) - lam * bn_shift(bn1).view(-1, 1, 1)
            z = fade(bn2.act, norm(bn2, fade_taps(self.conv_dw, z, self.merged_size(), lam)), lam)
        return self.bn3(self.conv_pwl(z))

    def composed(self):
        pw, dw, pwl = self.folded()
        dense = centre_taps(dw.weight, self.merged_size()) * pw.weight, dw.bias  # (M, I, k, k)
        return [conv_like(self.conv_dw, *compose(dense, weight_and_bias(pwl)))]


def why_not_plain_mlp(block):
    """Why the two linear layers of a block's MLP cannot be composed, or None."""
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
        return f"no plain MLP inside ({type(block.mlp).__name__})"


def weight_and_bias(layer):
    """Weight (C_out, C_in) and bias (C_out,) of a linear layer or a 1x1 conv."""
    weight = layer.weight.flatten(1)
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias


def compose_mlp(mlp, scale=None):
    """Weight (C_out, C_in) and bias of scale·fc2(fc1(x)). scale: None or (C_out,)."""
    weight, bias = compose(weight_and_bias(mlp.fc1), weight_and_bias(mlp.fc2))
    return (weight, bias) if scale is None else (weight * scale[:, None], bias * scale)


def fade_mlp(mlp, x, lam):
    """timm's Mlp on x (..., C), its activation fading. At 1 fc2·fc1 is one matrix, 1/8 the cost."""
    if lam == 0:
        return mlp(x)
    if lam == 1:
        return mlp.drop2(F.linear(x, *compose_mlp(mlp)))
    z = F.linear(x, *weight_and_bias(mlp.fc1))
    return mlp.drop2(F.linear(mlp.drop1(fade(mlp.act, z, lam)), *weight_and_bias(mlp.fc2)))


def bn_linear(features):
    """A BatchNorm and a linear layer on rows, with an output of 0."""
    return [nn.BatchNorm1d(features), zero(nn.Linear(features, features))]


def bn_shift(bn):
    """What a BN in eval mode makes of 0, per channel."""
    return bn.bias - bn.weight * bn.running_mean * torch.rsqrt(bn.running_var + bn.eps)


def linear_after(bn, weight, bias):
    """One linear layer that computes weight·bn(x) + bias, in eval mode."""
    linear = nn.Linear(*weight.shape[::-1], device="meta")
    linear.weight = nn.Parameter(weight * (bn.weight * torch.rsqrt(bn.running_var + bn.eps)))
    linear.bias = nn.Parameter(bias + weight @ bn_shift(bn))
    return linear


class PrunableConvNeXtBlock(Prunable, convnext.ConvNeXtBlock):
    """Depthwise 7x7-LN-fc1-GELU-fc2-γ + skip. A dense 7x7 would cost 5 to 6 times the block: so the
    depthwise conv stays, with its BN folded in, and γ·fc2·fc1 becomes one 1x1 conv."""
    timm_class = convnext.ConvNeXtBlock
    why_not_reparam = staticmethod(why_not_plain_mlp)
    skip_module = lambda self: self.shortcut
    linear_inputs = lambda self, x: pixel_rows(self.conv_dw(x))
    ladder = lambda self: ["separable", "depthwise"]
    reparam_norm = lambda self: (self.norm, nn.BatchNorm2d(self.conv_dw.out_channels))

    def reparam_layers(self, x, lam):
        def last(layer, z):  # on channels that are last
            return layer(z.movedim(1, -1)).movedim(-1, 1)
        timms = (lambda layer, z: layer(z)) if self.use_conv_mlp else last
        z = self.conv_dw(x)
        z = blend(lambda: timms(self.norm, z), lambda: self.norm_bn(z), lam)
        z = timms(self.mlp, z) if lam == 0 else last(lambda z: fade_mlp(self.mlp, z, lam), z)
        return z if self.gamma is None else z * self.gamma.view(-1, 1, 1)

    def composed(self):
        weight, bias = compose_mlp(self.mlp, self.gamma)
        pw = conv_like(nn.Conv2d(1, 1, 1, device="meta"), weight[:, :, None, None], bias)
        return [fuse_conv_bn_eval(self.conv_dw, self.norm_bn), pw]

    def fitted_layers(self, rung):
        dw, dim = copy.deepcopy(self.conv_dw), self.conv_dw.out_channels
        bn, pw = nn.BatchNorm2d(dim), zero(nn.Conv2d(dim, dim, 1))
        return [dw, zero(bn)] if rung == "depthwise" else [dw, bn, pw]

    def solve_rung(self, rung, mean, gram, cross, bias, ridge):
        dw, bn = self.fitted[rung][:2]
        dw.load_state_dict(self.conv_dw.state_dict())
        if rung == "separable":
            super().solve_rung(rung, mean, gram, cross, bias, ridge)
        else:  # BN scales each channel by itself
            variance = gram.diagonal().clamp(min=0)
            scale = solve(variance.diag(), cross.diagonal().diag(), ridge).diagonal()
            set_bn(bn, mean, variance, scale * (variance + bn.eps).sqrt(), bias)


class PrunableViTBlock(Prunable, vision_transformer.Block):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). The attention half stays. In the MLP half, LN
    becomes BatchNorm over all tokens, and fc2·fc1 one C x C linear layer with the skip inside."""
    timm_class = vision_transformer.Block
    why_not_reparam = staticmethod(why_not_plain_mlp)
    stays_nonlinear = True
    drop_path = property(lambda self: self.drop_path2)
    skip_module = lambda self: nn.Identity()
    fitted_layers = lambda self, rung: bn_linear(self.attn.proj.out_features)
    reparam_norm = lambda self: (self.norm2, nn.BatchNorm1d(self.mlp.fc1.in_features))
    composed = lambda self: [linear_after(
        self.norm_bn, *compose_mlp(self.mlp, getattr(self.ls2, "gamma", None)))]

    def split(self, x, **attn_args):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **attn_args)))
        return x, x

    def reparam_layers(self, x, lam, **attn_args):
        z = blend(lambda: self.norm2(x), lambda: on_rows(self.norm_bn, x), lam)
        return self.ls2(fade_mlp(self.mlp, z, lam))

    def fuse(self):
        attn = self.attn.fuse() if isinstance(self.attn, Prunable) else self.attn
        if self.lam == 0 and attn is self.attn:
            return super().fuse()
        mlp = super().fuse() if self.lam else MergedBlock(
            nn.Sequential(self.norm2, self.mlp, self.ls2), nn.Identity(), None)
        return MergedViTBlock(self.norm1, attn, self.ls1, mlp)


class MergedViTBlock(nn.Module):
    """timm's block with another second half; its attention may be a linear layer, or nothing."""

    def __init__(self, norm1, attn, ls1, mlp):
        super().__init__()
        norm1, ls1 = (None, None) if isinstance(attn, nn.Identity) else (norm1, ls1)
        self.norm1, self.attn, self.ls1, self.mlp = norm1, attn, ls1, mlp

    def forward(self, x, **attn_args):
        if isinstance(self.attn, nn.Identity):  # nothing is left of it
            return self.mlp(self.attn(x))
        attn_args = {} if isinstance(self.attn, nn.Linear) else attn_args
        return self.mlp(x + self.ls1(self.attn(self.norm1(x), **attn_args)))


class PrunableAttention(Prunable, vision_transformer.Attention):
    """A PrunableViTBlock's attention, fitted only: a BatchNorm and a linear layer on each token."""
    timm_class = vision_transformer.Attention
    ladder = lambda self: ["linear", "skip"]  # the skip is the block's around it
    why_not_reparam = staticmethod(lambda block: "attention")
    stays_nonlinear = True  # the last block's attention stays
    fitted_layers = lambda self, rung: bn_linear(self.proj.out_features)
    # Of timm only: it is never of the paper's form
    reparam_layers = lambda self, x, lam, **attn_args: super(Prunable, self).forward(x, **attn_args)
    merged = lambda self: (nn.Identity() if self.rung == "skip"
                           else fold_norms(self.fitted["linear"])[0])


FAMILIES = (PrunableBasicBlock, PrunableBottleneck, PrunableInvertedResidual, PrunableConvNeXtBlock,
            PrunableViTBlock)


# ---- the fitted form in closed form --------------------------------------------------------------

@torch.no_grad()
def fit(model, prune, batches, in_turn=True, ridge=1e-2, pixels=8192, max_bytes=2**32, chain=True):
    """Solves the fitted form of the blocks in `prune`, as for set_subnet, by least squares on
    `batches` (an iterable of images, or of pairs of them and labels): its output is to reproduce
    that of the block in the unpruned network. Nothing else changes; the model is left in eval mode
    and at lam = 0. UserError where there are no images, or what becomes of them is not finite.

    in_turn: block after block, each on the inputs that it gets once those before it are pruned, so
    that it also corrects their errors. Each batch goes through the network twice at once, its first
    half unpruned, its second pruned, from one block to the next; the inputs of all batches to the
    block that is solved next are kept, up to `max_bytes`, and batches beyond left out; or nothing,
    and `batches` are read again, where the blocks are no `chain`, as in HRNet. Else all blocks, and
    all their rungs, are fitted on the unpruned network's inputs, in one pass.

    The normal equations are summed up in float64, from at most `pixels` output pixels (or tokens)
    of each batch. `ridge`, a share of each input's variance that is added to it, makes weights
    smaller where images are few. (ReplaceMe, NeurIPS 2025, fits language models' blocks.)"""
    set_subnet(model, prune)
    blocks = prunable_blocks(model)
    todo = [name for name, block in blocks.items() if name in prune
            and (block.rung in block.fitted if in_turn else block.fitted)]
    set_subnet(model, [])
    model.eval()
    waiting, start, any_image = [], None, None  # the inputs of the block `start`, for each batch

    class Solvable(Exception):
        """The rest of the network need not run."""

    def half(x, i):
        return x.chunk(2)[i] if in_turn and torch.is_tensor(x) else x

    def visit(block, x, **attn_args):  # runs in place of a block's forward
        skip, inside = block.split(x, **attn_args)
        baseline = block.reparam_layers(half(inside, 0), 0, **attn_args)
        if block in sums:
            inputs = block.linear_inputs(half(inside, 1))
            wanted = pixel_rows(half(skip, 0) + baseline - half(skip, 1))
            gram, cross, rng = sums[block]
            chosen = torch.randperm(len(inputs), generator=rng)[:pixels].to(inputs.device)
            inputs = F.pad(inputs[chosen].double(), (0, 1), value=1.0)  # a constant, for the bias
            sums[block] = gram + inputs.T @ inputs, cross + inputs.T @ wanted[chosen].double(), rng
            if block is blocks[goals[-1]]:
                raise Solvable
        baseline = block.join(half(skip, 0), baseline, 0)
        if not in_turn:
            return baseline
        pruned = on_rows(block.fitted[block.rung], half(inside, 1))
        return torch.cat([baseline, block.join(half(skip, 1), pruned, 1)])

    def go_on(block, args):  # before an outermost block: where a batch waits
        x = waiting[number] if block is start else args[0]
        if start and block is stop and len(x) != len(waiting[number]):
            raise RuntimeError  # it comes from `any_image`
        if block is stop and chain:
            waiting[number:number + 1] = [x]
            if full():
                raise Solvable
        return (x, *args[1:])

    def full():
        return number > 0 and sum(x.nbytes for x in waiting) > max_bytes

    hooks = [blocks[name].register_forward_pre_hook(go_on)
             for name in dict.fromkeys(outermost(name, blocks) for name in todo) if in_turn]
    for name in todo:
        blocks[name].forward = functools.partial(visit, blocks[name])
    try:
        rounds = [[name] for name in todo] if in_turn or not todo else [todo]
        for goals in progress_bar(rounds, "fit", 1, unit="block"):
            stop = blocks[outermost(goals[0], blocks)]
            sums = {blocks[name]: (0, 0, torch.Generator().manual_seed(0)) for name in goals}
            # Once inputs wait at `start`, what goes through the network up to there is not used
            again = itertools.repeat(any_image, len(waiting))
            for number, images in enumerate(progress_bar(again if start else batches, "fit")):
                images = images_in(images)
                if in_turn and not start:
                    images = torch.cat([images, images])
                    any_image = images[:1].expand(3, -1, -1, -1)  # of no batch's length
                with contextlib.suppress(Solvable):
                    model(images)
                if full():
                    print(f"the fit takes {number} batches only: they fill its memory")
                    del waiting[number:]
                    break
            for name in goals:
                block, moments = blocks[name], centre(*sums[blocks[name]][:2], name)
                for rung in [block.rung] if in_turn else block.fitted:
                    if rung != "skip":
                        block.solve_rung(rung, *moments, ridge)
                check_finite(block.fitted, f"the fitted {name}")
            start = stop if chain else None
    except torch.linalg.LinAlgError as error:
        raise UserError(f"{name} cannot be fitted: {error}") from error
    except RuntimeError:
        if not start:
            raise
    else:
        return
    finally:
        for hook in hooks:
            hook.remove()
        for name in todo:
            del blocks[name].forward
    # What a block gets is not all that reaches the next one
    print("fitting each block through the whole network, as they do not run one by one")
    fit(model, prune, batches, in_turn, ridge, pixels, max_bytes, chain=False)


def centre(gram, cross, name):
    """Mean (d,) and covariance (d, d) of the inputs, their covariance (d, O) with the wanted
    outputs, and the mean (O,) of these, from sums, in this process, of products of inputs and a
    last one that is 1 with each other (`gram`) and with outputs (`cross`)."""
    if not torch.is_tensor(gram):
        raise UserError("the fit got no images")
    all_reduce_mean([gram, cross])
    gram, cross = gram / gram[-1, -1], cross / gram[-1, -1]
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise UserError(f"what gets into {name}, or comes out of it, is not finite")
    mean, bias, squares = gram[-1, :-1], cross[-1], gram.diagonal()[:-1]
    gram = gram[:-1, :-1] - mean[:, None] * mean
    cross = cross[:-1] - mean[:, None] * bias
    varies = gram.diagonal() > 1e-12 * squares  # else that is the rounding error of E[x²] - mean²
    return mean, gram * (varies[:, None] & varies), cross * varies[:, None], bias


def outermost(name, blocks):
    """The name of the block that holds `name`, as a ViT's block holds its attention, or `name`."""
    return min((other for other in blocks if f"{name}.".startswith(f"{other}.")), key=len)


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
    within = torch.einsum("ctcs->cts", gram.reshape(channels, taps, channels, taps))
    share = 1e-6 * within.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    root = torch.linalg.cholesky(within + share[:, None, None] * torch.eye(taps).to(within))
    left = torch.linalg.svd(root.mT @ dense, full_matrices=False)[0][:, :, :1]
    kernels = torch.linalg.solve_triangular(root.mT, left, upper=True).flatten()
    for _ in range(rounds):
        depthwise = torch.block_diag(*kernels.view(channels, 1, taps))
        point = solve(depthwise @ gram @ depthwise.T, depthwise @ cross, ridge)  # (C, O)
        point = point.repeat_interleave(taps, 0)
        kernels = solve(gram * (point @ point.T), (cross * point).sum(1, keepdim=True), ridge)
    return kernels.view(channels, taps)


# ---- what the stages share: networks, costs, latencies -------------------------------------------

def create_model(name, model_args, pretrained=False):
    """timm.create_model, with UserErrors. model_args are a checkpoint's: they may name no files."""
    if bad := [key for key in model_args if "pretrained" in key or "checkpoint" in key]:
        raise UserError(f"{', '.join(bad)} among the arguments of a model: it may load no files")
    try:
        return timm.create_model(name, pretrained, **model_args)
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise UserError(f"timm cannot build {name} with {model_args}: {error}") from error


def build(checkpoint, baseline=False):
    """The network of a checkpoint, or the timm model that it was pruned from, in eval mode."""
    model = create_model(checkpoint["model"], checkpoint["model_args"])
    if not baseline:
        make_prunable(model, checkpoint["form"], checkpoint["end_act"], checkpoint["attention"])
        set_subnet(model, checkpoint.get("prune", ()))
        model = merge(model) if checkpoint["stage"] == "merged" else model
    model.load_state_dict(checkpoint["baseline_state_dict" if baseline else "state_dict"])
    check_finite(model, f"this {checkpoint['stage']}")
    return model.eval()


def check_finite(model, what, hint=""):
    """UserError where a weight or a statistic is not finite."""
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"not all weights of {what} are finite{hint}")


def cost(model, input_size, batch=1):
    """{"params", "macs"} of a forward pass on (batch, *input_size), counted on the meta device."""
    model = copy.deepcopy(model).to("meta", torch.float).eval()
    with FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(torch.empty(batch, *input_size, device="meta"))  # or it fails
    return {"params": sum(p.numel() for p in model.parameters()),
            "macs": counter.get_total_flops() // 2}


@torch.inference_mode()
def latencies(models, images, rounds=9):
    """Seconds per forward pass: lower quartile, median and upper quartile for each model, (models,
    3). They take short turns: another program's burst slows one of each and not all of one."""
    from torch.utils import benchmark  # here, because its import may print a warning about CUDA

    timers = [benchmark.Timer("model(images)", globals={"model": model, "images": images},
                              num_threads=torch.get_num_threads()) for model in models]
    counts = [max(1, round(0.1 / timer.timeit(3).mean)) for timer in timers]  # a tenth of a second
    turns = [[timer.timeit(n).mean for timer, n in zip(timers, counts)] for _ in range(rounds)]
    return np.quantile(turns, (0.25, 0.5, 0.75), axis=0).T


# ---- what the stages share: files ----------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, which takes its place at the end: nobody reads half a
    file. It has a name of its own, and the ending of `path`, which torch.export wants."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.tmp{os.getpid()}{os.path.splitext(path)[1]}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def save(content, path):
    """Writes a file, in the first process: a list of dicts as CSV; a checkpoint, a dict of tensors
    and plain values whose "stage" says what it holds; any other dict as JSON."""
    if rank_and_world()[0] > 0:
        return
    with atomic_write(path) as temporary:
        if isinstance(content, list):
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(key for row in content for key in row))
                writer.writeheader()
                writer.writerows(content)
        elif "stage" not in content:
            pathlib.Path(temporary).write_text(json.dumps(content, indent=1), encoding="utf-8")
        else:
            try:
                torch.save({"format": 6, **content}, temporary)
            except RuntimeError as error:  # a full disk
                raise UserError(f"cannot write {path}: {error}") from error


def finish(out):
    """Removes what only an unfinished run needs: OUT.last, and half-written files."""
    if rank_and_world()[0] == 0:
        for tail in (".last", ".last.tmp*", ".tmp*"):
            for path in glob.glob(glob.escape(out) + tail):
                os.remove(path)


def read_checkpoint(path, *stages):
    """The dict that one of `stages` (none named: any) saved."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stage, version = checkpoint["stage"], checkpoint["format"]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage before, or name its file") from error
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"{path} is damaged or is not a checkpoint: write it again") from error
    if version != 6:
        raise UserError(f"{path} was written by another version of this project (format {version},"
                        " this one reads 6): write it again")
    if stages and stage not in stages:
        raise UserError(f"{path} holds: {stage}. This needs: {' or '.join(stages)}")
    return checkpoint


def read_subnet(path, model=None):
    """A subnet spec, checked: "prune" is a list of module paths, or a dict from them to rungs."""
    try:
        subnet = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
        prune = subnet["prune"]
        names = [subnet["model"], *prune, *(prune.values() if isinstance(prune, dict) else ())]
        assert subnet["format"] == 1 and {*map(type, names)} == {str} and type(prune) is not str
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run 2_search.py, or write it by hand") from error
    except (ValueError, TypeError, KeyError, RecursionError, AssertionError) as error:
        raise UserError(f'{path} is not JSON like {{"format": 1, "model": "x", "prune": ["y"]}}'
                        ) from error
    if model not in (None, subnet["model"]):
        raise UserError(f"{path} is for {subnet['model']}, the supernet is a {model}")
    return subnet


# ---- what the stages share: how they begin -------------------------------------------------------

def run(main):
    """Runs a stage. What the user can correct ends it with one `error:` line and exit status 1."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:  # one from a loader's process has a traceback in its text
        lines = str(error).strip().splitlines() or [repr(error)]
        sys.exit("error: " + lines[-1].removeprefix("blocks.UserError: "))
    except RuntimeError as error:
        if "tried to allocate" not in str(error).lower():  # what all of torch's devices say
            raise
        sys.exit("error: memory is full: give a smaller batch size, or close other programs")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        run.lock = None  # the file that `start` locks, as long as it is open


def first_line(error):
    """The first line of what an error says, or, where it says nothing, its name."""
    return (str(error) or repr(error)).splitlines()[0]


Parser = functools.partial(argparse.ArgumentParser,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def at_least(low, kind=int, high=float("inf")):
    """A type for argparse: numbers of `kind` from `low` to `high`."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own "invalid int value"
    return parse


def run_flags(parser, resume=True):
    """Declares where a stage runs and, of stages 1 to 3, from what its random numbers start."""
    flag = parser.add_argument
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1")
    flag("--workers", type=at_least(0), default=min(2, torch.get_num_threads()),
         help="processes that load images")
    if resume:
        flag("--seed", type=at_least(0, high=2**31 - 1), default=0, help="of all random numbers")
        flag("--resume", action="store_true", help="go on from OUT.last, if any, with its flags")


def spare_weights(args, stage1_flags, model, prune=()):
    """Sets --lr, if it is not given, to 1e-3, or to 1e-4 where stage 1 took the weights of `model`.
    There BN's statistics in front of the first block in `prune` move slowly, too; with --features
    nothing there moves. (An epoch on 923 photos at 1e-3 takes MobileNetV2 from 85 to 42 %.)"""
    given = stage1_flags["checkpoint"] or stage1_flags["pretrained"]
    features = getattr(args, "features", False)  # then all statistics stay
    if args.lr is None:
        args.lr = 1e-4 if given else 1e-3
        if given and not features and (args.epochs or getattr(args, "baseline_epochs", 0)):
            print("given weights: learning rate 0.0001, BN statistics that pruning does not change"
                  " move by 1 % a step")
    for path, module in model.named_modules() if given or features else ():
        if path in prune:
            break
        if features:
            for weight in module.parameters(recurse=False):
                weight.requires_grad_(False)
        elif isinstance(module, BatchNorm):
            module.momentum = 0.01


def training_flags(parser, warmup):
    """Declares how stages 1 and 3 train; `train` reads it."""
    flag, positive, share = parser.add_argument, at_least(0, float), at_least(0, float, 1)
    flag("--calibrate", type=at_least(0), default=4096, metavar="N",
         help="training images to fit the pruned forms on; 0: each starts as its skip alone")
    flag("--batch-size", type=at_least(2), default=64, help="images per step and process")
    flag("--lr", type=positive, help="peak learning rate, which falls to 0 by a cosine (None: 1e-3,"
         " or 1e-4 where stage 1 took weights); of the paper's form stage 1 takes a fifth")
    flag("--warmup", type=share, default=warmup, metavar="R", help="share of steps before the peak")
    flag("--opt", default="adamw", choices=list_optimizers(exclude_filters=["adahessian"]),
         metavar="NAME", help="one of timm's")
    flag("--weight-decay", type=positive, default=0.05, help="not for norms and biases")
    flag("--clip-grad", type=positive, default=1.0, metavar="NORM", help="largest norm (0: any)")
    flag("--ema", type=share, metavar="DECAY", help="take a moving average of the weights: 0.9999")
    flag("--mixup", type=positive, default=0.0, metavar="ALPHA", help="mixup, e.g. 0.8")
    flag("--cutmix", type=positive, default=0.0, metavar="ALPHA", help="cutmix, e.g. 1.0")
    flag("--smoothing", type=share, default=0.0, help="label smoothing, e.g. 0.1")
    flag("--aa", metavar="POLICY", help="augmentation in timm's notation: rand-m9-mstd0.5-inc1")
    flag("--reprob", type=share, default=0.0, help="probability of random erasing, e.g. 0.25")
    flag("--amp", action="store_true", help="mixed precision (bfloat16)")
    flag("--compile", action="store_true", help="torch.compile: slow to start, faster later")


def start(parser, *inputs, last_output=lambda args: args.out, read=read_checkpoint):
    """How a stage begins. inputs: the flags that name input files, whose content counts for what a
    run computes. last_output(args): the file that is written last, which `read` opens. Returns
    (args, device, state): state is what a killed run left in OUT.last, with --resume, or None."""
    # Into files, too, line by line; and not every terminal knows every class name's letters
    with contextlib.suppress(AttributeError):  # a notebook's is another kind
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args, state = parser.parse_args(), None
    last = args.out + ".last"
    path = next(filter(os.path.exists, (last, last_output(args))), None)
    if path and getattr(args, "resume", False):
        state = (read_checkpoint if path == last else read)(path)
        if not state.get("flags"):
            raise UserError(f"{path} was written by hand: leave out --resume to replace it")
        parser.set_defaults(**state["flags"])  # those that are not given are that run's
        args = parser.parse_args()
    if getattr(args, "plot", False) and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs one more package: pip install matplotlib")
    flag = f"--device {args.device}"
    try:
        device = torch.empty(0, device=init_distributed_device_so(args.device)["device"]).device
        if hasattr(args, "opt"):  # some of timm's need a package, or a GPU
            flag = f"--opt {args.opt}"
            create_optimizer_v2(nn.Linear(1, 1), args.opt)
        flag = "--compile"
        if getattr(args, "compile", False):
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        raise UserError(f"{flag} does not work here: {first_line(error)}") from error
    if rank_and_world()[0] > 0:  # of torchrun's processes only the first prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    elif os.name == "posix":  # not on Windows
        import fcntl
        name = f"updp-{os.getuid()}-{zlib.crc32(os.path.realpath(args.out).encode()):08x}.lock"
        run.lock = open(os.path.join(tempfile.gettempdir(), name), "a")
        try:
            fcntl.lockf(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loaders do not inherit it
        except OSError:
            raise UserError(f"another run writes {args.out} at this moment: give another --out")
    files = list(filter(os.path.isfile, [getattr(args, flag) or "" for flag in inputs]))
    if os.path.realpath(args.out) in map(os.path.realpath, files):
        raise UserError(f"--out {args.out} is an input, too: give another --out")
    vars(args).update({f"content of {f}": zlib.crc32(pathlib.Path(f).read_bytes()) for f in files})
    args.processes = rank_and_world()[1]
    free = ["resume", "device", "workers", "out", "plot"]  # they do not change what is computed
    free += ["data_dir"] if "supernet" in inputs else []  # later stages know the images
    changed = [f"{flag} {old}, now {now}" for flag, old in (state or {}).get("flags", {}).items()
               if flag not in free and (now := getattr(args, flag, None)) != old]
    if changed:
        raise UserError(f"{path} was made with other flags: {'; '.join(changed)}. Give the same"
                        " ones, or leave out --resume to start again")
    folder = next(filter(os.path.exists, pathlib.Path(args.out).absolute().parents))
    folder = os.path.join(folder, "")  # a file at that place has no such path
    if os.path.isdir(args.out) or not os.path.basename(args.out) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {args.out}: give another --out")
    if getattr(args, "resume", False) and not path:
        print(f"there is no {last} to go on from: this run begins anew")
    if path == last and not state:
        print(f"{path} is of a run that was killed: --resume would go on with it")
    if state and path != last:
        print(f"{path} is finished: nothing to do. Without --resume it would be made anew")
        sys.exit()
    random_seed(getattr(args, "seed", 0))
    return args, device, state


def rank_and_world():
    """(number of this process, number of all) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce_mean(tensors):
    """Averages each of `tensors` over all processes, in place and in one message."""
    if rank_and_world()[1] > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= rank_and_world()[1]
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(piece.view_as(tensor))


def progress_bar(items, name, rounds=0, **kwargs):
    """tqdm over `items`, in the first process and on a terminal only. If `rounds` times as many are
    to come, it says, once it has seen a few, how long they take: into a file as well."""
    def timed(rounds):
        for i, item in enumerate(items):
            if i == 3:  # the first are slow
                started = time.time()
            if rounds and i > 3 and time.time() - started > 5:
                left = (rounds * len(items) - i) * (time.time() - started) / (i - 3)
                if left > 60:
                    tqdm.write(f"{name}: about {left / 60:.0f} min to go")
                rounds = 0
            yield item
    total = len(items) if hasattr(items, "__len__") else None
    hidden = rank_and_world()[0] > 0 or None  # None: unless on a terminal
    return tqdm(timed(rounds), name, total, leave=False, disable=hidden, **kwargs)


def print_table(header, rows):
    """Rows of text, the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print(row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]), sep="  ")


# ---- what the stages share: images and evaluation ------------------------------------------------

def read_image(dataset, index):
    """(RGB image, label). timm skips an image that it cannot read; here it is an error."""
    reader = getattr(dataset, "reader", None)  # a torchvision data set has none
    try:
        image, label = reader[index][:2] if reader else dataset[index]
        image = Image.open(image) if reader else image
        assert image.mode != "F"  # floats of unknown range
        if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them at 255
            image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB"), int(label)
    except Exception as error:  # Pillow raises many kinds
        name = reader.filename(index, absolute=True) if reader else f"number {index}"
        kind = type(error).__name__
        raise UserError(f"cannot read image {name} ({kind}): repair or remove it") from error


class Images(torch.utils.data.Dataset):
    """Some images of a data set, transformed, and their labels, or `labels` in their place. Item
    (epoch, i) is image i, augmented at random by a seed of (seed, epoch, i) alone: neither the
    number of loader processes nor what was loaded before counts. Item i is not random."""

    def __init__(self, dataset, indices, transform, seed, labels=None):
        self.dataset, self.indices, self.transform, self.seed = dataset, indices, transform, seed
        self.labels = labels

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, item):
        epoch, i = item if isinstance(item, tuple) else (None, item)
        image, label = read_image(self.dataset, int(self.indices[i]))
        label = label if self.labels is None else int(self.labels[self.indices[i]])
        if epoch is None:
            return self.transform(image), label
        # timm's transforms use all three generators; without --workers the training does so, too
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([]):
            random.seed(f"{self.seed}/{epoch}/{i}")
            np.random.seed(random.getrandbits(32))
            torch.default_generator.manual_seed(random.getrandbits(63))
            image = self.transform(image)
        random.setstate(states[0])
        np.random.set_state(states[1])
        return image, label


def samples_of(dataset):
    """(path below the data set's folder, label) of each image, or as much as the data set tells."""
    source = getattr(dataset, "reader", dataset)
    samples = getattr(source, "samples", None) or [int(x) for x in getattr(source, "targets", ())]
    samples = samples or [len(dataset)]
    root = str(getattr(source, "root", ""))
    return [(s[0].removeprefix(root), s[1]) if isinstance(s, tuple) else s for s in samples]


def fingerprint(dataset):
    """A number that changes with the names, the labels and the order of a data set's images."""
    return zlib.crc32(repr(samples_of(dataset)).encode())


class Shuffle(torch.utils.data.DistributedSampler):
    """This process's images, in a new order every epoch (`set_epoch`), as (epoch, i)."""

    def __iter__(self):
        return zip(itertools.repeat(self.epoch), super().__iter__())


def open_dataset(data, part):
    """The images of `data`, "train" or "val" (those that top-1 is reported on), as a data set."""
    name, root, options = data["dataset"], data["data_dir"], {}
    if not name:  # a folder of class folders
        root = os.path.join(root, part)
        if not os.path.isdir(root):
            raise UserError(f"no folder {root}: --data-dir needs the folders train and val, each"
                            " with one folder of images per class")
        if data.get("classes") and part not in data.get("answers", ()):
            # The folders of both parts, numbered alike
            options["class_map"] = {label: i for i, label in enumerate(data["classes"])}
    try:
        dataset = timm.data.create_dataset(
            name, root=root, split={"train": "train", "val": "validation"}[part],
            search_split=bool(name), download=name.startswith("torch/"), **options)
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        why = f" (looking for classes {', '.join(data['classes'][:3])} ...)" if options else ""
        raise UserError(f"cannot open {name or root}: {first_line(error)}{why}") from error
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError(f"{name} is a stream, of which no part can be held back: use another")
    if len(dataset) == 0:
        raise UserError(f"no images in {name or root}")
    return dataset


def make_loader(data, part, batch_size, device, workers=0, limit=None, split=False, augment=None):
    """timm's loader of normalised batches (B, C, H, W) and labels (B,) on `device`, of "train"
    (without what is held back), "holdout" (that, for the search) or "val". limit: only so many, by
    the seed of the holdout. split: only this process's part. augment: flags with seed, aa and
    reprob, to train on: shuffled, augmented, split, the last incomplete batch left out."""
    source = "val" if part == "val" else "train"
    dataset = open_dataset(data, source)
    indices = torch.arange(len(dataset))
    if fingerprint(dataset) != data["fingerprint"][source]:
        raise UserError(f"{data['data_dir']} does not hold the {source} images that stage 1 saw,"
                        f" but {len(dataset)}, or other names or labels: run stage 1 again, or give"
                        " their folder with --data-dir")
    if part != "val":
        indices = indices[torch.isin(indices, data["holdout"], invert=part == "train")]
    if limit and limit < len(indices):
        generator = torch.Generator().manual_seed(data["seed"])
        indices = indices[torch.randperm(len(indices), generator=generator)[:limit]]
    rank, world = rank_and_world()
    if len(indices) < world and (split or augment):
        raise UserError(f"{part}: only {len(indices)} images for {world} processes")
    try:
        transform = timm.data.create_transform(
            tuple(data["input_size"]), is_training=bool(augment), color_jitter=0,
            auto_augment=augment and augment.aa, use_prefetcher=True, **{key: data[key] for key in (
                "mean", "std", "interpolation", "crop_pct", "crop_mode", "scale")})
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--aa {augment and augment.aa}: {error!r}; timm's notation is like"
                        " rand-m9-mstd0.5-inc1") from error
    seed = augment.seed if augment else 0
    labels = data.get("answers", {}).get(source)
    images = Images(dataset, indices[rank::world] if split else indices, transform, seed, labels)
    sampler = Shuffle(images, world, rank, seed=seed, drop_last=True) if augment else None
    loader = torch.utils.data.DataLoader(
        images, min(batch_size, len(sampler or images)), sampler=sampler, drop_last=bool(augment),
        num_workers=workers, persistent_workers=workers > 0, collate_fn=fast_collate,
        pin_memory=device.type == "cuda", generator=torch.Generator())  # apart from the training's
    return PrefetchLoader(loader, mean=data["mean"], std=data["std"], device=device,
                          re_prob=augment.reprob if augment else 0.)


@torch.no_grad()
def answers(model, batches):
    """The logits (B, classes) of each batch, in eval mode, as a list."""
    model.eval()
    return [outputs_of(model, images)[1] for images, _ in progress_bar(batches, "unpruned")]


@torch.no_grad()
def evaluate(model, batches, split=False, logits=None):
    """{"loss": mean cross entropy, "top1": %} over an iterable of (images, labels), in float32.
    logits: the unpruned network's `answers`, for {"agreement": % of equal top-1, "kl": mean
    divergence, "distance": see `uncorrelated`}. split: each process has a part of the batches."""
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=next(model.parameters()).device)
    for i, (images, labels) in enumerate(progress_bar(batches, "evaluate")):
        found = outputs_of(model, images)[1]
        sums[0] += F.cross_entropy(found, labels, reduction="sum")
        sums[1] += 100 * (found.argmax(1) == labels).sum()
        if logits:
            sums[2] += 100 * (found.argmax(1) == logits[i].argmax(1)).sum()
            sums[3] += F.kl_div(found.log_softmax(1), logits[i].log_softmax(1), reduction="sum",
                                log_target=True)
            sums[4] += len(labels) * uncorrelated(found, logits[i])
        sums[5] += len(labels)
    if split:
        all_reduce_mean([sums])
    *found, count = sums.tolist()
    names = ("loss", "top1", "agreement", "kl", "distance")[:5 if logits else 2]
    return {name: value / count for name, value in zip(names, found)}


# ---- what the stages share: training -------------------------------------------------------------

def outputs_of(network, images, amp=False):
    """A timm network's features before the pooling and its logits (B, classes), in float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        features = network.forward_features(images)
        return features.float(), network.forward_head(features).float()


def uncorrelated(found, wanted):
    """1 - the correlation of outputs (B, C) with the wanted ones, each less its mean over B, if B
    is not 1. Of networks that are far off, a squared difference prefers those that say nothing."""
    a, b = (x - x.mean(0) if len(x) > 1 else x for x in (found, wanted))
    both, ours, theirs = torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)], 1).sum(0)
    return (1 - both / (ours * theirs).sqrt().clamp(min=1e-12)).clamp(min=0)


def label_loss(logits, labels, smoothing):
    """Mean cross entropy to labels (B,), smoothed, or to what Mixup made of them (B, classes)."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)


def train(model, step, measure, loader, args, name, epochs, peak, log, hold=0.0, rows_at=(),
          still=(), state=None, **kept):
    """Trains `model` and returns it, or with --ema the average of its weights, and what
    measure(network) finds, as after every epoch: {"top1": %, …}. step(images, labels, number)
    leaves the gradients of a step, and returns its loss and what else its row of the log has.

    epochs: a range. peak: the highest rate, which is held for a share of `hold` of the steps.
    rows_at: numbers of steps inside of epochs that get rows, too. still: modules that stay in eval
    mode. After every epoch OUT.last gets `kept` and what `state` goes on from: the same bits."""
    if not epochs:
        return model, measure(model)
    device, (rank, world), steps = loader.device, rank_and_world(), len(epochs) * len(loader)
    fused = {"fused": True} if args.opt in ("adam", "adamw", "sgd") else {}  # faster, on CPUs, too
    optimizer = create_optimizer_v2(model, args.opt, peak, args.weight_decay, **fused)
    warmup = round(args.warmup * steps)
    hold = max(warmup, round(hold * steps))
    scheduler = CosineLRScheduler(optimizer, max(2, steps - hold), warmup_t=warmup,
                                  warmup_lr_init=peak / 10, warmup_prefix=True, t_in_epochs=False)
    mixup = (args.mixup or args.cutmix) and timm.data.Mixup(
        args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)
    if mixup and loader.loader.batch_size % 2:
        raise UserError("--mixup and --cutmix need an even number of images a step, not"
                        f" {loader.loader.batch_size}: give another --batch-size")
    ema = ModelEmaV3(model, args.ema, use_warmup=True) if args.ema else None
    best = ema.module if ema else model  # the one that counts
    parts, first, result = [model, best, optimizer], epochs.start, None
    if state:
        first, result = state["epoch"], state["result"]
        print(f"going on after epoch {first - epochs.start} of the {name}")
        for part, saved in zip(parts, state["parts"]):
            part.load_state_dict(saved)
    if args.compile:
        compile_blocks(model)
    losses, started = AverageMeter(), 0

    def means():
        """Training loss and images/s, over all processes, since the call before."""
        nonlocal started
        loss = torch.tensor(losses.avg, dtype=torch.float64, device=device)
        all_reduce_mean([loss])
        speed = losses.count * loader.loader.batch_size * world / (time.perf_counter() - started)
        losses.reset()
        started = time.perf_counter()
        return {"train_loss": loss.item(), "images_per_s": round(speed, 1)}

    def write(row, result):
        found = {key: result[key] for key in result if "top1" in key or key == "agreement"}
        log.append({**row, **{f"val_{key}": value for key, value in found.items()}})
        save(log, os.path.splitext(args.out)[0] + ".csv")
        print(f"{name} {row['epoch']}/{len(epochs)}  step {row['step']}/{steps}",
              *(f"{key} {value:.3f}" for key, value in row.items() if key == "lam"),
              f"lr {row['lr']:.2e}  loss {row['train_loss']:.3f}",
              *(f"{key.replace('top1', 'top-1')} {value:.2f} %" for key, value in found.items()),
              f"{row['images_per_s']:.0f} img/s", sep="  ")

    for epoch in range(first, epochs.stop):
        random_seed((1000 * args.seed + epoch) % 2**31, rank)  # nothing depends on what came before
        loader.sampler.set_epoch(epoch)
        done = epoch - epochs.start
        title = f"{name} {done + 1}/{len(epochs)}"
        bar = progress_bar(loader, title, epochs.stop - epoch if epoch == first else 0)
        started = time.perf_counter()
        model.train()
        for module in still:
            module.eval()
        for number, (images, labels) in enumerate(bar, done * len(loader)):
            scheduler.step_update(min(number, warmup) + max(0, number - hold))
            loss, shown = step(*(mixup(images, labels) if mixup else (images, labels)), number)
            all_reduce_mean([p.grad for p in model.parameters() if p.grad is not None])
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(model, number)
            losses.update(loss.item())
            row = {"network": name, "epoch": done + 1, "step": number + 1, **shown,
                   "lr": optimizer.param_groups[0]["lr"]}
            if not math.isfinite(losses.val):
                raise UserError(f"the loss is {losses.val} at step {number + 1}, lr {row['lr']:g}."
                                " Try again, with a lower --lr")
            bar.set_postfix(loss=f"{losses.avg:.3f}", **shown, refresh=False)
            if number in rows_at and (number + 1) % len(loader):
                write({**row, **means()}, {})
        row.update(means())
        if world > 1:  # each process has BN statistics of its own images
            distribute_bn(model, world, reduce=True)
            distribute_bn(best, world, reduce=True)
        check_finite(model, title, ". Try again, with a lower --lr")
        result = measure(best)
        write(row, result)
        save({"stage": "unfinished run", "flags": vars(args), "log": log, **kept, "result": result,
              "epoch": epoch + 1, "parts": [p.state_dict() for p in parts]}, args.out + ".last")
    return best, result


def compile_blocks(model):
    """torch.compile block by block: a whole network would be compiled anew for every subnet, a
    block once for lam = 0, once for 1 and once for all values between. Of the sizes of its input
    only the batch is left open: torch may fail to sort strides of unknown sizes (issue 185510)."""
    torch._dynamo.config.cache_size_limit = 256  # blocks of one class: forms, shapes, modes

    def static(compiled, x, **attn_args):
        torch._dynamo.mark_static(x, list(range(1, x.ndim)))
        return compiled(x, **attn_args)

    for module in model.modules():
        if isinstance(module, tuple(family.timm_class for family in FAMILIES)):
            module.compile()
            module._compiled_call_impl = functools.partial(static, module._compiled_call_impl)
