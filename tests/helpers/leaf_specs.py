"""The views of leaves that several tests share."""

import jax

from natgalore_jax.tree.leaf_spec import LeafSpec


# A stack of three kernels.
KERNEL = LeafSpec(
    path=(jax.tree_util.DictKey("up"), jax.tree_util.DictKey("kernel")),
    shape=(3, 8, 20),
    batch=(0,),
    rows=(1,),
    cols=(2,),
    rank=4,
)
