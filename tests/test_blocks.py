"""Blocks and merge: lam = 0 is timm's network bit for bit, lam = 1 is the merged network to float64
rounding."""

import copy
import os
import random
import re

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, downsample_avg, downsample_conv
from timm.models.vision_transformer import Attention, Block

import blocks
from blocks import (
    BatchNorm,
    UserError,
    cost,
    fit,
    make_prunable,
    merge,
    prunable_blocks,
    recalibrate,
    set_subnet,
)

both_forms = pytest.mark.parametrize("form", ["reparam", "fitted"])
VIT32 = {"patch_size": 4, "img_size": 32}
NETWORKS = [
    ("resnet34", {}),
    ("mobilenetv2_100", {}),
    ("convnext_tiny", {}),
    ("deit_tiny_patch16_224", VIT32),
]
SMALL = [
    ("test_resnet", {}),
    ("mobilenetv2_035", {}),
    ("test_convnext", {}),
    ("test_vit", {"img_size": 32}),
    ("resnet18d", {}),
    ("mobilenetv3_small_050", {}),
    ("efficientnet_lite0", {}),
    ("tf_efficientnet_lite0", {}),
    ("convnext_atto", {"conv_mlp": True}),
    ("test_vit2", {"img_size": 32}),
    ("seresnet18", {}),
    ("efficientnet_b0", {}),
    ("convnextv2_atto", {}),
    ("naflexvit_base_patch16_gap", {"embed_dim": 48, "num_heads": 3, "depth": 3}),
]


def create(name, model_args):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **model_args).double().eval()


def images(size, count=4):
    return torch.randn(
        count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)
    )


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
            module.running_mean += (
                strength / 5 * module.running_var.sqrt() * torch.randn_like(module.running_mean)
            )
            module.running_var *= torch.empty_like(module.running_var).uniform_(
                1 - strength / 3, 1 + strength / 3
            )


@torch.no_grad()
def assert_same(ours, merged, batch):
    a, b = ours(batch), merged(batch)
    assert a.dtype == b.dtype == torch.float64
    assert (a - a[:1]).abs().mean() > 1e-3, "outputs that do not depend on the image test nothing"
    assert (a - b).abs().max() <= 1e-10


def check_network(name, model_args, chosen, sizes, strength=1.0, form="reparam"):
    model = create(name, model_args)
    names = make_prunable(model, form, end_act=True if form == "reparam" else None)
    set_subnet(model, chosen(names))
    for size in (
        (32,) if {"img_size", "num_heads"} & model_args.keys() else sizes
    ):  # patches have to fit
        randomise(model, images(size, 16), strength)
        merged = merge(model)
        assert_same(model, merged, images(size))
    assert not any(
        isinstance(module, (blocks.Prunable, nn.BatchNorm2d)) for module in merged.modules()
    )
    return model


@pytest.mark.parametrize(
    "form, share",
    [
        ("reparam", "all"),
        ("reparam", "half"),
        ("reparam", "none"),  # of no form
        ("fitted", "all"),
        ("fitted", "half"),
    ],
)
@pytest.mark.parametrize("name, model_args", NETWORKS, ids=[name for name, _ in NETWORKS])
def test_merged_network_is_the_trained_one(name, model_args, share, form):
    chosen = {
        "all": lambda names: names,
        "half": lambda names: names[::2],
        "none": lambda names: [],
    }[share]
    sizes = (32, 33, 47) if share == "all" else (33,)
    model = check_network(name, model_args, chosen, sizes, form=form)
    # In float32 less random: a deep net with BN parameters that wild amplifies its own rounding
    # errors beyond the bound.
    batch = images(model_args.get("img_size", 47), 16)
    randomise(model, batch, strength=0.2)
    merged, batch = merge(model).float(), batch.float()
    with torch.no_grad():
        a, b = model.float()(batch), merged(batch)
    assert (a - b).abs().max() <= 1e-4 * a.std()


@both_forms
@pytest.mark.parametrize("name, model_args", SMALL, ids=[name for name, _ in SMALL])
def test_other_networks_of_the_families(name, model_args, form):
    strength = (
        0.5 if name == "efficientnet_b0" else 1.0
    )  # at 1 its logits, and their rounding errors, are in the thousands
    check_network(name, model_args, lambda names: names, (32, 33), strength, form)


