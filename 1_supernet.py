"""Stage 1 of 4: trains a supernet, in which every prunable block works in both of its forms.

Reads images and maybe weights. Writes runs/supernet.pt, and runs/supernet.csv: a row per epoch.

    python 1_supernet.py                       # small drawn pictures, no download, two minutes
    python 1_supernet.py --data-dir imagenet --model resnet34.tv_in1k --pretrained --epochs 0
    python 1_supernet.py --model deit_tiny_patch16_224 --model-kwargs patch_size=4 img_size=32

The baseline is trained first, unless its weights are given. The supernet's epochs follow, by the
sandwich rule: each step runs the largest subnet (nothing pruned) on the labels, and the smallest
(everything pruned) and two random ones on the largest's output as soft labels; their gradients add
up. In the paper's form, whose weights all subnets share, soft labels are the baseline's, also for
the largest. Before, all that is fitted is solved: lower rungs, not trained here, or all blocks.
"""
import collections
import copy
import logging
import os
import random
import shutil
import sys
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from blocks import (Parser, UserError, answers, at_least, check_finite, cost, create_model,
                    evaluate, fingerprint, finish, first_line, fit, label_loss, make_loader,
                    make_prunable, merge, open_dataset, outputs_of, print_table, progress_bar,
                    prunable_blocks, rank_and_world, recalibrate, run, run_flags, samples_of, save,
                    set_subnet, spare_weights, start, train, training_flags)

parser = Parser(description="Stage 1 of 4: trains a supernet.")
flag = parser.add_argument
# model
flag("--model", default="resnet18", help="a timm model: mobilenetv2_100, convnext_tiny.fb_in1k")
flag("--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs, metavar="k=v",
     type=lambda text: text if "=" in text else parser.error(f"--model-kwargs {text}: k=v needed"),
     help="arguments for timm.create_model, e.g. patch_size=4 img_size=32")
flag("--pretrained", action="store_true", help="start from timm's weights (downloads them)")
flag("--checkpoint", metavar="FILE", help="start from a .pth or .safetensors whose keys timm knows")
flag("--form", default="reparam", choices=("reparam", "fitted"), help="of pruned blocks: reparam,"
     " the paper's, merges their own layers, fitted (if --epochs is 0: always) has new ones, solved"
     " in closed form")
flag("--attention", action="store_true", help="let attention be pruned, too, as blocks of its own")
# images
flag("--data-dir", metavar="DIR",
     help="folder with train/CLASS/* and val/CLASS/* (None: pictures drawn into data/shapes)")
flag("--dataset", default="", help="a timm data set instead of a folder: hfds/..., torch/cifar10"
     " (torch/... downloads itself into --data-dir)")
flag("--class-map", metavar="FILE", help="class folders in the order of the weights' classes, a"
     " name per line; the data may have some only; timm's imagenet_synsets.txt is found by name")
flag("--img-size", type=at_least(1), help="height and width (None: the model's; 32 for shapes)")
for name, least in (("--mean", 0), ("--std", 1e-3)):
    flag(name, type=at_least(least, float, 1), nargs=3, metavar="X",
         help="of RGB from 0 to 1 (None: the model's)")
flag("--interpolation", choices=("nearest", "bilinear", "bicubic", "lanczos"),
     help="to resize images (None: the model's)")
flag("--crop-pct", type=at_least(0.01, float, 1), metavar="R", help="share of the height and width"
     " that val images keep (None: the model's; 1 for new weights below 128 px)")
# training
flag("--baseline-epochs", type=at_least(0), help="of the baseline (None: 10, or 0 if weights fit)")
flag("--epochs", type=at_least(0), default=4, help="of the supernet: four passes per step")
training_flags(parser, warmup=0.1)
run_flags(parser)
flag("--out", default="runs/supernet.pt", metavar="FILE", help="the supernet's checkpoint")


