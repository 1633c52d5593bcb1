"""Blocks and merge: lam = 0 is timm's network bit for bit, lam = 1 is the merged network to float64
rounding."""

import copy
import os
import random
import re
import threading
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from timm.layers import SqueezeExcite
from timm.models import mlp_mixer
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck, downsample_avg, downsample_conv
from timm.models.vision_transformer import Attention, Block
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blocks
from blocks import (
    BatchNorm,
    UserError,
    cost,
    default_end_act,
    fit,
    make_prunable,
    merge,
    prunable_blocks,
    recalibrate,
    set_subnet,
)

HERE = os.path.dirname(os.path.abspath(__file__))
both_forms = pytest.mark.parametrize("form", ["reparam", "fitted"])
VIT32 = {"patch_size": 4, "img_size": 32}
NARROW = (16, 24, 32, 48)
# Networks as they are used, in the sizes that README.md names; a test that has one takes seconds
LARGE = {
    "resnet34": {},
    "resnet50": {},
    "mobilenetv2_100": {},
    "convnext_tiny": {},
    "deit_tiny_patch16_224": VIT32,
}
SMALL = {
    "test_resnet": {},
    "mobilenetv2_035": {},
    "test_convnext": {},
    "test_vit": {"img_size": 32},
    "resnet18d": {"channels": NARROW},
    "mobilenetv3_small_050": {},
    "mnasnet_050": {},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {"conv_mlp": True, "dims": NARROW},
    "test_vit2": {"img_size": 32},
    "seresnet18": {"channels": NARROW},
    "resnet26d": {"channels": NARROW},
    "efficientnet_b0": {},
    "convnextv2_atto": {"dims": NARROW},
    "naflexvit_base_patch16_gap": {"embed_dim": 48, "num_heads": 3, "depth": 3},
}
FOUR = list(SMALL)[:4]  # one of each family
large_networks = pytest.mark.parametrize("name", LARGE)
small_networks = pytest.mark.parametrize("name", SMALL)
four_networks = pytest.mark.parametrize("name", FOUR)


def create(name, **model_args):
    torch.manual_seed(0)
    model_args = {**LARGE, **SMALL}.get(name, {}) | model_args
    return timm.create_model(name, num_classes=10, **model_args).double().eval()


def create_on_meta(name, **model_args):
    with torch.device("meta"):
        return timm.create_model(name, **model_args)


def images(size, count=4):
    rng = torch.Generator().manual_seed(size)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=rng)


def sizes(name):
    """Of images: odd and even; a ViT has one size only."""
    return (32,) if "vit" in name or "deit" in name else (33, 32, 47)


def downsample(kind, stride):
    make = {"conv": downsample_conv, "avg": downsample_avg}[kind]
    return make(8, 12, kernel_size=1, stride=stride)


def inverted(outputs=8, exp_ratio=6, **args):
    return InvertedResidual(8, outputs, exp_ratio=exp_ratio, **args)


BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "basic, dilated": lambda: BasicBlock(8, 8, dilation=2),
    "basic, stride 2": lambda: BasicBlock(8, 12, stride=2, downsample=downsample("conv", 2)),
    "basic, wider": lambda: BasicBlock(8, 12, downsample=downsample("conv", 1)),
    "basic, resnet-d": lambda: BasicBlock(8, 12, stride=2, downsample=downsample("avg", 2)),
    "bottleneck": lambda: Bottleneck(8, 2),
    "bottleneck, dilated": lambda: Bottleneck(8, 2, dilation=2),
    "bottleneck, stride 2": lambda: Bottleneck(8, 3, stride=2, downsample=downsample("conv", 2)),
    "bottleneck, resnet-d": lambda: Bottleneck(8, 3, stride=2, downsample=downsample("avg", 2)),
    "bottleneck, grouped": lambda: Bottleneck(8, 2, cardinality=2, base_width=32),
    "bottleneck, resnext": lambda: Bottleneck(8, 2, cardinality=2),
    "inverted": lambda: inverted(act_layer=nn.ReLU6),
    "inverted, stride 2": lambda: inverted(12, stride=2, act_layer=nn.ReLU6),
    "inverted, no skip": lambda: inverted(noskip=True),
    "inverted, 5x5 stride 2": lambda: inverted(dw_kernel_size=5, stride=2),
    "inverted, 5x5 to 3x3": lambda: inverted(dw_kernel_size=5),
    "inverted, 5x5 to 3x3, TF padding": lambda: inverted(
        12, exp_ratio=3, dw_kernel_size=5, stride=2, pad_type="same"
    ),
    "inverted, dilated 5x5 to 3x3": lambda: inverted(dw_kernel_size=5, dilation=2),
    "inverted, TF padding": lambda: inverted(12, stride=2, pad_type="same"),
    "convnext": lambda: ConvNeXtBlock(8, ls_init_value=1.0),
    "convnext, conv mlp": lambda: ConvNeXtBlock(8, conv_mlp=True, ls_init_value=None),
    "convnext, stride 2": lambda: ConvNeXtBlock(8, stride=2, ls_init_value=0.5),
    "convnext, no bias": lambda: ConvNeXtBlock(8, conv_bias=False),
    "vit": lambda: Block(8, 2),
    "vit, qk norm": lambda: Block(8, 2, qkv_bias=True, qk_norm=True),
    "vit, layer scale": lambda: Block(8, 2, qkv_bias=True, qk_norm=True, init_values=0.3),
}
# What cannot be composed, and so is fitted in either form
ONLY_FITTED = {
    "basic, squeeze-excite": lambda: BasicBlock(8, 8, attn_layer="se"),
    "bottleneck, squeeze-excite": lambda: Bottleneck(8, 2, attn_layer="se"),
    "inverted, squeeze-excite": lambda: inverted(se_layer=SqueezeExcite),
    "inverted, 3x3 before": lambda: inverted(exp_kernel_size=3),
    "convnext, GRN": lambda: ConvNeXtBlock(8, use_grn=True, ls_init_value=None),
    "vit, norm in its MLP": lambda: Block(8, 2, scale_mlp_norm=True),
}
BLOCKS |= ONLY_FITTED