@pytest.mark.parametrize("name, model_args", SMALL[:4], ids=[name for name, _ in SMALL[:4]])
@torch.no_grad()
def test_merged_network_is_a_plain_module(name, model_args):
    """No trace of what it was made from; strict loading, memory formats, half precision and
    torch.compile just work."""
    model, batch = create(name, model_args), images(32, 8)
    set_subnet(model, make_prunable(model)[::2])
    randomise(model, batch, strength=0.2)
    merged, other = merge(model).float(), create(name, model_args).float()
    assert not any(
        "pruned" in key or "end_act" in key or "num_batches" in key for key in merged.state_dict()
    )
    kinds = {type(module) for module in merged.modules() if not list(module.children())}
    assert all(kind.__module__.startswith(("torch.nn.", "timm.layers.")) for kind in kinds), kinds
    set_subnet(other, make_prunable(other)[::2])
    other = merge(other)
    other.load_state_dict(merged.state_dict())
    assert torch.equal(other(batch.float()), merged(batch.float()))
    merged.double()  # in float32 rounding errors of random weights are larger than some bounds
    expected = merged(batch)
    for ours in (
        copy.deepcopy(merged).to(memory_format=torch.channels_last),
        torch.compile(merged, backend="aot_eager"),
    ):
        assert (ours(batch) - expected).abs().max() <= 1e-10
    batch, expected = batch.float(), merged.float()(batch.float())
    for dtype in (
        torch.bfloat16,
        torch.half,
    ):  # random weights amplify rounding errors: those of the unmerged net are the measure
        errors = [
            (network.to(dtype)(batch.to(dtype)).float() - expected).norm()
            for network in (merged, model)
        ]
        assert errors[0] <= 1.5 * errors[1] + 0.01 * expected.norm()


def test_every_timm_model_of_the_families(request, capsys):
    """With up to 30 M parameters: every other prunable block pruned, to its first rung and to a
    random one, merged, the whole network compared. What is left out either has no such block or is
    named. Without --run-slow every fortieth name and two more."""
    errors, refused = {}, []
    names = timm.list_models()
    if not request.config.getoption("--run-slow"):
        names = sorted({*names[::40], "resnet18", "deit_tiny_patch16_224"})
    for name in names:
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except NotImplementedError:  # not all of torch 2.6 works there
            model = timm.create_model(name)
        if sum(p.numel() for p in model.parameters()) > 30e6:
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
        errors.setdefault(type(prunable_blocks(model)[names[0]]).timm_class.__name__, {})[name] = (
            error.item()
        )
    with capsys.disabled():
        for family, of_family in errors.items():
            print(
                f"\n{family}: {len(of_family)} timm models,"
                f" worst error {max(of_family.values()):.1e}",
                end="",
            )
        print(*(f"\nrefused: {text.split(': use')[0]}" for text in refused), sep="")
    assert len(errors) >= 3 and not {
        name: e for part in errors.values() for name, e in part.items() if not e <= 1e-10
    }


@pytest.mark.parametrize("choice", "ABDF")
def test_choices_of_blocks_by_depthshrinker(choice):
    """Fu et al., "DepthShrinker", ICML 2022: which inverted residuals of MobileNetV2-1.4 stay as
    they are."""
    spec = blocks.read_subnet(
        os.path.join(
            os.path.dirname(__file__), "benchmarks", "specs", f"depthshrinker-{choice}.json"
        )
    )
    check_network(spec["model"], {}, lambda names: spec["prune"], (33,))


def downsample(kind, stride):
    make = {"conv": downsample_conv, "avg": downsample_avg}[kind]
    return make(8, 12, kernel_size=1, stride=stride)


BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "basic, dilated": lambda: BasicBlock(8, 8, dilation=2),
    "basic, stride 2": lambda: BasicBlock(8, 12, stride=2, downsample=downsample("conv", 2)),
    "basic, wider": lambda: BasicBlock(8, 12, downsample=downsample("conv", 1)),
    "basic, resnet-d": lambda: BasicBlock(8, 12, stride=2, downsample=downsample("avg", 2)),
    "inverted": lambda: InvertedResidual(8, 8, exp_ratio=6, act_layer=nn.ReLU6),
    "inverted, stride 2": lambda: InvertedResidual(
        8, 12, stride=2, exp_ratio=6, act_layer=nn.ReLU6
    ),
    "inverted, no skip": lambda: InvertedResidual(8, 8, exp_ratio=6, noskip=True),
    "inverted, 5x5 stride 2": lambda: InvertedResidual(
        8, 8, dw_kernel_size=5, stride=2, exp_ratio=6
    ),
    "inverted, 5x5 to 3x3": lambda: InvertedResidual(8, 8, dw_kernel_size=5, exp_ratio=6),
    "inverted, 5x5 to 3x3, TF padding": lambda: InvertedResidual(
        8, 12, dw_kernel_size=5, stride=2, exp_ratio=3, pad_type="same"
    ),
    "inverted, dilated 5x5 to 3x3": lambda: InvertedResidual(
        8, 8, dw_kernel_size=5, dilation=2, exp_ratio=6
    ),
    "inverted, TF padding": lambda: InvertedResidual(8, 12, stride=2, exp_ratio=6, pad_type="same"),
    "convnext": lambda: ConvNeXtBlock(8, ls_init_value=1.0),
    "convnext, conv mlp": lambda: ConvNeXtBlock(8, conv_mlp=True, ls_init_value=None),
    "convnext, stride 2": lambda: ConvNeXtBlock(8, stride=2, ls_init_value=0.5),
    "convnext, no bias": lambda: ConvNeXtBlock(8, conv_bias=False),
}


@both_forms
@pytest.mark.parametrize("end_act", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_merged_block_is_the_trained_one(kind, end_act, form):
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[kind]()).double().eval()
    make_prunable(model, form, end_act)
    macs = [cost(model, (8, 32, 32))["macs"]]
    for rung in model[0].rungs:
        set_subnet(model, {"0": rung})
        for height, width in ((32, 32), (33, 33), (47, 32), (5, 7)):
            batch = torch.randn(4, 8, height, width, dtype=torch.float64)
            randomise(model, batch)
            merged = merge(model)
            assert_same(model, merged, batch)
            assert_same(model, nn.Sequential(copy.deepcopy(model)[0].fuse()), batch)
        convs = [module for module in merged.modules() if isinstance(module, nn.Conv2d)]
        branch = "resnet-d" in kind  # a conv in the skip
        expected = {"separable": 2, "skip": 0}.get(rung, 1)
        assert len(convs) == expected + branch
        assert all(conv.weight.is_contiguous() for conv in convs)
        macs.append(cost(merged, (8, 32, 32))["macs"] if list(merged.parameters()) else 0)
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == len(macs)
    if "TF" not in kind:  # for all of the block
        assert (macs[-1] == 0) == ("skip" in model[0].rungs)


@pytest.mark.parametrize("name, model_args", SMALL, ids=[name for name, _ in SMALL])
def test_networks_of_random_rungs(name, model_args):
    model = create(name, model_args)
    make_prunable(model, attention="vit" in name and "naflex" not in name)
    for seed in range(2):
        rng = random.Random(seed)
        prune = {
            path: rng.choice(block.rungs)
            for path, block in prunable_blocks(model).items()
            if rng.random() < 0.8
        }
        set_subnet(model, prune)
        batch = images(32, 16) + 3 * images(1, 16)
        randomise(model, batch, 0.5)
        assert_same(model, merge(model), batch)


@pytest.mark.parametrize(
    "name, inserted", [("mobilenetv2_035", False), ("test_convnext", True), ("test_vit", False)]
)
def test_where_end_activations_are_inserted_by_default(name, inserted):
    model = create(name, {})
    make_prunable(model)
    for block in prunable_blocks(model).values():
        assert (block.end_act is not None) == inserted