def draw_shapes(root, train=2000, val=500, size=32):
    """Draws a 10-class image folder, once: five shapes, plain or striped, of any colours, size and
    place on a textured ground. No pixel tells the class: a linear classifier gets 14 % right."""
    if os.path.isdir(root):
        return
    print(f"drawing {train + val} pictures into {root}")

    def polygon(corners):
        angles = np.arange(corners) * 2 * np.pi / corners
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    def wave(low, high):  # in a random direction, `low` to `high` radians per pixel
        angle = rng.uniform(0, np.pi)
        phase = (x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(low, high)
        return np.sin(phase + rng.uniform(0, 6))[..., None]

    cross = np.array([(1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1),
                      (-3, 1), (-1, 1), (-1, 3), (1, 3)]) / 3
    shapes = {"cross": [cross], "disc": [polygon(24)], "ring": [polygon(24), polygon(24) * 0.6],
              "square": [polygon(4)], "triangle": [polygon(3)]}  # outline, and what is cut out
    classes = [(shape, fill) for shape in shapes for fill in ("plain", "striped")]
    rng, zoom = np.random.default_rng(0), 4  # drawn large, then shrunk: smooth edges
    y, x = np.mgrid[:size, :size]
    temporary = f"{root}.{os.getpid()}.tmp"
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            shape, fill = classes[index % len(classes)]
            ground = rng.integers(0, 256, 3)
            ink = (ground + rng.integers(80, 176, 3)) % 256  # it differs in every channel
            second = (ink + rng.integers(80, 176, 3)) % 256
            stripes = wave(1.2, 2.2) > 0 if fill == "striped" else True
            radius, angle = rng.uniform(0.3, 0.45) * size, rng.uniform(-0.35, 0.35)
            centre = rng.uniform(radius, size - radius, 2)
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            mask = Image.new("L", (size * zoom, size * zoom))
            for points, value in zip(shapes[shape], (255, 0)):
                points = (np.array(points) @ turn * radius + centre) * zoom
                ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=value)
            mask = np.asarray(mask.resize((size, size), Image.Resampling.BOX))[..., None] / 255
            pixels = (ground + wave(0.1, 0.5) * rng.uniform(0, 25, 3)) * (1 - mask)
            pixels += np.where(stripes, ink, second) * mask + rng.normal(0, 10, (size, size, 3))
            folder = f"{temporary}/{split}/{fill} {shape}"
            os.makedirs(folder, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f"{folder}/{index:04d}.png")
    try:
        os.replace(temporary, root)
    except OSError:  # another run was faster
        shutil.rmtree(temporary)


def read_class_map(args):
    """The classes of --class-map, in order."""
    timms = os.path.join(timm.data.__path__[0], "_info", os.path.basename(args.class_map))
    path = next(filter(os.path.isfile, (args.class_map, timms)), None)
    if args.dataset or not args.data_dir:
        raise UserError("--class-map is for the class folders of --data-dir")
    if not path:
        raise UserError(f"--class-map {args.class_map} does not exist, and timm has none")
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file") from error
    if len(set(names)) < len(names):
        raise UserError(f"{path} names a class twice: it needs one class folder per line")
    return names


def has_classes(dataset):
    """Are a folder's images in class folders? UserError where timm misreads some."""
    root = dataset.reader.root
    images = {os.path.dirname(path): path for path, _ in dataset.reader.samples}
    for folder in sorted(images.keys() - {root}):
        if os.path.dirname(folder) != root:
            raise UserError(f"{folder} is a folder inside a class folder: move its images up")
        if os.path.basename(folder).startswith("."):
            raise UserError(f"{folder} is a hidden folder, but would be a class: remove it")
    if root in images and len(images) > 1:
        raise UserError(f"{images[root]} is in no class folder")
    return root not in images


def numbers_of(dataset):
    """{class: number}, where the data set tells."""
    dataset = getattr(dataset, "reader", dataset)  # torchvision's ImageNet: several names for each
    return getattr(dataset, "wnid_to_idx", None) or getattr(dataset, "class_to_idx", {})