def network_of(kind):
    """One block, and random features for it: maps of 8 channels, or tokens for a ViT's."""
    torch.manual_seed(0)

    def inputs(count=4, height=9, width=9):
        shape = (height * width, 8) if kind.startswith("vit") else (8, height, width)
        return torch.randn(count, *shape, dtype=torch.float64)

    return nn.Sequential(BLOCKS[kind]()).double().eval(), inputs


def without_last_act(block):
    """What is fitted is before ResNet's last activation."""
    setattr(block, "act3" if isinstance(block, Bottleneck) else "act2", nn.Identity())


@torch.no_grad()
def randomise(model, batch, strength=1.0):
    """Random BN affine, layer scale and biases; BN statistics as `batch` gives them, then shaken:
    fresh BN hides every bug, but outputs that are all clipped by ReLU6 would hide as many."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.weight.uniform_(1 - strength / 2, 1 + strength / 2)
            module.bias.normal_(std=strength / 2)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            module.bias.normal_(std=0.1)
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            module.gamma.uniform_(0.2, 0.5)
        for layer in module.fitted.modules() if isinstance(module, blocks.Prunable) else ():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):  # as if fitted
                layer.weight.normal_(std=0.1)
    recalibrate(model, [batch])
    for module in model.modules():
        if isinstance(module, BatchNorm):
            noise = torch.randn_like(module.running_mean)
            module.running_mean += strength / 5 * module.running_var.sqrt() * noise
            noise = torch.empty_like(module.running_var)
            module.running_var *= noise.uniform_(1 - strength / 3, 1 + strength / 3)


@torch.no_grad()
def assert_same(ours, merged, batch):
    a, b = ours(batch), merged(batch)
    assert a.dtype == b.dtype == torch.float64
    assert (a - a[:1]).abs().mean() > 1e-3, "outputs that do not depend on the image test nothing"
    assert (a - b).abs().max() <= 1e-10


def check_merge(model, prune, sizes, strength=1.0):
    set_subnet(model, prune)
    randomise(model, images(sizes[0], 16), strength)
    merged = merge(model)
    for size in sizes:
        assert_same(model, merged, images(size))
    left = (blocks.Prunable, nn.BatchNorm2d)
    assert not any(isinstance(module, left) for module in merged.modules())


@large_networks
def test_merged_network_is_the_trained_one(name):
    """In the paper's form, in float64 and in float32."""
    model = create(name)
    names = make_prunable(model, end_act=True)
    check_merge(model, names, sizes(name)[-1:])
    # In float32 less random: a deep net with BN parameters that wild amplifies its own rounding
    # errors beyond the bound.
    batch = images(sizes(name)[-1], 16)
    randomise(model, batch, strength=0.2)
    merged, batch = merge(model).float(), batch.float()
    with torch.no_grad():
        a, b = model.float()(batch), merged(batch)
    assert (a - b).abs().max() <= 1e-4 * a.std()


@both_forms
@small_networks
def test_merged_small_network_is_the_trained_one(name, form):
    """All blocks pruned, every other one, some to random rungs, and none."""
    # At 1 their logits, and so rounding errors, are in the thousands
    strength = 0.5 if name in ("efficientnet_b0", "mnasnet_050") else 1.0
    model = create(name)
    names = make_prunable(model, form, end_act=True if form == "reparam" else None)
    check_merge(model, names, sizes(name), strength)
    check_merge(model, names[::2], sizes(name)[:1], strength)
    check_merge(model, [], sizes(name)[:1], strength)
    model, rng = create(name), random.Random(form)
    make_prunable(model, form, attention=name in ("test_vit", "test_vit2"))
    rungs = {path: rng.choice(block.rungs) for path, block in prunable_blocks(model).items()}
    some = {path: rung for path, rung in rungs.items() if rng.random() < 0.8}
    check_merge(model, some, sizes(name)[:1], 0.5)


@four_networks
@torch.no_grad()
def test_merged_network_is_a_plain_module(name):
    """No trace of what it was made from; strict loading, memory formats, half precision and
    torch.compile just work."""
    model, batch = create(name), images(32, 8)
    set_subnet(model, make_prunable(model)[::2])
    randomise(model, batch, strength=0.2)
    merged, other = merge(model).float(), create(name).float()
    ours = ("fitted", "end_act", "norm_bn", "num_batches")
    assert not any(word in key for key in merged.state_dict() for word in ours)
    kinds = {type(module) for module in merged.modules() if not list(module.children())}
    assert all(kind.__module__.startswith(("torch.nn.", "timm.layers.")) for kind in kinds), kinds
    set_subnet(other, make_prunable(other)[::2])
    other = merge(other)
    other.load_state_dict(merged.state_dict())
    assert torch.equal(other(batch.float()), merged(batch.float()))
    merged.double()  # in float32 rounding errors of random weights are larger than some bounds
    expected = merged(batch)
    channels_last = copy.deepcopy(merged).to(memory_format=torch.channels_last)
    for network in (channels_last, torch.compile(merged, backend="aot_eager")):
        assert (network(batch) - expected).abs().max() <= 1e-10
    batch, expected = batch.float(), merged.float()(batch.float())
    # Random weights amplify rounding errors: those of the unmerged net are the measure
    for dtype in (torch.bfloat16, torch.half):
        error, usual = (
            (network.to(dtype)(batch.to(dtype)).float() - expected).norm()
            for network in (merged, model)
        )
        assert error <= 1.5 * usual + 0.01 * expected.norm()