@pytest.mark.parametrize("kind", ["basic", "inverted", "inverted, stride 2", "convnext"])
@torch.no_grad()
def test_lower_rungs_are_fitted_as_well_as_can_be(kind):
    """Planted in the place of the block, as a conv of that shape, they are found again; and a
    search in all directions around what was fitted to the block itself finds nothing better."""
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[kind]()).double().eval()
    make_prunable(model, "fitted", end_act=False)
    block = model[0]
    block.act2 = nn.Identity()
    batch = torch.randn(32, 8, 9, 9, dtype=torch.float64)
    randomise(model, batch)
    for rung in block.rungs[:-1] if "skip" in block.rungs else block.rungs:
        set_subnet(model, {"0": rung})
        planted = model(batch) - block.skip_part(batch)
        fit(model, {"0": rung}, [batch], ridge=1e-12)
        set_subnet(model, [])
        wanted = model(batch)

        def error(rung=rung, wanted=wanted):
            set_subnet(model, {"0": rung})
            return (model(batch) - wanted).square().mean().item()

        least, layers = error(), block.fitted[rung]
        for parameter in [layers[-1].weight, layers[-1].bias]:
            before = parameter.clone()
            for step in (0.99, 1.01):
                parameter.copy_(before * step)
                assert error() >= least * (1 - 1e-9)
            parameter.copy_(before)
        block.linear_part = lambda x, planted=planted: planted + block.skip_part(x)
        with torch.no_grad():
            fit(model, {"0": rung}, [batch], ridge=1e-12)
        del block.linear_part
        set_subnet(model, {"0": rung})
        found = model(batch) - block.skip_part(batch)
        if kind != "convnext":  # whose kernels stay the block's
            assert (found - planted).norm() < 1e-4 * planted.norm()


@both_forms
@pytest.mark.parametrize("end_act", [True, False])
@pytest.mark.parametrize("init_values", [None, 0.3])
def test_merged_vit_block_is_the_trained_one(end_act, init_values, form):
    torch.manual_seed(0)
    model = (
        nn.Sequential(Block(16, 2, qkv_bias=True, qk_norm=True, init_values=init_values))
        .double()
        .eval()
    )
    make_prunable(model, form, end_act)
    tokens = torch.randn(4, 17, 16, dtype=torch.float64)
    for rung in ("linear", "skip"):
        set_subnet(model, {"0": rung})
        randomise(model, tokens)
        assert_same(model, merge(model), tokens)


@torch.no_grad()
def test_attention_is_a_choice_of_its_own():
    """With attention=True: a block's MLP, its attention or both. Exact, additive in cost, fitted by
    least squares."""
    theirs, batch = (
        create("deit_tiny_patch16_224", {**VIT32, "depth": 4}),
        images(32, 16) + 3 * images(1, 16),
    )
    model = copy.deepcopy(theirs)
    names = make_prunable(model, attention=True)
    assert names == [
        "blocks.0.attn",
        "blocks.0",
        "blocks.1.attn",
        "blocks.1",
        "blocks.2.attn",
        "blocks.2",
        "blocks.3",
    ]
    assert torch.equal(model(batch), theirs(batch))
    costs = {}
    for chosen in [[], *([name] for name in names), names[:2], names[1:4], names]:
        set_subnet(model, chosen)
        randomise(model, batch)
        merged = merge(model)
        assert_same(model, merged, batch)
        costs[tuple(chosen)] = cost(merged, (3, 32, 32))
        assert sum(isinstance(module, Attention) for module in merged.modules()) == 4 - sum(
            "attn" in name for name in chosen
        )
    for key in ("params", "macs"):
        savings = [costs[()][key] - costs[name,][key] for name in names]
        assert min(savings) > 0 and costs[()][key] - sum(savings) == costs[tuple(names)][key]
    set_subnet(model, ["blocks.1.attn"], 0.5)
    with pytest.raises(ValueError, match="transition"):
        merge(model)

    set_subnet(model, [])
    expected, seen = model(batch), []
    model.blocks[1].attn.register_forward_hook(
        lambda attn, args, output: seen.append((*args, output))
    )
    model(batch)
    inputs, outputs = (rows.flatten(0, 1) for rows in seen[0])
    inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
    fit(model, names, batch.split(8), in_turn=False, ridge=1e-10)
    assert torch.equal(model(batch), expected)
    set_subnet(model, ["blocks.1.attn"])
    model(batch)
    best = inputs @ torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution
    torch.testing.assert_close(
        seen[-1][1].flatten(0, 1), best, rtol=0, atol=1e-6 * best.std().item()
    )
    with pytest.raises(UserError, match="ResNet has no attention that could be pruned"):
        make_prunable(create("test_resnet", {}), attention=True)