def describe_images(args):
    """`data`, by which later stages find the images. The tenth that is held back is chosen here."""
    shapes = args.data_dir is None and not args.dataset
    data_dir = os.path.abspath(args.data_dir or ("data/shapes" if shapes else "data"))
    names = read_class_map(args) if args.class_map else []
    if shapes:
        draw_shapes("data/shapes")
    data = {"dataset": args.dataset, "data_dir": data_dir, "seed": args.seed}
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    folders = {} if args.dataset else {"train": train, "val": val}
    # In the place of labels; stage 1 fills them in
    data["answers"] = {part: None for part, opened in folders.items() if not has_classes(opened)}
    told, numbers = args.model_kwargs.get("num_classes", 0), {}
    if len(data["answers"]) == 2:  # no labels at all
        told = told or len(names) or create_model(args.model, args.model_kwargs).num_classes
    else:
        numbers = numbers_of(val if "train" in data["answers"] else train)
    classes = names or sorted(numbers, key=numbers.get) or [str(i) for i in range(told)]
    if not classes:
        raise UserError("this data set does not tell its classes: give --model-kwargs num_classes=")
    if told not in (0, len(classes)):
        raise UserError(f"num_classes={told}, but there are {len(classes)} classes")
    if len(classes) == 1:
        raise UserError(f"one class only ({classes[0]}): at least two class folders are needed")
    for part in sorted(folders.keys() - data["answers"]):
        if unknown := sorted(set(numbers_of(folders[part])) - set(classes)):
            raise UserError(f"{part} has classes that {args.class_map or 'train'} lacks:"
                            f" {', '.join(unknown[:5])}")
    if args.dataset and not numbers_of(val).items() <= numbers.items():
        raise UserError(f"--dataset {args.dataset}: val has other classes than train, or numbers"
                        " them in another way: give folders, with --data-dir alone")
    if len(train) < 10:
        raise UserError(f"{len(train)} training images: ten are needed, as one in ten is held back")
    labels = [s[1] if isinstance(s, tuple) else s for s in samples_of(train)]
    labels = labels if len(labels) == len(train) else [0] * len(train)  # not every data set tells
    left, held = collections.Counter(labels), []  # each class keeps a training image
    if single := sum(count == 1 for count in left.values()):
        print(f"{single} of {len(left)} classes have one training image: none of it is held back")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
    for i in order.tolist():
        if len(held) < len(train) // 10 and left[labels[i]] > 1:
            left[labels[i]] -= 1
            held.append(i)
    if not held:
        raise UserError("no class has two training images: none can be held back for the search")
    data.update(classes=classes, train_images=len(train), holdout=torch.tensor(held).sort().values)
    train = open_dataset(data, "train") if names else train  # numbered as later stages do
    val = open_dataset(data, "val")
    return {**data, "fingerprint": {"train": fingerprint(train), "val": fingerprint(val)}}


def make_baseline(args, data):
    """The timm model with its first weights, its arguments, and whether the weights fit the
    classes. Adds to `data` what the model needs of an image."""
    model_args = {**args.model_kwargs, "num_classes": len(data["classes"])}
    if model_args.get("in_chans", 3) != 3:
        raise UserError(f"in_chans={model_args['in_chans']}: the stages give a network RGB images"
                        " only (of grey ones three equal channels)")
    shapes = args.data_dir is None and not args.dataset
    size = args.img_size or model_args.get("img_size") or (32 if shapes else None)
    if size and hasattr(create_model(args.model, model_args), "set_input_size"):
        model_args["img_size"] = size  # a ViT's size is fixed when it is built
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one error is enough
    try:
        model = create_model(args.model, model_args, args.pretrained)
    except Exception as error:
        if isinstance(error, UserError) or not args.pretrained:
            raise
        raise UserError(f"cannot get timm's weights for {args.model} ({type(error).__name__}):"
                        " check the network, or give --checkpoint FILE") from error
    fits = args.pretrained and len(data["classes"]) == model.pretrained_cfg["num_classes"]
    if args.checkpoint:
        fits = load_weights(model, args)
    data.update(timm.data.resolve_model_data_config(model, vars(args)))  # flags before the model's
    size = timm.layers.to_2tuple(size or data["input_size"][1:])
    if not (args.checkpoint or args.pretrained or args.crop_pct) and max(size) < 128:
        data["crop_pct"] = 1.0  # CIFAR's images show little beside their object
    data.update(input_size=[3, *size], scale=[0.8, 1.0] if max(size) < 128 else [0.08, 1.0])
    mean, std = (" ".join(f"{x:.3g}" for x in data[key]) for key in ("mean", "std"))
    print(f"images: {size[0]}x{size[1]} px, {data['crop_pct']:g} of a val image"
          f" ({data['crop_mode']}), by {data['interpolation']}; mean {mean}, std {std}")
    check_finite(model, args.checkpoint or args.model)
    try:
        network, x = copy.deepcopy(model).to("meta").eval(), torch.empty(1, 3, *size, device="meta")
        assert getattr(network(x), "shape", 0) == (1, len(data["classes"])), "it gives no logits"
        assert torch.is_tensor(network.forward_features(x)), "its features are not one tensor"
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise UserError(f"{args.model} does not classify RGB images of {size[0]}x{size[1]} px:"
                        f" {first_line(error)}") from error
    return model, model_args, fits


