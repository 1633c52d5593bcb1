"""Draws the README's pictures into tests/benchmarks/pictures, the curves from
results/first-screen.csv.

    pip install matplotlib
    python tests/benchmarks/pictures.py
"""

import csv
import os

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

HERE = os.path.dirname(os.path.abspath(__file__))
COLOURS = {"layer": "#9ecae1", "norm": "#a1d99b", "act": "#fdae6b", "merged": "#6baed6"}
FORMS = {"paper's form": "o-", "fitted form": "s--", "smaller images": "^:"}
EXPAND = (("1×1", "layer"), ("BN", "norm"), ("ReLU6", "act"))
DEPTHWISE = (("dw", "layer"), ("BN", "norm"), ("ReLU6", "act"))
INVERTED_RESIDUAL = (*EXPAND, *DEPTHWISE, ("1×1", "layer"), ("BN", "norm"))
MLP = (("LN", "norm"), ("fc1", "layer"), ("GELU", "act"), ("fc2", "layer"))
CONVNEXT = (("depthwise", "layer"), *MLP[:3], ("fc2 · γ", "layer"))


def block(axes, title, parts, merged, skip):
    """Four rows: the block at lam = 0, between, at 1, merged."""
    axes.set_title(title, loc="left", fontsize=17, fontweight="bold")
    axes.set(xlim=(-2.2, 8.6), ylim=(-3.6, 0.6))
    axes.axis("off")
    rows = ("λ = 0", "0 < λ < 1", "λ = 1", "merged")
    width = 8 / max(len(parts), 5)
    for y, name in enumerate(rows):
        axes.text(-0.2, -y, name, ha="right", va="center", fontsize=15)
        chain = merged if name == "merged" else parts
        x = 0.0
        arrow = {"arrowstyle": "->", "color": "grey"}
        axes.annotate("", (8.5, -y), (-0.1, -y), arrowprops=arrow, zorder=0)
        for text, kind in chain:
            alpha, style, shown = 1.0, "-", text
            if name == "λ = 1" and kind == "act":  # the identity
                x += width
                continue
            if name == "0 < λ < 1" and kind == "act":
                alpha, style = 0.4, "--"
            if name in ("0 < λ < 1", "λ = 1") and text == "LN":
                shown = "LN→BN" if name == "0 < λ < 1" else "BN"
            size = width * 0.94 if name != "merged" else 2.9
            box = {"facecolor": COLOURS[kind], "alpha": alpha, "edgecolor": "black"}
            corner = x + 0.02, -y - 0.3
            axes.add_patch(Rectangle(corner, size, 0.6, linestyle=style, **box))
            axes.text(x + size / 2, -y, shown, ha="center", va="center", fontsize=14)
            x += width if name != "merged" else size + 0.2
    axes.text(8.5, -3.45, skip, ha="right", va="center", fontsize=14, style="italic")


def blocks_picture(path):
    figure = Figure((7.8, 7.6), layout="constrained", facecolor="white")
    above, middle, below = figure.subplots(3)
    folded = "the skip is folded in"
    dense = (("one dense conv", "merged"),)
    block(above, "MobileNetV2's inverted residual", INVERTED_RESIDUAL, dense, folded)
    convs = (("depthwise", "merged"), ("1×1 conv", "merged"))
    block(middle, "ConvNeXt's block", CONVNEXT, convs, "beside the skip")
    linear = (("one linear layer", "merged"),)
    block(below, "The MLP of a ViT's block (its attention stays)", MLP, linear, folded)
    figure.savefig(path, dpi=110)


def curves_picture(path):
    with open(os.path.join(HERE, "results", "first-screen.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure((8, 5.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for number, network in enumerate(dict.fromkeys(row["network"] for row in rows)):
        mine = [row for row in rows if row["network"] == network]
        control = float(next(row["top-1"] for row in mine if row["form"] == "control"))
        for form, fmt in FORMS.items():
            some = [row for row in mine if row["form"] == form]
            if not some:
                continue
            faster = [float(row["speed-up, batch 1"].rstrip("x")) for row in some]
            lost = [float(row["top-1"]) - control for row in some]
            label = f"{network}, {form}: {some[0]['data']}"
            style = {"fmt": fmt, "color": f"C{number}", "capsize": 3, "markersize": 8}
            deviations = [float(row["sd"] or 0) for row in some]
            axes.errorbar([1, *faster], [0, *lost], [0, *deviations], **style, label=label)
    axes.set_xlabel("times faster than the baseline, one image, 2 CPU cores")
    axes.set_ylabel("val top-1, points above the control")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    blocks_picture(os.path.join(HERE, "pictures", "blocks.png"))
    curves_picture(os.path.join(HERE, "pictures", "curves.png"))
