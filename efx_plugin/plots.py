"""Pictures of a checkpoint."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from efx_plugin.checkpoint.summary import Summary


def sparsity_heat_map(summary: Summary, path: Path) -> None:
    """Write a picture of the sparsity of every compressed weight: layers down, projections across."""
    inside = [(weight.layer, weight) for weight in summary.weights if weight.layer is not None]
    layers = sorted({layer for layer, _ in inside})
    projections = list(dict.fromkeys(weight.projection for _, weight in inside))
    grid = [[float("nan")] * len(projections) for _ in layers]
    for layer, weight in inside:
        grid[layers.index(layer)][projections.index(weight.projection)] = weight.zeros / weight.size
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.8 * len(projections), 2 + 0.22 * len(layers)), layout="constrained")
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(projections)), [name.rsplit(".", 1)[-1] for name in projections], rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.set_ylabel("decoder block")
    axes.set_title(f"{Path(summary.directory).name}: {summary.sparsity:.1%} zeros", fontsize=10)
    figure.colorbar(image, label="fraction of zeros")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