def load_weights(model, args):
    """Loads --checkpoint into a timm model, converted as timm does, also from behind a prefix
    (backbone.) or out of a dict of more ({"net": …}). Returns False if the classifier stays new."""
    wanted, state = model.state_dict(), {}
    if not os.path.isfile(args.checkpoint):
        raise UserError(f"{args.checkpoint} does not exist")
    try:
        state = timm.models.load_state_dict(args.checkpoint, weights_only=True)
        while not any(map(torch.is_tensor, state.values())):
            tensors = {key: sum(map(torch.is_tensor, value.values()))
                       for key, value in state.items() if isinstance(value, dict)}
            state = state[name := max(tensors, key=tensors.get)]
            print(f"{args.checkpoint}: the weights in {name!r}")
        first = next(iter(wanted))
        prefix = min((k[:-len(first)] for k in state if k.endswith(first)), key=len, default="")
        state = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        if prefix:
            print(f"{args.checkpoint}: the weights behind {prefix}")
        timms = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = timms(state, model) if timms else state
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        new = [key for key in wanted if key.rpartition(".")[0] in heads
               and (key not in state or state[key].shape != wanted[key].shape)]
        model.load_state_dict({**state, **{key: wanted[key] for key in new}})
    except Exception as error:  # torch.load raises many kinds
        odd, missing = (", ".join(sorted(map(str, keys))[:3]) or "nothing" for keys in (
            state.keys() - wanted.keys(), wanted.keys() - state.keys()))
        why = f"It lacks: {missing}; not known: {odd}"
        if any(".main." in str(key) for key in state):
            why = "It is a merged network, which is not pruned again"
        elif not state or odd == missing:
            why = repr(error)
        raise UserError(f"{args.checkpoint} does not fit {args.model} with {model.num_classes}"
                        f" classes; is it of another --model? {' '.join(why.split())[:200]}"
                        ) from error
    if new:
        print(f"a new classifier, for {model.num_classes} classes: {', '.join(new)}")
    return not new


def sandwich(model, blocks, loader, epochs, args, teacher=None):
    """A step of `train` by the sandwich rule; without `blocks` it is the baseline's, alone.
    teacher: gives the soft labels, of which the largest subnet then learns, too."""
    rng = random.Random()

    def step(images, labels, number):
        if number % len(loader) == 0:  # each epoch, so that a killed run goes on alike
            rng.seed(f"{args.seed}/{epochs[number // len(loader)]}")
        set_subnet(model, [])
        logits = outputs_of(model, images, args.amp)[1]
        loss, soft = label_loss(logits, labels, args.smoothing), logits.detach().softmax(-1)
        if teacher:
            with torch.no_grad():
                soft = outputs_of(teacher, images, args.amp)[1].softmax(-1)
            loss = (loss + F.cross_entropy(logits, soft)) / 2
        loss.backward()
        sizes = (rng.randint(1, len(blocks) - 1) for _ in range(2 if len(blocks) > 1 else 0))
        for prune in ([blocks] if blocks else []) + [rng.sample(blocks, size) for size in sizes]:
            set_subnet(model, prune)
            F.cross_entropy(outputs_of(model, images, args.amp)[1], soft).backward()
        return loss, {}
    return step