def test_every_timm_model_of_the_families(request, capsys):
    """With up to 30 M parameters: every other prunable block pruned, to its first rung and to a
    random one, merged, the whole network compared. What is left out either has no such block or is
    named. Without --run-slow every eightieth name and one of each family; with --run-slow NAMES
    these, of any size."""
    errors, refused = {}, []
    pattern = request.config.getoption("--run-slow")
    names = timm.list_models(pattern or "*")
    if not pattern:
        of_each = {
            "resnet18",
            "resnet26",
            "semnasnet_050",
            "convnext_atto",
            "deit_tiny_patch16_224",
        }
        names = sorted({*names[::80], *of_each})
    for name in names:
        try:
            model = create_on_meta(name)
        except NotImplementedError:  # not all of torch 2.6 works there
            model = timm.create_model(name)
        if sum(p.numel() for p in model.parameters()) > 30e6 and pattern in (None, "*"):
            continue
        try:
            make_prunable(model)
        except UserError as error:
            refused += [f"{name}: {error}"] * (";" in str(error))
            continue
        model = timm.create_model(name).double().eval()
        names = make_prunable(model)
        channels, height, width = model.default_cfg["input_size"]
        if not model.default_cfg.get("fixed_input_size"):
            height = width = 64
        batch = torch.randn(4, channels, height, width, dtype=torch.float64)
        rng = random.Random(name)
        rungs = {path: rng.choice(prunable_blocks(model)[path].rungs) for path in names[::2]}
        error = 0
        for prune in (names[::2], rungs):
            set_subnet(model, prune)
            randomise(model, batch, strength=0.2)
            with torch.no_grad():
                expected = model(batch)
                difference = (merge(model)(batch) - expected).abs().max()
            error = max(error, difference / expected.abs().max().clamp(min=1))
        family = type(prunable_blocks(model)[names[0]]).timm_class.__name__
        errors.setdefault(family, {})[name] = error.item()
    with capsys.disabled():
        for family, of_family in errors.items():
            worst = max(of_family.values())
            print(f"\n{family}: {len(of_family)} timm models, worst error {worst:.1e}", end="")
        print(*(f"\nrefused: {text.split(': use')[0]}" for text in refused), sep="")
    wrong = {name: e for part in errors.values() for name, e in part.items() if not e <= 1e-10}
    assert errors and not wrong
    assert len(errors) == len(blocks.FAMILIES) or pattern not in (None, "*")


@pytest.mark.parametrize("choice", "ABDF")
def test_choices_of_blocks_by_depthshrinker(choice):
    """Fu et al., "DepthShrinker", ICML 2022: which inverted residuals of MobileNetV2-1.4 stay as
    they are. One choice is computed, the other three are only merged, without numbers."""
    path = os.path.join(HERE, "benchmarks", "specs", f"depthshrinker-{choice}.json")
    spec = blocks.read_subnet(path)
    if choice == "A":
        model = create(spec["model"])
        make_prunable(model, end_act=True)
        check_merge(model, spec["prune"], (33,))
    else:
        model = create_on_meta(spec["model"])
        make_prunable(model)
        set_subnet(model, spec["prune"])
        merged = [part for part in merge(model).modules() if isinstance(part, blocks.MergedBlock)]
        assert len(merged) == len(spec["prune"])