@pytest.mark.parametrize("kind", ["inverted", "convnext"])
def test_end_activation_is_there_when_asked_for(kind):
    batch = torch.randn(4, 8, 9, 9, dtype=torch.float64)
    outputs = []
    for end_act in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(BLOCKS[kind]()).double().eval()
        make_prunable(model, end_act=end_act)
        set_subnet(model, ["0"])
        recalibrate(model, [batch])
        outputs.append(model(batch))
    expected = outputs[0].clamp(0, 6) if kind == "inverted" else nn.functional.gelu(outputs[0])
    torch.testing.assert_close(outputs[1], expected)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("kind", [*BLOCKS, "vit"])
@torch.no_grad()
def test_fit_is_least_squares(kind):
    """Against all inputs at once: the same error, in however many batches, and the baseline block
    stays what it was."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(8, 2) if kind == "vit" else BLOCKS[kind]()).double().eval()
    make_prunable(model, "fitted", end_act=False)
    block = model[0]
    block.act2 = nn.Identity()  # what is fitted is before ResNet's end activation
    batch = torch.randn(24, *((17, 8) if kind == "vit" else (8, 9, 9)), dtype=torch.float64)
    randomise(model, batch)
    expected = model(batch)
    inputs, outputs = (
        block.linear_inputs(block.skip_part(batch) if block.serial else batch),
        blocks.pixel_rows(block.linear_part(batch) - block.skip_part(batch)),
    )
    inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
    best = (inputs @ torch.linalg.lstsq(inputs, outputs).solution - outputs).square().mean()
    for batches in ([batch], batch.split(5)):
        fit(model, ["0"], batches, ridge=1e-12)
        assert torch.equal(model(batch), expected)
        set_subnet(model, ["0"])
        assert (model(batch) - expected).square().mean() == pytest.approx(best.item(), rel=1e-6)
        assert_same(model, merge(model), batch)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("name, model_args", SMALL[:4], ids=[name for name, _ in SMALL[:4]])
@torch.no_grad()
def test_fit_in_turn_is_least_squares_on_what_each_block_will_get(name, model_args, attention):
    """One walk through the network, against solving each block in the pruned network."""
    attention = attention and name == "test_vit"
    model, batch = create(name, model_args), images(32, 24)
    names = make_prunable(model, "fitted", end_act=False, attention=attention)[::2]
    seen, found = {}, prunable_blocks(model)
    for key in names:
        found[key].act2 = nn.Identity()  # what is fitted is before ResNet's end activation
        found[key].register_forward_hook(
            lambda block, args, output, key=key: seen.update({key: (args[0], output)})
        )
    unpruned = model(batch)
    wanted = {key: output for key, (_, output) in seen.items()}
    fit(model, names, batch.split(10), ridge=1e-12)
    assert torch.equal(model(batch), unpruned)
    set_subnet(model, names)
    model(batch)
    for key, (x, output) in seen.items():
        skip = found[key].skip_part(x)
        rows = found[key].linear_inputs(skip if found[key].serial else x)
        rows = nn.functional.pad(rows, (0, 1), value=1.0)
        target = blocks.pixel_rows(wanted[key] - skip)
        best = rows @ torch.linalg.lstsq(rows, target, driver="gelsd").solution
        error = (blocks.pixel_rows(output - skip) - target).square().mean()
        assert error <= 1.0001 * (best - target).square().mean() + 1e-9 * target.square().mean()


def test_an_error_inside_the_fit_is_the_caller_s():
    model = create("test_resnet", {})
    names = make_prunable(model, "fitted")
    with pytest.raises(RuntimeError, match="channels"):
        fit(model, names, [images(32), torch.zeros(2, 5, 32, 32, dtype=torch.float64)])
    assert model(images(32)).shape == (4, 10)


@pytest.mark.parametrize("name, model_args", SMALL, ids=[name for name, _ in SMALL])
@torch.no_grad()
def test_fit_survives_inputs_that_tell_nothing(name, model_args):
    """Grey images, fewer than unknowns: systems as singular as they get. Pruned blocks are no worse
    than none."""
    model = create(name, model_args).float()
    names = make_prunable(model, "fitted", end_act=False)
    for batch in (torch.zeros(2, 3, 32, 32), images(32, 2).float()):
        set_subnet(model, [])
        expected = model(batch)
        fit(model, names, [batch])
        set_subnet(model, names)
        fitted = model(batch)
        assert torch.isfinite(fitted).all()
        for block in prunable_blocks(model).values():
            nn.init.zeros_(block.pruned[-1].weight)
            nn.init.zeros_(block.pruned[-1].bias)
        assert (fitted - expected).norm() <= 1.01 * (model(batch) - expected).norm() + 1e-4


@both_forms
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name, model_args", NETWORKS, ids=[name for name, _ in NETWORKS])
def test_nothing_pruned_is_timm_bit_for_bit(name, model_args, train, form):
    theirs = create(name, model_args).float().train(train)
    ours = copy.deepcopy(theirs)
    names = make_prunable(ours, form)
    timm_keys, our_keys = list(theirs.state_dict()), list(ours.state_dict())
    assert [key for key in our_keys if key in timm_keys] == timm_keys
    new = re.compile(r"\.fitted\." if form == "fitted" else r"\.fitted\.|\.norm_bn\.")
    assert all(new.search(key) for key in set(our_keys) - set(timm_keys))
    assert names == list(prunable_blocks(ours)) and len(names) in (12, 16, 18)
    batch = images(32).float()
    for prune, lam in (([], 1.0), (names, 0.0)):
        set_subnet(ours, prune, lam)
        torch.manual_seed(1)
        expected = copy.deepcopy(theirs)(batch)
        torch.manual_seed(1)
        assert torch.equal(copy.deepcopy(ours)(batch), expected)


@both_forms
@pytest.mark.parametrize("end_act", [None, True])
@pytest.mark.parametrize("name, model_args", NETWORKS, ids=[name for name, _ in NETWORKS])
def test_lam_is_continuous(name, model_args, form, end_act):
    """lam close to 0 is close to timm's block, lam close to 1 to the pruned one: nothing jumps."""
    model = create(name, model_args)
    names = make_prunable(model, form, end_act)
    set_subnet(model, names)
    randomise(model, images(32, 16))
    outputs = {}
    for lam in (0, 1e-7, 0.5, 1 - 1e-7, 1):
        set_subnet(model, names, lam)
        with torch.no_grad():
            outputs[lam] = model(images(32))
    scale = outputs[0].std() + outputs[1].std()
    assert (outputs[0] - outputs[1e-7]).abs().max() < 1e-3 * scale
    assert (outputs[1] - outputs[1 - 1e-7]).abs().max() < 1e-3 * scale
    assert (outputs[1] - outputs[0]).abs().max() > 1e-2 * scale


