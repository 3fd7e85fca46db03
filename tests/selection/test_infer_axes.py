"""Automatic selection on the parameter trees that it was written with.

`test_held_out_trees.py` measures it on trees that it was not written with.
"""

import jax
import pytest

from natgalore_jax.selection.infer_axes import read
from natgalore_jax.selection.name_rules import axis_kind, words


DICT, ATTR = jax.tree_util.DictKey, jax.tree_util.GetAttrKey


def readings(shapes, axis_names=None):
    """(batch, rows, cols), and "guess" if it is one, or the reason, of each leaf by name."""
    named = [(tuple(map(DICT, path.split("/"))), shape) for path, shape in shapes.items()]
    axis_names = axis_names and [axis_names.get(path) for path in shapes]
    found = {}
    for path, reading in zip(shapes, read(named, axis_names), strict=True):
        if isinstance(reading, str):
            found[path] = reading
        else:
            found[path] = reading[:3] + ("guess",) * reading.guess
    return found


LAYOUTS = {
    "unrolled": {
        "embed/embedding": ((99, 16), "an embedding"),
        "layers/0/attention/query/kernel": ((16, 16), ((), (0,), (1,))),
        "layers/0/attention_norm/scale": ((16,), "a norm"),
        "layers/0/mlp/up/kernel": ((16, 40), ((), (0,), (1,))),
        "layers/0/mlp/down/kernel": ((40, 16), ((), (0,), (1,))),
        "layers/0/mlp/up/bias": ((40,), "a bias"),
        "head/kernel": ((16, 99), "an output head"),
    },
    "scanned": {
        "layers/attention/query/kernel": ((3, 16, 16), ((0,), (1,), (2,))),
        "layers/mlp/down/kernel": ((3, 40, 16), ((0,), (1,), (2,))),
        "layers/norm/scale": ((3, 16), "a norm"),
        "layers/mlp/up/bias": ((3, 40), "a bias"),
        "lm_head/kernel": ((16, 99), "an output head"),
    },
    "scanned under a name that tells nothing": {
        "decoder/dense/kernel": ((3, 16, 40), ((0,), (1,), (2,))),
        "decoder/dense/bias": ((3, 40), "a bias"),
    },
    "scanned without a norm": {
        "layers/up/kernel": ((3, 16, 40), ((0,), (1,), (2,))),
        "layers/down/kernel": ((3, 40, 16), ((0,), (1,), (2,))),
    },
    "scanned on the second axis without a norm": {
        "layers/up/kernel": ((16, 3, 40), ((1,), (0,), (2,))),
        "layers/down/kernel": ((40, 3, 16), ((1,), (0,), (2,))),
    },
    "stacks of stacks": {
        "stages/up/kernel": ((2, 5, 16, 40), ((0, 1), (2,), (3,))),
        "stages/query/kernel": ((2, 5, 16, 4, 12), ((0, 1), (2,), (3, 4))),
        "stages/query/bias": ((2, 5, 4, 12), "a bias"),
        "stages/norm/scale": ((2, 5, 16), "a norm"),
    },
    "a scan within a scan": {
        "blocks/local/query/kernel": ((5, 3, 16, 4, 12), ((0, 1), (2,), (3, 4))),
        "blocks/local/up/kernel": ((5, 3, 16, 40), ((0, 1), (2,), (3,))),
        "blocks/local/norm/scale": ((5, 3, 16), "a norm"),
        "blocks/global/query/kernel": ((5, 16, 4, 12), ((0,), (1,), (2, 3))),
        "blocks/global/norm/scale": ((5, 16), "a norm"),
    },
    "a scan within a scan, on the second and third axes": {
        "blocks/local/attn/out/kernel": ((4, 5, 5, 12, 16), ((1, 2), (0, 3), (4,))),
        "blocks/local/up/kernel": ((16, 5, 5, 40), ((1, 2), (0,), (3,))),
        "blocks/local/norm/scale": ((16, 5, 5), "a norm"),
        "blocks/global/up/kernel": ((16, 5, 40), ((1,), (0,), (2,))),
        "blocks/global/norm/scale": ((16, 5), "a norm"),
    },
    "a scan within a scan without a norm": {
        "layers/attn/query/kernel": ((2, 5, 16, 4, 12), ((0, 1), (2,), (3, 4))),
        "layers/up/kernel": ((2, 5, 16, 40), ((0, 1), (2,), (3,))),
        "layers/down/kernel": ((2, 5, 40, 16), ((0, 1), (2,), (3,))),
    },
    "heads are no layers, though all leaves share them": {
        "embed/embedding": ((99, 16), "an embedding"),
        "layers/attn/query/kernel": ((3, 4, 16, 12), ((0,), (1, 3), (2,))),
        "layers/attn/out/kernel": ((3, 4, 12, 16), ((0,), (1, 2), (3,))),
    },
    "experts with a bias": {
        "ff/wi": ((8, 16, 40), ((0,), (1,), (2,))),
        "ff/wi_bias": ((8, 40), "a bias"),
        "ff/router/kernel": ((16, 8), "a router"),
    },
    "square experts with a bias that fits two sides": {
        "ff/wi": ((8, 16, 16), ((0,), (1,), (2,), "guess")),
        "ff/wi_bias": ((8, 16), "a bias"),
        "ff/router/kernel": ((16, 8), "a router"),
    },
    "Flax attention": {
        "attention/query/kernel": ((16, 4, 8), ((), (0,), (1, 2))),
        "attention/out/kernel": ((4, 8, 16), ((), (0, 1), (2,))),
        "attention/query/bias": ((4, 8), "a bias"),
    },
    "as many heads as they are wide": {  # the bias (8, 8) is no stack of eight
        "attention/query/kernel": ((64, 8, 8), ((), (0,), (1, 2))),
        "attention/query/bias": ((8, 8), "a bias"),
        "attention/out/kernel": ((8, 8, 64), ((), (0, 1), (2,))),
        "attention/out/bias": ((64,), "a bias"),
    },
    "Flax attention, scanned": {
        "layers/attention/query/kernel": ((3, 16, 4, 8), ((0,), (1,), (2, 3))),
        "layers/attention/out/kernel": ((3, 4, 8, 16), ((0,), (1, 2), (3,))),
        "layers/norm/scale": ((3, 16), "a norm"),
    },
    "camel case, a list of blocks": {
        "Block_0/selfAttention/q_proj/weight": ((16, 16), ((), (0,), (1,))),
        "Block_0/LayerNorm_1/weight": ((16,), "a norm"),
    },
    "experts in an unrolled layer": {
        "layers/0/moe/up/kernel": ((8, 16, 40), ((0,), (1,), (2,))),
        "layers/0/moe/router/kernel": ((16, 8), "a router"),
        "layers/0/norm/scale": ((16,), "a norm"),
    },
    "Linen's own names": {
        "MultiHeadDotProductAttention_0/query/kernel": ((16, 4, 8), ((), (0,), (1, 2))),
        "MultiHeadDotProductAttention_0/out/kernel": ((4, 8, 16), ((), (0, 1), (2,))),
        "PreNorm_0/fn/Dense_0/kernel": ((16, 40), ((), (0,), (1,))),
        "PreNorm_0/LayerNorm_0/scale": ((16,), "a norm"),
    },
    "numbered modules below a list's name": {
        "blocks/block1/dense/kernel": ((16, 40), ((), (0,), (1,))),
        "blocks/block1/conv1/kernel": ((3, 3, 16, 32), ((), (0, 1, 2), (3,))),
        "layers/first/kernel": ((64, 256), ((), (0,), (1,))),
        "layers/ln1/weight": ((64,), "a norm"),
    },
    "other people's embeddings, heads and routers": {
        "tok_emb/weight": ((99, 16), "an embedding"),
        "shared/weight": ((99, 16), "an embedding"),
        "token_table": ((99, 16), "an embedding"),
        "output/weight": ((99, 16), "an output head"),
        "unembedding/kernel": ((16, 99), "an output head"),
        "decoder/predictions/kernel": ((16, 99), "an output head"),  # the vocabulary's size
        "posemb": ((64, 16), "a position table"),
        "block_sparse_moe/gate/kernel": ((64, 8), "a router"),
        "moe/gating/kernel": ((64, 16), "a router"),
        "mlp/gate/kernel": ((16, 40), ((), (0,), (1,))),
        "time_embed/Dense_0/kernel": ((16, 40), ((), (0,), (1,))),
        "layers/attn/wq_b/kernel": ((16, 40), ((), (0,), (1,))),
        "moe/shared_experts/gate_proj/kernel": ((16, 40), ((), (0,), (1,))),
    },
    "a gate beside experts": {
        "blocks/0/mlp/gate/kernel": ((64, 8), "a router"),
        "blocks/0/mlp/experts_up": ((8, 64, 40), ((0,), (1,), (2,))),
        "blocks/0/glu/gate/kernel": ((64, 8), ((), (0,), (1,))),
    },
    "a vocabulary as large as a layer is wide": {
        "embed/embedding": ((256, 64), "an embedding"),
        "blocks/0/up/kernel": ((64, 256), ((), (0,), (1,))),
        "blocks/0/down/kernel": ((256, 64), ((), (0,), (1,))),
        "head/kernel": ((64, 256), "an output head"),
    },
    "a table beside a stack with its width": {
        "embed": ((16, 12), "an embedding"),
        "layers/kernel": ((3, 12, 12), ((0,), (1,), (2,))),
        "layers/bias": ((3, 12), "a bias"),
    },
    "a value function": {"rl/value/Dense_0/kernel": ((10, 16, 40), ((0,), (1,), (2,), "guess"))},
    "never": {
        "pos_embed/table": ((64, 16), "an embedding"),
        "position/scores": ((64, 16), "a position table"),
        "gate/kernel": ((16, 4), "too small (4 x 16)"),
        "temperature": ((), "a vector"),
        "cls": ((1, 1, 768), "a learned token"),
        "ssm/A_log": ((64, 16), "a state-space parameter"),
        "mamba/conv1d/kernel": ((4, 1, 64), "a depthwise convolution"),
        "block/dwconv/weight": ((64, 1, 7, 7), "a depthwise convolution"),
        "query/lora_a": ((64, 16), "a LoRA factor"),
        "pruned/kernel": ((0, 16, 40), "empty (0, 16, 40)"),
    },
    "convolutions": {
        "stem/kernel": ((7, 7, 3, 64), ((), (0, 1, 2), (3,))),
        "block/conv2/weight": ((64, 32, 3, 3), ((), (0,), (1, 2, 3))),
        "block/projection/kernel": ((1, 1, 32, 64), ((), (0, 1, 2), (3,))),
        "block/window": ((3, 3, 32, 64), ((), (0, 1, 2), (3,))),  # square and small: it is one
        "encoder/conv1/kernel": ((3, 80, 384), ((), (0, 1), (2,))),
        "video/conv/kernel": ((3, 3, 3, 16, 32), ((), (0, 1, 2, 3), (4,))),
    },
    # The code bases that the rule was written with.
    "MaxText": {
        "params/token_embedder/embedding": ((32000, 64), "an embedding"),
        "params/decoder/layers/self_attention/query/kernel": ((64, 6, 4, 16), ((1,), (0,), (2, 3))),
        "params/decoder/layers/self_attention/key/kernel": ((64, 6, 2, 16), ((1,), (0,), (2, 3))),
        "params/decoder/layers/self_attention/out/kernel": ((4, 6, 16, 64), ((1,), (0, 2), (3,))),
        "params/decoder/layers/mlp/wi_0/kernel": ((64, 6, 160), ((1,), (0,), (2,))),
        "params/decoder/layers/mlp/wo/kernel": ((160, 6, 64), ((1,), (0,), (2,))),
        "params/decoder/layers/pre_self_attention_layer_norm/scale": ((64, 6), "a norm"),
        "params/decoder/decoder_norm/scale": ((64,), "a norm"),
        "params/decoder/logits_dense/kernel": ((64, 32000), "an output head"),
    },
    "MaxText, experts": {
        "params/decoder/layers/MoeBlock_0/wi_0": ((8, 6, 64, 160), ((0, 1), (2,), (3,))),
        "params/decoder/layers/MoeBlock_0/wo": ((8, 6, 160, 64), ((0, 1), (2,), (3,))),
        "params/decoder/layers/MoeBlock_0/gate/kernel": ((64, 6, 8), "a router"),
        "params/decoder/layers/norm/scale": ((64, 6), "a norm"),
    },
    "Gemma": {
        "embedder/input_embedding": ((256000, 64), "an embedding"),
        "layer_0/attn/qkv_einsum/w": ((3, 4, 64, 16), ((0,), (1, 3), (2,))),
        "layer_1/attn/q_einsum/w": ((4, 64, 16), ((), (0, 2), (1,))),
        "layer_1/attn/kv_einsum/w": ((2, 1, 64, 16), ((0, 1), (2,), (3,))),
        "layer_1/attn/attn_vec_einsum/w": ((4, 16, 64), ((), (0, 1), (2,))),
        "layer_0/mlp/gating_einsum/w": ((2, 64, 160), ((0,), (1,), (2,))),
        "layer_0/mlp/linear/w": ((160, 64), ((), (0,), (1,))),
        "layer_0/pre_attention_norm/scale": ((64,), "a norm"),
        "layer_0/attn/query_norm/scale": ((16,), "a norm"),
    },
    "EasyLM": {
        "params/transformer/wte/embedding": ((32000, 64), "an embedding"),
        "params/transformer/h/0/attention/wq/kernel": ((64, 64), ((), (0,), (1,))),
        "params/transformer/h/0/feed_forward/w1/kernel": ((64, 160), ((), (0,), (1,))),
        "params/lm_head/kernel": ((64, 32000), "an output head"),
    },
    "dataclasses of arrays": {
        "layers/0/attn/q": ((64, 4, 16), ((), (0,), (1, 2))),
        "layers/0/attn/o": ((4, 16, 64), ((), (0, 1), (2,))),
        "layers/0/mlp/w_gate": ((64, 160), ((), (0,), (1,))),
        "layers/1/mlp/we_gate": ((8, 64, 160), ((0,), (1,), (2,), "guess")),
        "layers/1/mlp/w_router": ((64, 8), "a router"),
    },
    "Levanter": {
        "transformer/layers/stacked/self_attn/q_proj/weight/array": (
            (6, 2, 2, 16, 64),
            ((0,), (1, 2, 3), (4,)),
        ),
        "transformer/layers/stacked/self_attn/o_proj/weight/array": (
            (6, 64, 4, 16),
            ((0,), (1,), (2, 3)),
        ),
        "transformer/layers/stacked/mlp/up_proj/weight/array": ((6, 160, 64), ((0,), (1,), (2,))),
        "transformer/layers/stacked/input_layernorm/weight/array": ((6, 64), "a norm"),
        "embeddings/token_embeddings/weight/array": ((32000, 64), "an embedding"),
    },
    "T5X": {
        "decoder/mlp/wi/kernel": ((64, 2, 160), ((1,), (0,), (2,))),
        "attention/qkv/kernel": ((64, 3, 4, 16), ((1,), (0,), (2, 3))),
        "decoder/relpos_bias/rel_embedding": ((12, 32), "an embedding"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reads_a_layout(layout):
    assert readings({path: shape for path, (shape, _) in layout.items()}) == {
        path: view for path, (_, view) in layout.items()
    }


NAMED = {  # shape, names of axes, expected reading
    "scan axes anywhere, any number": {
        "a/w": ((3, 64, 5, 7, 4, 16), "stage embed layers_per_stage local_layers q_heads kv",
                ((0, 2, 3), (1,), (4, 5))),
    },
    "square experts, whose bias fits two sides": {
        "ff/wi": ((32, 12, 64, 64), "exp layers embed mlp", ((0, 1), (2,), (3,))),
        "ff/wi_bias": ((32, 12, 64), "exp layers mlp", "a bias"),
        "ff/gate": ((64, 12, 32), "embed layers exp", "a router"),
    },
    "a router among experts as many as an expert is wide": {
        "mlp/routed_experts/wi_0": ((64, 3, 128, 64), "exp layers embed mlp",
                                    ((0, 1), (2,), (3,))),
        "mlp/routed_experts/gate/kernel": ((128, 3, 64), "embed layers -", "a router"),
        "mlp/experts/gate/kernel": ((64, 3, 128, 64), "exp layers embed mlp",
                                    ((0, 1), (2,), (3,))),
    },
    "experts on another axis than the first": {
        "ff/wi": ((64, 32, 64), "embed experts mlp", ((1,), (0,), (2,))),
    },
    "heads on either side, in any order": {
        "x/into": ((64, 8, 16), "embed heads head_dim", ((), (0,), (1, 2))),
        "x/out": ((8, 64, 16), "heads embed head_size", ((), (0, 2), (1,))),
        "x/grouped": ((2, 4, 16, 64), "kv_head q_heads_per_group - embed", ((), (0, 1, 2), (3,))),
        "x/latent": ((64, 8, 16), "kv_lora kv_heads kv_head_dim", ((), (0,), (1, 2))),
    },
    "fused projections": {
        "attn/c": ((64, 3, 4, 16), "embed qkv heads kv", ((1,), (0,), (2, 3))),
        "attn/pair": ((64, 2, 16), "embed kv_heads head_dim", ((), (0,), (1, 2))),  # not fused
    },
    "a vocabulary below the size that tells one": {
        "x/w": ((64, 99), "embed vocab", "an output head"),
    },
    "names of mesh axes, which tell nothing": {
        "blocks_0/query/kernel": ((64, 8, 16), "data - -", ((), (0,), (1, 2))),
        "blocks_0/attn/o": ((8, 16, 64), "model - expert", ((), (0, 1), (2,))),
        "blocks_0/up": ((64, 256), "expert model", ((), (0,), (1,))),
        "blocks_0/norm": ((64,), "model", "a norm"),
    },
    "names that the sizes contradict": {  # 3 is the size of each leaf's second axis
        "layers/up": ((16, 3, 40), "layers embed mlp", "too small (3 x 40)"),
        "layers/down": ((40, 3, 16), "layers embed mlp", "too small (3 x 16)"),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", NAMED.values(), ids=NAMED)
def test_reads_axis_names(layout):
    names = {
        path: [None if name == "-" else name for name in axes.split()]
        for path, (_, axes, _) in layout.items()
    }
    shapes = {path: shape for path, (shape, _, _) in layout.items()}
    assert readings(shapes, names) == {path: view for path, (*_, view) in layout.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "layers") for name in ("layers", "encoder_layers", "numLayers", "stage")),
        *((name, "experts") for name in ("exp", "experts", "num_experts")),
        *((name, "heads") for name in ("heads", "kv", "kv_heads", "head_dim", "q_head_dim")),
        *((name, "features") for name in ("embed", "mlp_moe", "expert_mlp", "q_lora", "kv_lora")),
        *((name, None) for name in ("fsdp", "model", "norm", "layer_norm", "", None)),
    ],
)
def test_axis_kind(name, kind):
    assert axis_kind(name) == kind


def test_the_box_of_flax_is_no_name():
    """`.value` of an nnx.Param or a boxed Linen leaf is not the value projection of attention."""
    path = (DICT("experts"), DICT("up"))
    assert words((*path, ATTR("value"))) == words(path) == ["experts", "up"]
    assert words((DICT("value"),)) == ["value"]
    shape = (4, 16, 40)
    boxed = [((DICT("a"), DICT("up"), DICT("value")), shape), ((DICT("b"), DICT("value")), (16,))]
    bare = [(path[:-1], shape) for path, shape in boxed]
    assert read(boxed) == read(bare)  # all leaves have it: so it is a box here too