@both_forms
@pytest.mark.parametrize("end_act", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_merged_block_is_the_trained_one(kind, end_act, form):
    """All rungs, in the fitted form; the paper's has only the first."""
    model, inputs = network_of(kind)
    make_prunable(model, form, end_act)
    block = model[0]
    shape = inputs(1, 32, 32).shape[1:]
    macs = [cost(model, shape)["macs"]]
    for rung in block.rungs if form == "fitted" else block.rungs[:1]:
        set_subnet(model, {"0": rung})
        randomise(model, inputs(16))
        merged, fused = merge(model), nn.Sequential(copy.deepcopy(block).fuse())
        for height, width in ((16, 16), (17, 17), (23, 16), (5, 7)):
            batch = inputs(4, height, width)
            assert_same(model, merged, batch)
            assert_same(model, fused, batch)
        macs.append(cost(merged, shape)["macs"] if list(merged.parameters()) else 0)
        if not kind.startswith("vit"):
            convs = [module for module in merged.modules() if isinstance(module, nn.Conv2d)]
            in_skip = "resnet-d" in kind
            assert len(convs) == {"separable": 2, "lowrank": 2, "skip": 0}.get(rung, 1) + in_skip
            assert all(conv.weight.is_contiguous() for conv in convs)
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == len(macs)
    if "TF" not in kind and form == "fitted" and "vit" not in kind:  # for all of the block
        assert (macs[-1] == 0) == ("skip" in block.rungs)


@pytest.mark.parametrize(
    "name, inserted, if_all",
    [("mobilenetv2_035", False, True), ("test_convnext", True, True), ("test_vit", False, False)],
)
def test_where_end_activations_are_inserted_by_default(name, inserted, if_all):
    """In ConvNeXts of the paper's form, and where without them all of a network would be linear."""
    model = create_on_meta(name)
    names = make_prunable(model)
    for block in prunable_blocks(model).values():
        assert (block.end_act is not None) == inserted
    assert not default_end_act(model, "fitted", names[1:])
    for form in ("reparam", "fitted"):
        assert default_end_act(model, form, names) == if_all


FITTED = ["basic", "bottleneck", "bottleneck, stride 2", "bottleneck, resnet-d"]
FITTED += ["inverted", "inverted, stride 2", "convnext"]


@pytest.mark.parametrize("kind", FITTED)
@torch.no_grad()
def test_lower_rungs_are_fitted_as_well_as_can_be(kind):
    """Planted in the place of the block, as a conv of that shape, they are found again; and a
    search in all directions around what was fitted to the block itself finds nothing better."""
    model, inputs = network_of(kind)
    make_prunable(model, "fitted", end_act=False)
    block, batch = model[0], inputs(32)
    without_last_act(block)
    randomise(model, batch)
    wanted = model(batch)
    skip, _ = block.split(batch)

    def pruned(rung):
        set_subnet(model, {"0": rung})
        return model(batch)

    for rung in block.rungs[:-1] if "skip" in block.rungs else block.rungs:
        planted = pruned(rung) - skip
        fit(model, {"0": rung}, [batch], ridge=1e-12)
        least, last = (pruned(rung) - wanted).square().mean(), block.fitted[rung][-1]
        for parameter in (last.weight, last.bias):
            before = parameter.clone()
            for step in (0.99, 1.01):
                parameter.copy_(before * step)
                assert (pruned(rung) - wanted).square().mean() >= least * (1 - 1e-9)
            parameter.copy_(before)
        block.reparam_layers = lambda x, lam, planted=planted: planted
        fit(model, {"0": rung}, [batch], ridge=1e-12)
        del block.reparam_layers
        if kind != "convnext":  # whose kernels stay the block's
            assert (pruned(rung) - skip - planted).norm() < 1e-4 * planted.norm()


def test_separable_convs_are_solved_in_rounds():
    """Depthwise kernels and 1x1 conv in turn: nearly as good as after fifty rounds, which a single
    one is not."""
    channels, taps, outputs = 4, 9, 6
    torch.manual_seed(4)
    root = torch.randn(channels * taps, channels * taps).double()
    dense = torch.randn(channels * taps, outputs).double()
    gram = root @ root.T  # of inputs that say much about each other
    cross = gram @ dense

    def error(*rounds):
        kernels = blocks.separate(gram, cross, channels, 1e-9, *rounds)
        depthwise = torch.block_diag(*kernels[:, None])
        point = blocks.solve(depthwise @ gram @ depthwise.T, depthwise @ cross, 1e-9)
        wrong = depthwise.T @ point - dense
        return (wrong * (gram @ wrong)).sum()

    assert error() < 1.05 * error(50) and error(1) > 1.2 * error(50)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@torch.no_grad()
def test_low_rank_is_the_best_of_that_rank(ridge):
    """Against the SVD of the whitened problem, and solving both layers in turn from random ones."""
    model, _ = network_of("bottleneck")
    make_prunable(model, "fitted")
    block, (root, cross), mean = model[0], torch.randn(2, 8, 8).double(), torch.ones(8).double()
    gram = root @ root.T
    whole = gram + ridge * gram.diagonal().diag()  # the error's inner product, ridge included
    block.solve_rung("lowrank", mean, gram, cross, mean, ridge)
    first, last, bn = block.fitted["lowrank"]
    product = (last.weight.flatten(1) @ first.weight.flatten(1)).T
    variance = (product * (gram @ product)).sum(0)
    torch.testing.assert_close(bn.running_var, variance)
    torch.testing.assert_close(bn.weight, (variance + bn.eps).sqrt())

    white = np.linalg.inv(np.linalg.cholesky(whole.numpy()))
    u, s, v = np.linalg.svd(white @ cross.numpy())
    best = white.T @ (u[:, :2] * s[:2] @ v[:2])
    torch.testing.assert_close(product, torch.from_numpy(best), rtol=1e-8, atol=1e-8)

    def error(weight):
        return (weight * (whole @ weight)).sum() - 2 * (weight * cross).sum()

    for _ in range(3):
        left = torch.randn(8, 2).double()
        for _ in range(500):
            right = torch.linalg.solve(left.T @ whole @ left, left.T @ cross)
            left = torch.linalg.solve(whole, cross @ right.T) @ torch.linalg.inv(right @ right.T)
        assert error(left @ right) >= error(product) - 1e-9 * error(product).abs()
    assert error(left @ right) == pytest.approx(error(product).item(), rel=1e-3)


@torch.no_grad()
def test_attention_is_a_choice_of_its_own():
    """With attention=True: a block's MLP, its attention or both. Exact, additive in cost, fitted by
    least squares."""
    theirs = create("deit_tiny_patch16_224", depth=4)
    model, batch = copy.deepcopy(theirs), images(32, 16) + 3 * images(1, 16)
    names = make_prunable(model, attention=True)
    assert names == [
        *("blocks.0.attn", "blocks.0", "blocks.1.attn", "blocks.1"),
        *("blocks.2.attn", "blocks.2", "blocks.3"),
    ]
    assert torch.equal(model(batch), theirs(batch))
    costs = {}
    for chosen in [[], *([name] for name in names), names[:2], names[1:4], names]:
        set_subnet(model, chosen)
        randomise(model, batch)
        merged = merge(model)
        assert_same(model, merged, batch)
        costs[tuple(chosen)] = cost(merged, (3, 32, 32))
        left = sum(isinstance(module, Attention) for module in merged.modules())
        assert left == 4 - sum("attn" in name for name in chosen)
    for key in ("params", "macs"):
        savings = [costs[()][key] - costs[name,][key] for name in names]
        assert min(savings) > 0 and costs[()][key] - sum(savings) == costs[tuple(names)][key]
    set_subnet(model, ["blocks.1.attn"], 0.5)
    with pytest.raises(ValueError, match="transition"):
        merge(model)

    set_subnet(model, [])
    expected, seen = model(batch), []
    attn = model.blocks[1].attn
    attn.register_forward_hook(lambda _, args, output: seen.append((*args, output)))
    model(batch)
    inputs, outputs = (rows.flatten(0, 1) for rows in seen[0])
    inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
    fit(model, names, batch.split(8), in_turn=False, ridge=1e-10)
    assert torch.equal(model(batch), expected)
    set_subnet(model, ["blocks.1.attn"])
    model(batch)
    best = inputs @ torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution
    bound = 1e-6 * best.std().item()
    torch.testing.assert_close(seen[-1][1].flatten(0, 1), best, rtol=0, atol=bound)
    with pytest.raises(UserError, match="ResNet has no attention that could be pruned"):
        make_prunable(create("test_resnet"), attention=True)


@pytest.mark.parametrize("kind", ["inverted", "convnext"])
def test_end_activation_is_there_when_asked_for(kind):
    outputs = []
    for end_act in (False, True):
        model, inputs = network_of(kind)
        make_prunable(model, end_act=end_act)
        set_subnet(model, ["0"])
        torch.manual_seed(1)
        batch = inputs()
        recalibrate(model, [batch])
        outputs.append(model(batch))
    expected = outputs[0].clamp(0, 6) if kind == "inverted" else nn.functional.gelu(outputs[0])
    torch.testing.assert_close(outputs[1], expected)
    assert not torch.equal(*outputs)


def least_error(inputs, wanted, rank=None):
    """The least mean square error of `wanted`, as a linear function of `inputs`, of that rank,
    and a constant."""
    inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
    best = inputs @ torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    u, s, v = torch.linalg.svd(best - best.mean(0), full_matrices=False)  # by Eckart and Young
    best = best.mean(0) + u[:, :rank] * s[:rank] @ v[:rank]
    return (best - wanted).square().mean().item()


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_fit_is_least_squares(kind):
    """Against all inputs at once: the same error, in however many batches, and the baseline block
    stays what it was."""
    model, inputs = network_of(kind)
    make_prunable(model, "fitted", end_act=False)
    block, batch = model[0], inputs(24)
    without_last_act(block)
    randomise(model, batch)
    expected = model(batch)
    skip, inside = block.split(batch)
    layers = block.reparam_layers(inside, 0)
    assert torch.equal(block.join(skip, layers, 0), expected)
    rank = block.rank if block.rung == "lowrank" else None
    least = least_error(block.linear_inputs(inside), blocks.pixel_rows(layers), rank)
    for batches in ([batch], batch.split(5)):
        fit(model, ["0"], batches, ridge=1e-12)
        assert torch.equal(model(batch), expected)
        set_subnet(model, ["0"])
        assert (model(batch) - expected).square().mean() == pytest.approx(least, rel=1e-6)
        assert_same(model, merge(model), batch)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("name, attention", [*((name, False) for name in FOUR), ("test_vit", True)])
@torch.no_grad()
def test_fit_in_turn_is_least_squares_on_what_each_block_will_get(name, attention, short, capsys):
    """One walk through the network, against solving each block in the pruned network. The batches
    have different sizes. short: there is memory for two of them; as the third is these two again,
    it changes nothing."""
    model, batch = create(name), images(32, 24)
    names = make_prunable(model, "fitted", end_act=False, attention=attention)
    names = names[:5] if attention else names[::2]
    seen, found = {}, prunable_blocks(model)
    for key in names:
        without_last_act(found[key])
        found[key].register_forward_hook(
            lambda block, args, output, key=key: seen.update({key: (args[0], output)})
        )
    unpruned = model(batch)
    wanted = {key: output for key, (_, output) in seen.items()}
    per_image = 2 * seen[names[0]][0][0].nbytes  # of what waits: the unpruned and the pruned half
    memory = {"max_bytes": 30 * per_image} if short else {}
    fit(model, names, [*batch.split([16, 8]), batch], ridge=1e-12, **memory)
    assert ("the fit takes 2 batches only" in capsys.readouterr().out) == short
    assert torch.equal(model(batch), unpruned)
    set_subnet(model, names)
    model(batch)
    for key, (x, output) in seen.items():
        skip, inside = found[key].split(x)
        target = blocks.pixel_rows(wanted[key] - skip)
        error = (blocks.pixel_rows(output - skip) - target).square().mean()
        least = least_error(found[key].linear_inputs(inside), target)
        assert error <= 1.0001 * least + 1e-9 * target.square().mean()


@pytest.mark.parametrize("name, chain", [("hrnet_w18_small", False), ("test_resnet", True)])
def test_a_fit_of_blocks_that_do_not_run_one_by_one(name, chain, capsys):
    """In HRNet there are branches: what a block gets is not all that reaches the next one."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    names, batches = make_prunable(model, "fitted")[-3:], [images(32).float() for _ in range(2)]
    again = copy.deepcopy(model)
    fit(model, names, batches)
    assert ("through the whole network" in capsys.readouterr().out) != chain
    fit(again, names, batches, chain=False)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="prunable already"):
        make_prunable(model)


@pytest.mark.parametrize("in_turn", [True, False])
@torch.no_grad()
def test_a_fit_takes_its_pixels_from_everywhere(in_turn):
    """Half of those of an image whose upper half is unlike the lower: nearly as good as all."""
    model, inputs = network_of("inverted")
    make_prunable(model, "fitted", end_act=False)
    randomise(model, inputs(16))
    batch, errors = inputs(1, 32, 32), []
    batch[:, :, 16:] += 3
    expected = model(batch)
    for pixels in (32 * 32, 32 * 16):
        fit(model, ["0"], [batch], in_turn, pixels=pixels)
        set_subnet(model, ["0"])
        errors.append((model(batch) - expected).norm())
    assert errors[0] < errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("in_turn", [True, False])
def test_an_error_inside_the_fit_is_the_caller_s(in_turn):
    """And nothing of the fit stays: no hook, no forward in the place of a block's, no thread."""
    model = create("test_resnet")
    names = make_prunable(model, "fitted")
    fit(model, names, [images(32)], in_turn)
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="channels"):
        fit(model, names, [images(32), torch.zeros(2, 5, 32, 32).double()], in_turn)
    assert threading.active_count() == threads
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert model(images(32)).shape == (4, 10)