# The weights that the paper's form shares with the baseline block, and those that it must not use
OWN_WEIGHTS = {
    "basic": ["conv1", "bn1", "conv2", "bn2"],
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
    torch.manual_seed(0)
    model = nn.Sequential(Block(8, 2) if kind == "vit" else BLOCKS[kind]()).double().eval()
    make_prunable(model)
    set_subnet(model, ["0"])
    batch = torch.randn(8, *((17, 8) if kind == "vit" else (8, 9, 9)), dtype=torch.float64)
    randomise(model, batch)
    before = model(batch)
    for name in OWN_WEIGHTS[kind]:
        weight = model[0].get_submodule(name).weight
        weight += 0.1 * torch.randn_like(weight)
        after = model(batch)
        assert (after - before).abs().max() > 1e-3, name
        assert_same(model, merge(model), batch)
        before = after
    if kind == "basic":
        outer = model[0].conv2.weight
        centre = outer[:, :, 1, 1].clone()
        outer.normal_()
        outer[:, :, 1, 1] = centre
    for name in ("norm", "norm2"):
        if isinstance(getattr(model[0], name, None), nn.LayerNorm):
            getattr(model[0], name).weight.normal_()
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize("kind", ["basic", "inverted", "convnext", "vit"])
def test_the_form_of_both_is_trained(kind):
    """Gradients reach the block's own weights in the paper's form, the new layers in the fitted."""
    for form in ("reparam", "fitted"):
        model = nn.Sequential(Block(8, 2) if kind == "vit" else BLOCKS[kind]()).double()
        make_prunable(model, form)
        set_subnet(model, ["0"])
        model(torch.randn(8, *((17, 8) if kind == "vit" else (8, 9, 9))).double()).sum().backward()
        own = [
            parameter.grad
            for name, parameter in model.named_parameters()
            if name.startswith(("0.conv", "0.mlp")) and parameter.grad is not None
        ]
        assert bool(own) == (form == "reparam")
        assert not model[0].pruned or model[0].pruned[0].weight.grad is not None


@pytest.mark.parametrize(
    "name, why", [("seresnet18", "squeeze-excite"), ("convnextv2_atto", "GlobalResponseNormMlp")]
)
def test_blocks_whose_own_layers_cannot_merge_are_fitted(name, why):
    model = create(name, {})
    make_prunable(model, "reparam")
    for block in prunable_blocks(model).values():
        assert block.pruned and why in block.own_obstacle(block)


@pytest.mark.parametrize(
    "name, gmacs",
    [
        ("resnet34", 3.664),
        ("mobilenetv2_100", 0.301),
        ("convnext_tiny", 4.456),
        ("deit_tiny_patch16_224", 1.254),
    ],
)
def test_cost_is_that_of_the_merged_network(name, gmacs):
    """The same in both forms: one subnet.json serves both."""
    model = timm.create_model(name).to("meta")
    baseline = cost(model, (3, 224, 224))
    assert baseline["macs"] / 1e9 == pytest.approx(gmacs, abs=5e-4)
    names = make_prunable(model)

    def merged_cost(pruned):
        set_subnet(model, pruned)
        return cost(merge(model), (3, 224, 224))

    whole, everything = merged_cost([]), merged_cost(names)
    assert whole["macs"] == baseline["macs"] and whole["params"] <= baseline["params"]
    for key in ("params", "macs"):  # every block pays, and savings add up: the search relies on it
        savings = [whole[key] - merged_cost([name])[key] for name in names]
        assert min(savings) > 0 and whole[key] - sum(savings) == everything[key]
    other = timm.create_model(name).to("meta")
    make_prunable(other, "fitted")
    set_subnet(model, names)
    set_subnet(other, names)
    merged = merge(model)
    shapes = {key: value.shape for key, value in merged.state_dict().items()}
    assert shapes == {key: value.shape for key, value in merge(other).state_dict().items()}


def test_cost_where_a_parameter_is_an_input():
    vit = timm.create_model(
        "vit_base_patch16_siglip_224", **VIT32, embed_dim=48, num_heads=3, depth=1
    )  # pools by attention
    assert cost(vit, (3, 32, 32))["macs"] > 0 and all(
        parameter.requires_grad for parameter in vit.parameters()
    )


def test_recalibration_forgets_what_was_before():
    model = create("test_convnext", {})
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
    model = create("resnet18", {})
    names = make_prunable(model, "fitted")
    set_subnet(model, names)
    recalibrate(model, [images(32)])
    first, mean = model(images(32)), model.layer1[0].pruned[1].running_mean.clone()
    recalibrate(model, [images(32), images(32, 1)])
    assert torch.equal(model(images(32)), first)
    set_subnet(model, [])
    recalibrate(model, [images(32) + 1])
    assert torch.equal(model.layer1[0].pruned[1].running_mean, mean)


def test_dropout_and_drop_path_are_off_while_recalibrating():
    model = timm.create_model(
        "test_vit", img_size=32, drop_path_rate=0.5, proj_drop_rate=0.5
    ).double()
    names = make_prunable(model)
    set_subnet(model, names)
    recalibrate(model, [images(32)])
    first = model(images(32))
    recalibrate(model, [images(32)])
    assert torch.equal(model(images(32)), first)


def test_a_block_in_transition_does_not_merge():
    model = create("test_resnet", {})
    set_subnet(model, make_prunable(model), 0.5)
    with pytest.raises(ValueError, match="transition"):
        merge(model)


def test_merge_leaves_the_model_alone():
    model = create("test_convnext", {}).float().train()
    names = make_prunable(model)
    set_subnet(model, names)
    before = copy.deepcopy(model.state_dict())
    merged = merge(model)
    assert (
        model.training and not merged.training and next(merged.parameters()).dtype == torch.float32
    )
    assert list(prunable_blocks(model)) == names
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet50", "regnetx_002"])
def test_a_model_without_prunable_block_is_refused(name):
    model = timm.create_model(name).to("meta")
    with pytest.raises(UserError, match="has no prunable block"):
        make_prunable(model)


def test_a_torchvision_model_is_refused():
    with pytest.raises(UserError, match="ResNet has no prunable block: use a timm model"):
        make_prunable(torchvision.models.resnet18())


@pytest.mark.parametrize("train", [False, True])
def test_the_new_layers_are_in_the_mode_of_the_model(train):
    model, batch = create("mobilenetv2_050", {}).train(train), images(32)
    names = make_prunable(model)
    assert all(module.training == train for module in model.modules())
    set_subnet(model, names)  # neither fitted nor trained
    if not train:
        assert_same(model, merge(model), batch)


def test_unknown_blocks_are_named():
    model = create("test_resnet", {})
    make_prunable(model)
    with pytest.raises(
        UserError, match="no prunable block layer3.0; this model has layer1.0, layer2.0, layer4.0"
    ):
        set_subnet(model, ["layer1.0", "layer3.0"])


def test_blocks_that_cannot_merge_are_named_and_the_others_stay_prunable():
    model = timm.create_model("resnet18", aa_layer=timm.layers.BlurPool2d)
    names = make_prunable(model)
    assert len(names) == 5 and "layer2.0" not in names
    with pytest.raises(
        UserError,
        match="no prunable block layer2.0; anti-aliasing inside: layer2.0; this model has layer1.0",
    ):
        set_subnet(model, ["layer2.0"])
    with pytest.raises(
        UserError, match=r"inside \(mixed, conditional, space-to-depth\): blocks.1.0, blocks.1.1"
    ):
        make_prunable(timm.create_model("mixnet_s"))
    model = nn.Sequential(InvertedResidual(8, 8, exp_ratio=2))  # a dense conv would cost more
    make_prunable(model)
    assert model[0].rungs == ["separable", "1x1", "skip"] and model[0].pruned
    with pytest.raises(
        UserError, match="0 cannot be pruned to dense; its rungs are separable, 1x1, skip"
    ):
        set_subnet(model, {"0": "dense"})
    assert model[0].rung == "separable"  # an error changes nothing


@both_forms
@pytest.mark.parametrize("end_act", [True, False])
def test_the_family_that_the_readme_adds(end_act, form, monkeypatch):
    with open(os.path.join(os.path.dirname(__file__), "new_family.md"), encoding="utf-8") as file:
        code = re.search(r"```python\n(class PrunableMixerBlock.*?)```", file.read(), re.DOTALL)[1]
    names = vars(blocks) | {"mlp_mixer": timm.models.mlp_mixer}
    exec(code, names)
    monkeypatch.setattr(blocks, "FAMILIES", (*blocks.FAMILIES, names["PrunableMixerBlock"]))
    model = timm.create_model("mixer_s32_224", img_size=64).double().eval()
    nn.init.normal_(model.head.weight)  # timm's are 0
    with torch.no_grad():
        expected = model(images(64))
        assert make_prunable(model, form, end_act) == [
            f"blocks.{i}" for i in range(8)
        ] and torch.equal(model(images(64)), expected)
        set_subnet(model, ["blocks.0", "blocks.2"])
        without = (model(images(64)) - expected).norm()
        fit(model, ["blocks.0", "blocks.2"], [images(64)])
        set_subnet(model, ["blocks.0", "blocks.2"])
        if form == "fitted" and not end_act:
            assert (model(images(64)) - expected).norm() < 0.9 * without
        randomise(model, images(64, 16))
    set_subnet(model, {"blocks.0": "linear", "blocks.1": "skip"})
    assert_same(model, merge(model), images(64))
    set_subnet(model, ["blocks.0", "blocks.2"])
    merged = merge(model)
    assert_same(model, merged, images(64))
    assert (
        cost(merged, (3, 64, 64))["macs"]
        < cost(timm.create_model("mixer_s32_224", img_size=64), (3, 64, 64))["macs"]
    )


def test_a_fit_takes_no_more_images_than_fit_in_memory(capsys):
    model = create("test_resnet", {})
    names = make_prunable(model, "fitted")
    taken = []
    batches = (taken.append(i) or images(32) for i in range(9))
    fit(model, names, batches, room=3 * 2 * 4 * 64 * 8 * 8 * 8 * 3)
    assert len(taken) < 9 and f"takes {len(taken)} batches only" in capsys.readouterr().out


def test_only_real_convs_take_a_bn_in():
    """CondConv2d has out_channels, too, but several kernels to choose from for each image."""
    conv = timm.layers.CondConv2d(4, 6, 3, num_experts=2)
    merged = merge(nn.Sequential(conv, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    assert [type(layer) for layer in merged[1::2]] == [nn.BatchNorm2d, nn.Identity]