def main():
    args, device, state = start(parser, "checkpoint", "class_map")
    rank, world = rank_and_world()
    if rank > 0:  # the first process draws or downloads what is not there yet
        torch.distributed.barrier()
    data = (state or {}).get("data") or describe_images(args)  # a resumed run wants its own images
    model, model_args, trained = make_baseline(args, data)
    if rank == 0 and world > 1:
        torch.distributed.barrier()
    make_prunable(copy.deepcopy(model), attention=args.attention)  # errors come before training
    model.to(device, memory_format=torch.channels_last)  # depthwise convs train twice as fast
    for part in [part for part, known in data["answers"].items() if known is None]:
        if not trained:
            raise UserError(f"the {part} images are in no class folders: that needs weights of"
                            " these classes (--checkpoint, --pretrained), for answers as labels")
        images = make_loader({**data, "holdout": torch.tensor([])}, part, 64, device, args.workers)
        data["answers"][part] = torch.cat([x.argmax(1).cpu() for x in answers(model, images)])
        print(f"the {part} images have no labels: the given weights' answers take their place")
    loader = make_loader(data, "train", args.batch_size, device, args.workers, augment=args)
    val = make_loader(data, "val", args.batch_size, device, args.workers, split=True)
    if not state:  # an image that cannot be read is an error now, not hours later
        for part in ("train", "holdout", "val"):
            images = make_loader(data, part, 64, torch.device("cpu"), args.workers, split=world > 1)
            for _ in progress_bar(images, f"check {part}"):
                pass
    log = state["log"] if state else []

    # Baseline
    if args.baseline_epochs is None:
        args.baseline_epochs = 0 if trained else 10
    epochs = range(args.baseline_epochs)
    spare_weights(args, vars(args), model)
    print(f"{args.model}, {len(data['classes'])} classes, {data['train_images']} training images,"
          f" {len(data['holdout'])} of them held back")
    if state and state.get("baseline"):
        baseline, baseline_weights = state["baseline"], state["baseline_state_dict"]
        model.load_state_dict(baseline_weights)
    else:
        step = sandwich(model, [], loader, epochs, args)
        model, result = train(model, step, lambda network: evaluate(network, val, split=True),
                              loader, args, "baseline", epochs, args.lr, log, state=state,
                              data=data)
        baseline, state = {**cost(model, data["input_size"]), **result}, None
        baseline_weights = {key: value.cpu().clone() for key, value in model.state_dict().items()}

    # Supernet. The paper's form has to be trained; without, the search scores the fitted one
    timm.utils.random_seed(args.seed)  # what is not fitted starts alike, resumed or not
    form = args.form if args.epochs else "fitted"
    teacher = copy.deepcopy(model).eval() if form == "reparam" else None
    blocks = make_prunable(model, form, None, args.attention)
    fitted = [name for name, block in prunable_blocks(model).items() if block.rung in block.fitted]
    if form == "reparam" and fitted:
        print(f"fitted, as their own layers cannot be merged: {' '.join(fitted)}")
    if args.calibrate and not state:
        started = time.time()
        batches = make_loader(data, "train", args.batch_size, device, args.workers,
                              limit=args.calibrate, split=True)
        fit(model, blocks, batches, in_turn=False)
        what = "blocks" if form == "fitted" else "blocks' lower rungs"
        print(f"fitted {len(blocks)} {what} on {len(batches.dataset) * world} training images in"
              f" {time.time() - started:.1f} s")
    batches = make_loader(data, "train", args.batch_size, device, limit=1024)
    # Of an untrained supernet all statistics are the baseline's and the fit's own: they are right
    calibration = [images for images, _ in batches] if args.epochs else []

    def report(model):  # each subnet with BN statistics of its own; the largest's stay
        top1 = []
        for prune in (blocks, []):
            set_subnet(model, prune)
            if calibration:
                recalibrate(model, calibration)
            top1.append(evaluate(model, val, split=True)["top1"])
        return {"top1": top1[1], "top1_smallest": top1[0]}

    # In the paper's form both forms of a block share their weights: they must not move far
    peak = args.lr / 5 if form == "reparam" else args.lr
    epochs = range(epochs.stop, epochs.stop + args.epochs)
    step = sandwich(model, blocks, loader, epochs, args, teacher)
    model, result = train(model, step, report, loader, args, "supernet", epochs, peak, log,
                          state=state, data=data, baseline=baseline,
                          baseline_state_dict=baseline_weights)
    model.cpu()
    save({"stage": "supernet", "flags": vars(args), "model": args.model, "model_args": model_args,
          "data": data, "form": form, "end_act": None, "attention": args.attention,
          "baseline": baseline, "supernet": result, "state_dict": model.state_dict(),
          "baseline_state_dict": baseline_weights}, args.out)
    finish(args.out)
    set_subnet(model, blocks)
    smallest = {**cost(merge(model), data["input_size"]), "top1": result["top1_smallest"]}
    print(f"\n{len(blocks)} prunable blocks: {' '.join(blocks)}\n")
    print_table(("", "params (M)", "MACs (M)", "top-1 (%)"), [
        (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{c['top1']:.2f}")
        for name, c in (("baseline", baseline),
                        ("supernet, nothing pruned", {**baseline, **result}),
                        ("supernet, all at their first rung, merged", smallest))])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