def test_a_fit_keeps_no_more_than_it_may(capsys):
    """Of late blocks: their small inputs wait, up to max_bytes, and no images."""
    model = create("mobilenetv2_035")
    names = make_prunable(model, "fitted")[-2:]
    seen, alive = [], []  # references to what the network and the blocks got, and its bytes

    def remember(module, args):
        if module is model:  # a batch begins
            left = {id(x): x.nbytes for ref in seen if (x := ref()) is not None}
            alive.append(sum(left.values()))
        seen.append(weakref.ref(args[0]))

    for module in (model, *prunable_blocks(model).values()):
        module.register_forward_pre_hook(remember)
    # Of an input the unpruned and the pruned network's wait; five batches of them are less than one
    # of images
    waiting = 5 * 2 * torch.empty(4, 56, 2, 2).double().nbytes
    batch = 2 * images(64).nbytes
    assert 10 * waiting < batch
    batches = (images(64) for _ in range(9))
    fit(model, names, batches, max_bytes=waiting)
    assert "the fit takes 5 batches only" in capsys.readouterr().out and len(list(batches)) == 3
    assert len(alive) == 6 + 5 and waiting <= max(alive) <= waiting + 2 * batch


@small_networks
@torch.no_grad()
def test_fit_survives_inputs_that_tell_nothing(name):
    """Grey images, fewer than unknowns: systems as singular as they get. Pruned blocks are no worse
    than none."""
    model = create(name).float()
    names = make_prunable(model, "fitted", end_act=False)
    for batch in (torch.zeros(2, 3, 32, 32), images(32, 2).float()):
        set_subnet(model, [])
        expected = model(batch)
        fit(model, names, [batch])
        set_subnet(model, names)
        fitted = model(batch)
        assert torch.isfinite(fitted).all()
        for block in prunable_blocks(model).values():
            blocks.zero(block.fitted[block.rung][-1])
        assert (fitted - expected).norm() <= 1.01 * (model(batch) - expected).norm() + 1e-4


