"""Draws docs/sharding.png: a weight on a mesh, and the sharding of its state.

python benchmarks/memory/draw_sharding.py [--out docs/sharding.png]
"""

import argparse
import pathlib

import jax
import matplotlib.pyplot as plt
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import natgalore_jax as natgalore


MESH = {"fsdp": 4, "tensor": 2}
M, N, RANK, WINDOW = 64, 128, 24, 6
NARROW = 60  # width that the title of a narrow array needs


def draw(ax: Axes, name: str, shape: tuple[int, ...], sharding: NamedSharding, colors) -> None:
    """The last two axes of an array, each shard in the colours of its devices."""
    rows, cols = shape[-2:]
    holders: dict[tuple[int, int, int, int], list[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip(index[-2:], (rows, cols), strict=True)
        )
        holders.setdefault((left, top, right - left, bottom - top), []).append(device.id)
    for (left, top, width, height), devices in holders.items():
        strip = width / len(devices)
        for i, device in enumerate(sorted(devices)):
            place = (left + i * strip, top)
            ax.add_patch(Rectangle(place, strip, height, color=colors[device], lw=0))
        ax.add_patch(Rectangle((left, top), width, height, fill=False, lw=1.2))
        label = "all" if len(devices) == len(colors) else " ".join(map(str, sorted(devices)))
        size = 8 if height >= 6 else 4.5
        ax.text(left + width / 2, top + height / 2, label, ha="center", va="center", fontsize=size)
    ax.set(xlim=(-1, max(cols, NARROW) + 1), ylim=(M + 1, -1), aspect="equal")
    ax.axis("off")
    spec = ", ".join(str(entry) for entry in (*sharding.spec, None, None)[: len(shape)])
    sizes = " x ".join(map(str, shape))
    ax.set_title(f"{name}, {sizes}\n({spec})", fontsize=9, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default="docs/sharding.png")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH))
    params = {"kernel": jax.ShapeDtypeStruct((M, N), "float32")}
    shardings = {"kernel": NamedSharding(mesh, P("fsdp", "tensor"))}
    stages = (natgalore.scale_by_fisher(WINDOW), natgalore.scale_by_core_fisher())
    tx = natgalore.project(RANK, optax.chain(*stages, optax.scale_by_adam()))
    state_shardings = natgalore.state_shardings(tx, params, shardings)
    shapes = jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda x, sharding: (x.shape, sharding), shapes, state_shardings)
    window, core, adam = state.inner_state
    drawn = {
        "basis P": state.basis,
        "moments": adam.mu,
        "core Fisher, root": core.fisher,
        "window, one of its cores": window.window,
    }
    colors = dict(enumerate(plt.get_cmap("Set3").colors[:8]))
    ratios = [N, NARROW, N, NARROW, N]
    figure, axes = plt.subplots(1, 5, figsize=(14, 2.5), layout="constrained", width_ratios=ratios)
    draw(axes[0], "weight, gradient, update", (M, N), shardings["kernel"], colors)
    for ax, (name, tree) in zip(axes[1:], drawn.items(), strict=True):
        shape, sharding = tree["kernel"].value
        draw(ax, name, shape, sharding, colors)
    figure.suptitle(
        f"one weight on a mesh of {' x '.join(f'{k} {v}' for k, v in MESH.items())}: "
        "numbers and colours are the devices that hold a part",
        fontsize=10,
    )
    figure.savefig(args.out, dpi=150)
    print(f"drew {args.out}")


if __name__ == "__main__":
    main()