@both_forms
@pytest.mark.parametrize("train", [False, True])
@small_networks
def test_nothing_pruned_is_timm_bit_for_bit(name, train, form):
    theirs = create(name).float().train(train)
    ours = copy.deepcopy(theirs)
    names = make_prunable(ours, form)
    timm_keys, our_keys = list(theirs.state_dict()), list(ours.state_dict())
    assert [key for key in our_keys if key in timm_keys] == timm_keys
    new = re.compile(r"\.fitted\." if form == "fitted" else r"\.fitted\.|\.norm_bn\.")
    assert all(new.search(key) for key in set(our_keys) - set(timm_keys))
    batch = images(32).float()
    torch.manual_seed(1)
    expected = theirs(batch)
    for prune, lam in (([], 1.0), (names, 0.0)):
        set_subnet(ours, prune, lam)
        torch.manual_seed(1)
        assert torch.equal(copy.deepcopy(ours)(batch), expected)


@pytest.mark.parametrize("name, count", [*zip(LARGE, (16, 16, 16, 18, 12))])
def test_which_blocks_are_prunable(name, count):
    model = create_on_meta(name)
    names = make_prunable(model)
    assert len(names) == count and names == list(prunable_blocks(model))


@both_forms
@pytest.mark.parametrize("end_act", [None, True])
@small_networks
@torch.no_grad()
def test_lam_is_continuous(name, form, end_act):
    """lam close to 0 is close to timm's block, lam close to 1 to the pruned one: nothing jumps."""
    model = create(name)
    names = make_prunable(model, form, end_act)
    set_subnet(model, names)
    randomise(model, images(32, 16))
    outputs = {}
    for lam in (0, 1e-7, 0.5, 1 - 1e-7, 1):
        set_subnet(model, names, lam)
        outputs[lam] = model(images(32))
    scale = outputs[0].std() + outputs[1].std()
    assert (outputs[0] - outputs[1e-7]).abs().max() < 1e-3 * scale
    assert (outputs[1] - outputs[1 - 1e-7]).abs().max() < 1e-3 * scale
    assert (outputs[1] - outputs[0]).abs().max() > 1e-2 * scale


# The weights that the paper's form shares with the baseline block, and those that it must not use
OWN_WEIGHTS = {
    "basic": ["conv1", "bn1", "conv2", "bn2"],
    "bottleneck": ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"],
    "inverted": ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"],
    "convnext": ["conv_dw", "norm_bn", "mlp.fc1", "mlp.fc2"],
    "convnext, conv mlp": ["conv_dw", "norm_bn", "mlp.fc1", "mlp.fc2"],
    "vit": ["norm_bn", "mlp.fc1", "mlp.fc2", "attn.qkv"],
}


@pytest.mark.parametrize("kind", OWN_WEIGHTS)
@torch.no_grad()
def test_the_paper_s_form_is_the_block_s_own_layers(kind):
    """At lam = 1 a change of the block's own weights changes the pruned output, and the merged
    network alike. LayerNorm and ResNet's outer taps have no part in it any more."""
    model, inputs = network_of(kind)
    make_prunable(model)
    set_subnet(model, ["0"])
    batch = inputs(8)
    randomise(model, batch)
    before = model(batch)
    for name in OWN_WEIGHTS[kind]:
        weight = model[0].get_submodule(name).weight
        weight += 0.1 * torch.randn_like(weight)
        after = model(batch)
        assert (after - before).abs().max() > 1e-3, name
        assert_same(model, merge(model), batch)
        before = after
    if kind in ("basic", "bottleneck"):
        outer = model[0].conv2.weight
        centre = outer[:, :, 1, 1].clone()
        outer.normal_()
        outer[:, :, 1, 1] = centre
    for name in ("norm", "norm2"):
        if isinstance(getattr(model[0], name, None), nn.LayerNorm):
            getattr(model[0], name).weight.normal_()
    assert torch.equal(model(batch), before)


@both_forms
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "inverted", "convnext", "vit"])
def test_the_form_of_both_is_trained(kind, form):
    """Gradients reach the block's own weights in the paper's form, the new layers in the fitted."""
    model, inputs = network_of(kind)
    make_prunable(model, form)
    set_subnet(model, ["0"])
    model(inputs()).sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    own = {name for name in trained if name.startswith(("0.conv", "0.mlp"))}
    new = {name for name in trained if name.startswith("0.fitted.")}
    assert (bool(own), bool(new)) == (form == "reparam", form == "fitted")


@pytest.mark.parametrize("kind", ONLY_FITTED)
def test_blocks_whose_own_layers_cannot_merge_are_fitted(kind):
    model, _ = network_of(kind)
    make_prunable(model, "reparam")
    why = {
        "basic, squeeze-excite": "squeeze-excite inside",
        "bottleneck, squeeze-excite": "squeeze-excite inside",
        "inverted, squeeze-excite": "squeeze-excite inside",
        "inverted, 3x3 before": "grouped or larger convs inside",
        "convnext, GRN": "no plain MLP inside (GlobalResponseNormMlp)",
        "vit, norm in its MLP": "no plain MLP inside (Mlp)",
    }
    assert model[0].rung in model[0].fitted and model[0].why_not_reparam(model[0]) == why[kind]


@torch.no_grad()
def test_an_even_kernel_is_not_merged_as_if_it_had_a_centre():
    _, inputs = network_of("basic")
    model = nn.Sequential(inverted(dw_kernel_size=4, pad_type="same")).double().eval()
    make_prunable(model)
    assert model[0].rungs == ["separable", "1x1", "skip"]
    randomise(model, inputs(16))
    for rung in model[0].rungs:
        set_subnet(model, {"0": rung})
        assert_same(model, merge(model), inputs())


@pytest.mark.parametrize("name, gmacs", [*zip(LARGE, (3.664, 4.089, 0.301, 4.456, 1.254))])
def test_cost_is_that_of_the_merged_network(name, gmacs):
    """The same in both forms: one subnet.json serves both."""
    model, size = create_on_meta(name), (3, 224, 224)
    baseline = cost(model, size)
    assert baseline["macs"] / 1e9 == pytest.approx(gmacs, abs=5e-4)
    names = make_prunable(model)
    unpruned = cost(merge(model), size)
    assert unpruned["macs"] == baseline["macs"] and unpruned["params"] <= baseline["params"]
    other = create_on_meta(name)
    make_prunable(other, "fitted")
    merged = []
    for network in (model, other):
        set_subnet(network, names)
        merged.append(merge(network))
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in merged]
    assert shapes[0] == shapes[1]
    pruned = cost(merged[0], size)
    assert pruned["macs"] < baseline["macs"] and pruned["params"] < baseline["params"]


def test_cost_where_a_parameter_is_an_input():
    vit = timm.create_model(  # pools by attention
        "vit_base_patch16_siglip_224", **VIT32, embed_dim=48, num_heads=3, depth=1
    )
    assert cost(vit, (3, 32, 32))["macs"] > 0
    assert all(parameter.requires_grad for parameter in vit.parameters())


class OneDevice(TorchDispatchMode):
    """Refuses tensors of two devices, as CUDA does; meta does so in most operations, but not in
    convolutions."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim]
        copies = ("aten::copy_", "aten::_to_copy")
        assert func.name().split(".")[0] in copies or len({x.device for x in tensors}) < 2, func
        return func(*args, **(kwargs or {}))


@both_forms
@pytest.mark.parametrize("kind", [*BLOCKS, *FOUR])
def test_nothing_stays_on_another_device(kind, form, monkeypatch):
    """A prunable network can be moved, before and after make_prunable. The meta device computes
    shapes only."""
    if kind in BLOCKS:
        model, inputs = network_of(kind)
        batch = inputs().to("meta")
    else:
        model, batch = create(kind), images(32).to("meta")
    moved = copy.deepcopy(model).to("meta")
    for network in (moved, model):
        end_act = None if "vit" in kind else True
        names = make_prunable(network, form, end_act, attention=kind == "test_vit")[:3]
    assert all(tensor.is_meta for tensor in moved.state_dict().values())
    model.to("meta")
    # Nothing of meta is true or false, but the fit asks whether its numbers are finite
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
    with OneDevice():
        for lam in (0, 0.5, 1) if kind in BLOCKS else (0.5,):
            set_subnet(model, names, lam)
            for train in (True, False):
                model.train(train)(batch).sum().backward()
        fit(model, names, [batch, (batch, None)], in_turn=False)  # all rungs
        ladders = {path: prunable_blocks(model)[path].rungs for path in names}
        for rung in range(max(map(len, ladders.values()))):
            prune = {path: rungs[min(rung, len(rungs) - 1)] for path, rungs in ladders.items()}
            fit(model, prune, [batch, (batch, None)])
            set_subnet(model, prune)
            assert merge(model)(batch).shape == model(batch).shape


def test_recalibration_forgets_what_was_before():
    model = create("test_convnext")
    names = make_prunable(model)
    randomise(model, images(32))
    set_subnet(model, names[:3])
    batches = [images(32), images(33)]
    recalibrate(model, batches)
    first = model(images(40))
    recalibrate(model, [images(47) * 3 + 1])
    assert not torch.equal(model(images(40)), first)
    recalibrate(model, batches)
    assert torch.equal(model(images(40)), first) and not model.training


def test_recalibration_takes_what_it_gets():
    """A last batch of one image, which at 32 px is one pixel in the end, is left out; BNs that do
    not run keep their own."""
    model = create("resnet18d")
    names = make_prunable(model, "fitted")
    recalibrate(model, [images(32)])
    first, mean = model(images(32)), model.layer1[0].bn1.running_mean.clone()
    recalibrate(model, [images(32), images(32, 1)])
    assert torch.equal(model(images(32)), first)
    set_subnet(model, names)
    recalibrate(model, [images(32) + 1])
    assert torch.equal(model.layer1[0].bn1.running_mean, mean)


@pytest.mark.parametrize("batches", [[], [images(96, 1), images(96, 1)]])
def test_no_statistics_of_no_images_or_of_single_ones(batches):
    """What failed leaves the network as it was used: in eval mode, with its momentum."""
    model = create("test_resnet")
    with pytest.raises(UserError, match="no images|batches of two images or more"):
        recalibrate(model, iter(batches))
    bns = [module for module in model.modules() if isinstance(module, blocks.BatchNorm)]
    assert {(bn.momentum, bn.training) for bn in bns} == {(0.1, False)}


def test_norms_that_did_not_run_have_no_statistics():
    """Those that take LayerNorm's place do not, in the unpruned network."""
    model, batches = create("test_convnext"), [images(32)]
    names = make_prunable(model)
    before = blocks.bn_statistics(model, batches)
    assert not any("norm_bn" in path for path in before)
    set_subnet(model, names)
    again = copy.deepcopy(model)
    recalibrate(model, batches, unpruned=before)
    recalibrate(again, batches)
    assert torch.equal(model(images(40)), again(images(40)))


def test_statistics_move_by_what_pruning_changes():
    """Not at all where it changes nothing, nor those of fitted layers."""
    model, batches = create("test_resnet"), [images(32), images(33)]
    names = make_prunable(model, "fitted")
    randomise(model, images(32))
    before = blocks.bn_statistics(model, batches)
    recalibrate(model, batches, unpruned=before)
    for path, (own, _) in before.items():
        bn = model.get_submodule(path)
        assert torch.equal(bn.running_mean, own[0]) and torch.equal(bn.running_var, own[1])
    set_subnet(model, names[:1])
    fitted = [copy.deepcopy(model.get_submodule(name).fitted) for name in names]
    recalibrate(model, batches, blocks.not_fitted(model), before)
    moved = {
        path: (bn.running_mean.clone(), bn.running_var.clone())
        for path in before
        for bn in [model.get_submodule(path)]
    }
    for name, layers in zip(names, fitted):
        after = model.get_submodule(name).fitted.state_dict()
        assert all(torch.equal(after[key], value) for key, value in layers.state_dict().items())
    recalibrate(model, batches, blocks.not_fitted(model))
    behind = names[-1] + ".bn1"
    (mean, var), (seen_mean, seen_var) = before[behind]
    bn = model.get_submodule(behind)
    assert not torch.allclose(moved[behind][0], mean)
    torch.testing.assert_close(moved[behind][0], mean + bn.running_mean - seen_mean)
    ratio = (bn.running_var + bn.eps) / (seen_var + bn.eps)
    torch.testing.assert_close(moved[behind][1], var * ratio)


def test_the_distance_of_answers_prefers_no_silence():
    """The squared difference does: half of the right answers are not better than none."""
    wanted, wrong = torch.randn(8, 50), torch.randn(8, 50)
    silent, good, bad = (
        blocks.uncorrelated(x, wanted) for x in (0 * wanted + 7, 3 * wanted + wrong, wrong)
    )
    assert silent == 1 and good < 0.1 and 0.5 < bad
    assert blocks.uncorrelated(2 * wanted + 1, wanted) < 1e-6


def test_dropout_and_drop_path_are_off_while_recalibrating():
    model = create("test_vit", drop_path_rate=0.5, proj_drop_rate=0.5)
    names = make_prunable(model)
    set_subnet(model, names)
    recalibrate(model.train(), [images(32)])
    first = model(images(32))
    recalibrate(model.train(), [images(32)])
    assert torch.equal(model(images(32)), first)


def test_a_block_in_transition_does_not_merge():
    model = create("test_resnet")
    set_subnet(model, make_prunable(model), 0.5)
    with pytest.raises(ValueError, match="transition"):
        merge(model)


def test_merge_leaves_the_model_alone():
    model = create("test_convnext").float().train()
    names = make_prunable(model)
    set_subnet(model, names)
    before = copy.deepcopy(model.state_dict())
    merged = merge(model)
    assert model.training and not merged.training
    assert next(merged.parameters()).dtype == torch.float32
    assert list(prunable_blocks(model)) == names
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["regnety_002", "regnetx_002"])
def test_a_model_without_prunable_block_is_refused(name):
    with pytest.raises(UserError, match="has no prunable block"):
        make_prunable(create_on_meta(name))


def test_a_torchvision_model_is_refused():
    with pytest.raises(
        UserError, match="ResNet has no prunable block; it is made of BasicBlock: use a timm"
    ):
        make_prunable(torchvision.models.resnet18())


@pytest.mark.parametrize("train", [False, True])
def test_the_new_layers_are_in_the_mode_of_the_model(train):
    model, batch = create("mobilenetv2_050").train(train), images(32)
    names = make_prunable(model)
    assert all(module.training == train for module in model.modules())
    set_subnet(model, names)  # neither fitted nor trained
    if not train:
        assert_same(model, merge(model), batch)


def test_unknown_blocks_are_named():
    model = create("test_resnet")
    make_prunable(model)
    known = "layer1.0, layer2.0, layer3.0, layer4.0"
    with pytest.raises(UserError, match=f"no prunable block layer5.0; this model has {known}"):
        set_subnet(model, ["layer1.0", "layer5.0"])


def test_blocks_that_cannot_merge_are_named_and_the_others_stay_prunable():
    model = create_on_meta("resnet18", aa_layer=timm.layers.BlurPool2d)
    names = make_prunable(model)
    assert len(names) == 5 and "layer2.0" not in names
    why = "no prunable block layer2.0; anti-aliasing inside: layer2.0; this model has layer1.0"
    with pytest.raises(UserError, match=why):
        set_subnet(model, ["layer2.0"])
    why = r"inside \(mixed, conditional, space-to-depth\): blocks.1.0, blocks.1.1"
    with pytest.raises(UserError, match=why):
        make_prunable(create_on_meta("mixnet_s"))
    model = nn.Sequential(inverted(exp_ratio=2))  # a dense conv would cost more
    make_prunable(model)
    assert model[0].rungs == ["separable", "1x1", "skip"] and model[0].rung in model[0].fitted
    why = "0 cannot be pruned to dense; its rungs are separable, 1x1, skip"
    with pytest.raises(UserError, match=why):
        set_subnet(model, {"0": "dense"})
    assert model[0].rung == "separable"  # an error changes nothing


@both_forms
@pytest.mark.parametrize("end_act", [True, False])
@torch.no_grad()
def test_the_family_that_new_family_md_adds(end_act, form, monkeypatch):
    with open(os.path.join(HERE, "new_family.md"), encoding="utf-8") as file:
        code = re.search(r"```python\n(.*?)```", file.read(), re.DOTALL)[1]
    module = vars(blocks) | {"mlp_mixer": mlp_mixer}
    exec(code, module)
    monkeypatch.setattr(blocks, "FAMILIES", (*blocks.FAMILIES, module["PrunableMixerBlock"]))
    torch.manual_seed(0)
    model = mlp_mixer.MlpMixer(10, img_size=64, num_blocks=4, embed_dim=32).double().eval()
    nn.init.normal_(model.head.weight)  # timm's are 0
    batch, baseline = images(64), cost(model, (3, 64, 64))
    expected = model(batch)
    names = make_prunable(model, form, end_act)
    assert names == [f"blocks.{i}" for i in range(4)] and torch.equal(model(batch), expected)
    assert not default_end_act(model, form, names)
    two = ["blocks.0", "blocks.2"]
    set_subnet(model, two)
    without = (model(batch) - expected).norm()
    fit(model, two, [batch])
    set_subnet(model, two)
    if form == "fitted" and not end_act:
        assert (model(batch) - expected).norm() < 0.9 * without
    randomise(model, images(64, 16))
    for prune in ({"blocks.0": "linear", "blocks.1": "skip"}, two):
        set_subnet(model, prune)
        merged = merge(model)
        assert_same(model, merged, batch)
        assert cost(merged, (3, 64, 64))["macs"] < baseline["macs"]


def test_only_real_convs_take_a_bn_in():
    """CondConv2d has out_channels, too, but several kernels to choose from for each image."""
    conv = timm.layers.CondConv2d(4, 6, 3, num_experts=2)
    merged = merge(nn.Sequential(conv, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    assert [type(layer) for layer in merged[1::2]] == [nn.BatchNorm2d, nn.Identity]
