"""Every optimizer and transformation of Optax, and what becomes of it with natgalore.

`python -m tests.helpers.partners` writes docs/partners.md out of these tables;
`test_partners.py` tests each line of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib

import natgalore_jax as natgalore


PAGE = Path(__file__).parents[2] / "docs" / "partners.md"
LR = 1e-2
NONE: Mapping[str, Any] = MappingProxyType({})
ADAM = {"mu": "linear", "nu": "square"}


class Works(NamedTuple):
    """An inner of `project`.

    Attributes:
      make: builds it.
      state: how many numbers it keeps of a core of r x n, "2 r n + n", say.
      roles: what its fields hold, by their names: linear, square, or the factors rows and cols.
      symmetry: what its answers turn with: "signs", signed permutations of the r directions;
        "turns", any rotation; "" where not with those either.
      transport: "any", or "keep" if with no other.
      note: for the reader of the page.
      extra_args: of its update.
      decay: what it multiplies weights by.
    """

    make: Callable[[], Any]
    state: str
    roles: Mapping[str, str] = NONE
    symmetry: str = "signs"
    transport: str = "any"
    note: str = ""
    extra_args: Mapping[str, Any] = NONE
    decay: float = 0.0


def matrices(params):
    """Labels that send the leaves called kernel to one optimizer and the rest to another."""
    return {name: "a" if "kernel" in leaf else "b" for name, leaf in params.items()}


OPTIMIZERS = {
    "adabelief": Works(lambda: optax.adabelief(LR), "2 r n", ADAM),
    "adadelta": Works(lambda: optax.adadelta(LR), "2 r n", {"e_g": "square", "e_x": "square"}),
    "adafactor": Works(
        lambda: optax.adafactor(
            LR, multiply_by_parameter_scale=False, min_dim_size_to_factor=4, weight_decay_rate=0.1
        ),
        "r + n",
        {"v_row": "rows", "v_col": "cols"},
        decay=-0.1,
        note="with `multiply_by_parameter_scale=False`; factors where "
        "`min_dim_size_to_factor` (128) is at most the rank. A stack longer than the rank needs "
        '`factored=False` or `transport="keep"`',
    ),
    "adagrad": Works(lambda: optax.adagrad(LR), "r n", {"sum_of_squares": "square"}),
    "adam": Works(lambda: optax.adam(LR), "2 r n", ADAM),
    "adamax": Works(lambda: optax.adamax(LR), "2 r n", ADAM),
    "adamaxw": Works(lambda: optax.adamaxw(LR), "2 r n", ADAM, decay=-LR * 1e-4),
    "adamw": Works(lambda: optax.adamw(LR), "2 r n", ADAM, decay=-LR * 1e-4),
    "adan": Works(
        lambda: optax.adan(LR),
        "4 r n",
        {"m": "linear", "v": "linear", "n": "square", "g": "linear"},
    ),
    "amsgrad": Works(lambda: optax.amsgrad(LR), "3 r n", {**ADAM, "nu_max": "square"}),
    "lion": Works(lambda: optax.lion(LR), "r n", {"mu": "linear"}, decay=-LR * 1e-3),
    "nadam": Works(lambda: optax.nadam(LR), "2 r n", ADAM),
    "nadamw": Works(lambda: optax.nadamw(LR), "2 r n", ADAM, decay=-LR * 1e-4),
    "noisy_sgd": Works(
        lambda: optax.noisy_sgd(LR, key=0), "0", symmetry="", note="noise within the subspace"
    ),
    "novograd": Works(
        lambda: optax.novograd(LR),
        "r n",
        {"mu": "linear"},
        "turns",
        note="without its `weight_decay`, which enters its momentum; one norm per leaf or stack",
    ),
    "optimistic_adam_v2": Works(
        lambda: optax.optimistic_adam_v2(LR), "3 r n", {**ADAM, "previous_gradient": "linear"}
    ),
    "optimistic_gradient_descent": Works(
        lambda: optax.optimistic_gradient_descent(LR),
        "r n",
        {"previous_gradient": "linear"},
        "turns",
    ),
    "polyak_sgd": Works(
        lambda: optax.polyak_sgd(),
        "0",
        symmetry="turns",
        note="the Polyak step of the projected gradient",
        extra_args={"value": 3.0},
    ),
    "radam": Works(lambda: optax.radam(LR), "2 r n", ADAM),
    "rmsprop": Works(
        lambda: optax.rmsprop(LR), "r n", {"nu": "square"}, note="2 r n with momentum or `centered`"
    ),
    "rprop": Works(
        lambda: optax.rprop(LR),
        "2 r n",
        {"step_sizes": "square", "prev_updates": "linear"},
        symmetry="",
        note="its zeros, marks of a change of sign, are not zeros in another basis",
    ),
    "sgd": Works(lambda: optax.sgd(LR), "0", symmetry="turns", note="r n with momentum"),
    "sign_sgd": Works(lambda: optax.sign_sgd(LR), "0"),
    "signum": Works(lambda: optax.signum(LR), "r n", {"ema": "linear"}),
    "sm3": Works(
        lambda: optax.sm3(LR),
        "r n + r + n",
        symmetry="",
        transport="keep",
        note='no rule transforms its maxima, so it needs `transport="keep"`',
    ),
    "yogi": Works(lambda: optax.yogi(LR), "2 r n", ADAM),
    "contrib.acprop": Works(lambda: optax.contrib.acprop(LR), "2 r n", ADAM),
    "contrib.ademamix": Works(
        lambda: optax.contrib.ademamix(LR),
        "3 r n",
        {"m1": "linear", "m2": "linear", "nu": "square"},
    ),
    "contrib.adopt": Works(lambda: optax.contrib.adopt(LR), "2 r n", ADAM),
    "contrib.muon": Works(
        lambda: optax.contrib.muon(LR),
        "r n",
        {"mu": "linear", "nu": "square"},
        note="P U is the orthogonalised projected momentum. Stacks get Adam unless "
        "`muon_weight_dimension_numbers` names their last two axes",
    ),
    "contrib.simplified_ademamix": Works(
        lambda: optax.contrib.simplified_ademamix(LR), "2 r n", {"m": "linear", "n": "square"}
    ),
}

VARIANTS = {
    "sgd, momentum": Works(lambda: optax.sgd(LR, 0.9), "r n", {"trace": "linear"}, "turns"),
    "sgd, nesterov": Works(
        lambda: optax.sgd(LR, 0.9, nesterov=True), "r n", {"trace": "linear"}, "turns"
    ),
    "rmsprop, centred with momentum": Works(
        lambda: optax.rmsprop(LR, momentum=0.9, centered=True),
        "3 r n",
        {**ADAM, "trace": "linear"},
    ),
    "rmsprop, bias corrected": Works(
        lambda: optax.rmsprop(LR, bias_correction=True), "r n", {"nu": "square"}
    ),
    "rmsprop, centred and bias corrected": Works(
        # At the first step nu - mu² is rounding: an eps to tell it from the oracle's.
        lambda: optax.rmsprop(LR, centered=True, bias_correction=True, eps=1e-3),
        "2 r n",
        ADAM,
    ),
    "adafactor, unfactored": Works(
        lambda: optax.adafactor(
            LR, multiply_by_parameter_scale=False, momentum=0.9, dtype_momentum=None
        ),
        "2 r n",
        {"v": "square", "ema": "linear"},
    ),
    "muon of stacks": Works(
        lambda: optax.contrib.muon(LR, muon_weight_dimension_numbers=last_two_axes),
        "r n",
        {"mu": "linear", "nu": "square"},
        "turns",
    ),
    "inject_hyperparams": Works(lambda: optax.inject_hyperparams(optax.adam)(LR), "2 r n", ADAM),
    "MultiSteps": Works(
        lambda: optax.MultiSteps(optax.adam(LR), 2, accumulator_dtype=None),
        "3 r n",
        {**ADAM, "acc_grads": "linear"},
    ),
    "partition": Works(
        lambda: optax.partition({"a": optax.adam(LR), "b": optax.lamb(LR)}, matrices), "2 r n", ADAM
    ),
    "masked": Works(
        lambda: optax.masked(
            optax.adam(LR), lambda p: {name: "kernel" in leaf for name, leaf in p.items()}
        ),
        "2 r n",
        ADAM,
    ),
    "named_chain": Works(
        lambda: optax.named_chain(("adam", optax.scale_by_adam()), ("rate", optax.scale(-LR))),
        "2 r n",
        ADAM,
    ),
    "apply_if_finite": Works(lambda: optax.apply_if_finite(optax.adam(LR), 3), "2 r n", ADAM),
    "conditionally_transform": Works(
        lambda: optax.conditionally_transform(optax.adam(LR), lambda step, *_, **__: step > 1),
        "2 r n",
        ADAM,
    ),
    "conditionally_mask": Works(
        lambda: optax.conditionally_mask(optax.adam(LR), lambda step, *_, **__: step > 1),
        "2 r n",
        ADAM,
    ),
    "clip_by_global_norm": Works(
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LR)), "2 r n", ADAM
    ),
    "clip": Works(lambda: optax.chain(optax.clip(0.5), optax.adam(LR)), "2 r n", ADAM),
    "clip_by_block_rms": Works(
        lambda: optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(LR)), "0", symmetry="turns"
    ),
    "ema": Works(lambda: optax.chain(optax.ema(0.9), optax.scale(-LR)), "r n", {"ema": "linear"}),
    "add_noise": Works(
        lambda: optax.chain(optax.adam(LR), optax.add_noise(0.1, 0.5, key=0)), "2 r n", ADAM, ""
    ),
    "apply_every": Works(
        lambda: optax.chain(optax.adam(LR), optax.apply_every(2)),
        "3 r n",
        {**ADAM, "grad_acc": "linear"},
    ),
    "centralize": Works(
        lambda: optax.chain(optax.centralize(), optax.adam(LR)), "2 r n", ADAM, symmetry=""
    ),
    "zero_nans": Works(lambda: optax.chain(optax.zero_nans(), optax.adam(LR)), "2 r n", ADAM),
    "normalize_by_update_norm": Works(
        lambda: optax.chain(optax.normalize_by_update_norm(), optax.sgd(LR)), "0", symmetry="turns"
    ),
    "contrib.normalize": Works(
        lambda: optax.chain(optax.contrib.normalize(), optax.sgd(LR)), "0", symmetry="turns"
    ),
    "contrib.reduce_on_plateau": Works(
        lambda: optax.chain(optax.adam(LR), optax.contrib.reduce_on_plateau(patience=2)),
        "2 r n",
        ADAM,
        extra_args={"value": 3.0},
    ),
    "contrib.split_real_and_imaginary": Works(
        lambda: optax.contrib.split_real_and_imaginary(optax.adam(LR)), "2 r n", ADAM
    ),
    "snapshot": Works(
        lambda: optax.chain(optax.snapshot("cores", lambda x: x), optax.adam(LR)),
        "3 r n",
        ADAM,
    ),
    "set_to_zero": Works(lambda: optax.set_to_zero(), "0", symmetry="turns"),
    "freeze": Works(
        lambda: optax.chain(
            optax.freeze({"up": False, "layers": False, "norm": True}), optax.adam(LR)
        ),
        "2 r n",
        ADAM,
    ),
}
INSIDE = OPTIMIZERS | VARIANTS


def last_two_axes(params):
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda x: numbers if x.ndim > 1 else None, params)


class Refused(NamedTuple):
    """An inner that `project` refuses, or that refuses cores.

    Attributes:
      make: builds it.
      match: what the error says.
      instead: what to do, for the reader of the page.
      when: "init", or "update" for the first one.
      error: its type.
      extra_args: of its update.
    """

    make: Callable[[], Any]
    match: str
    instead: str
    when: str = "init"
    error: type = ValueError
    extra_args: Mapping[str, Any] = NONE


READS = "not a number times the weight"
REMEMBERS = "its state would remember weights"
EVALUATES = "it evaluates the loss"
AFTER_BACK = "its trust ratio after `project_back()`"
AROUND_OURS = "around all stages, as `optax.lookahead(natgalore.natural_galore(...), ...)`"
NO_DISTANCE = "a learning rate, or `optax.contrib.mechanize` around"

REFUSED = {
    "adafactor, as it is": Refused(
        lambda: optax.adafactor(LR),
        r"multiply_by_parameter_scale=False",
        "`multiply_by_parameter_scale=False`",
    ),
    "fromage": Refused(lambda: optax.fromage(LR), READS, AFTER_BACK),
    "lamb": Refused(
        lambda: optax.lamb(LR),
        READS,
        "`scale_by_adam()`, `project_back()`, `optax.scale_by_trust_ratio()`",
    ),
    "lars": Refused(lambda: optax.lars(LR), REMEMBERS, AFTER_BACK),
    "lbfgs": Refused(
        lambda: optax.lbfgs(LR),
        EVALUATES,
        "a line search after `project_back()`; its curvature needs a fixed subspace",
        extra_args={"value": 1.0},
    ),
    "novograd, weight_decay": Refused(
        lambda: optax.novograd(LR, weight_decay=0.1),
        REMEMBERS,
        "`optax.add_decayed_weights` after it",
    ),
    "lookahead": Refused(
        lambda: optax.lookahead(optax.adam(LR), 5, 0.5),
        r"natgalore\.project: this is from its `inner`",
        AROUND_OURS,
        error=AttributeError,
    ),
    "contrib.cocob": Refused(lambda: optax.contrib.cocob(), REMEMBERS, NO_DISTANCE),
    "contrib.dadapt_adamw": Refused(
        lambda: optax.contrib.dadapt_adamw(), r"DAdaptAdamWState", NO_DISTANCE, error=TypeError
    ),
    "contrib.dog": Refused(lambda: optax.contrib.dog(), REMEMBERS, NO_DISTANCE),
    "contrib.dowg": Refused(lambda: optax.contrib.dowg(), REMEMBERS, NO_DISTANCE),
    "contrib.dpsgd": Refused(
        lambda: optax.contrib.dpsgd(LR, 1.0, 0.1, 0),
        r"batch dimension",
        "`optax.contrib.differentially_private_aggregate` in front of `project`",
        when="update",
    ),
    "contrib.galore": Refused(
        lambda: optax.contrib.galore(LR, rank=2),
        r"must have the shape",
        "it is a projection of its own",
        error=TypeError,
    ),
    "contrib.madgrad": Refused(lambda: optax.contrib.madgrad(LR), REMEMBERS, "`optax.adagrad`"),
    "contrib.momo": Refused(lambda: optax.contrib.momo(), REMEMBERS, NO_DISTANCE),
    "contrib.momo_adam": Refused(lambda: optax.contrib.momo_adam(), REMEMBERS, NO_DISTANCE),
    "contrib.prodigy": Refused(lambda: optax.contrib.prodigy(), REMEMBERS, NO_DISTANCE),
    "contrib.mechanize": Refused(
        lambda: optax.contrib.mechanize(optax.sgd(1.0)), REMEMBERS, AROUND_OURS
    ),
    "contrib.sam": Refused(
        lambda: optax.contrib.sam(optax.adam(LR), optax.sgd(0.1)),
        REMEMBERS,
        AROUND_OURS,
    ),
    "contrib.sam, opaque": Refused(
        lambda: optax.contrib.sam(optax.adam(LR), optax.sgd(0.1), opaque_mode=True),
        EVALUATES,
        AROUND_OURS,
    ),
    "contrib.schedule_free": Refused(
        lambda: optax.contrib.schedule_free(optax.sgd(LR), LR),
        REMEMBERS,
        AROUND_OURS,
    ),
    "contrib.schedule_free_adamw": Refused(
        lambda: optax.contrib.schedule_free_adamw(LR),
        REMEMBERS,
        AROUND_OURS,
    ),
    "contrib.schedule_free_sgd": Refused(
        lambda: optax.contrib.schedule_free_sgd(LR), REMEMBERS, AROUND_OURS
    ),
    "contrib.sophia": Refused(
        lambda: optax.contrib.sophia(LR), EVALUATES, "`optax.lion` or `optax.adam`"
    ),
    "adaptive_grad_clip": Refused(
        lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.adam(LR)),
        REMEMBERS,
        "in front of `project`",
    ),
    "clipping after decay": Refused(
        lambda: optax.chain(optax.adamw(LR), optax.clip(0.1)), READS, "clip before decay"
    ),
    "coupled weight decay (L2)": Refused(
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam()),
        REMEMBERS,
        "`optax.adamw`, or L2 in the loss",
    ),
    "flatten": Refused(
        lambda: optax.flatten(optax.adam(LR)),
        r"packs cores of several leaves in one array",
        "leave it out",
        error=TypeError,
    ),
    "keep_params_nonnegative": Refused(
        lambda: optax.chain(optax.adam(LR), optax.keep_params_nonnegative()),
        READS,
        "after `project_back()`",
    ),
    "scale_by_param_block_norm": Refused(
        lambda: optax.scale_by_param_block_norm(), READS, "after `project_back()`"
    ),
    "scale_by_param_block_rms": Refused(
        lambda: optax.scale_by_param_block_rms(), READS, "after `project_back()`"
    ),
    "scale_by_trust_ratio": Refused(
        lambda: optax.scale_by_trust_ratio(), READS, "after `project_back()`"
    ),
    "scale_by_distance_over_gradients": Refused(
        lambda: optax.scale_by_distance_over_gradients(), REMEMBERS, NO_DISTANCE
    ),
    "scale_by_backtracking_linesearch": Refused(
        lambda: optax.scale_by_backtracking_linesearch(5), EVALUATES, "after `project_back()`"
    ),
    "scale_by_zoom_linesearch": Refused(
        lambda: optax.scale_by_zoom_linesearch(5), EVALUATES, "after `project_back()`"
    ),
}


class Around(NamedTuple):
    """What goes around an optimizer of ours, or before or after it."""

    make: Callable[[optax.GradientTransformation], Any]
    note: str = ""
    extra_args: tuple[str, ...] = ()


def stages(before=(), after=()):
    return natgalore.chain(
        *before,
        natgalore.project(4),
        natgalore.scale_by_core_fisher(),
        optax.scale_by_adam(),
        natgalore.project_back(),
        *after,
    )


AROUND = {
    "apply_if_finite": Around(lambda tx: optax.apply_if_finite(tx, 3)),
    "conditionally_transform": Around(
        lambda tx: optax.conditionally_transform(tx, lambda step, *_, **__: step >= 0)
    ),
    "flatten": Around(
        lambda tx: optax.flatten(tx), "one vector, so nothing is projected, with a warning"
    ),
    "inject_hyperparams": Around(
        lambda tx: optax.inject_hyperparams(
            natgalore.natural_galore, static_args=natgalore.STATIC_ARGS["natural_galore"]
        )(0.1, 4),
        "with `static_args=natgalore.STATIC_ARGS[...]`, for bfloat16 params also "
        "`hyperparam_dtype=jnp.float32`",
    ),
    "lookahead": Around(lambda tx: optax.lookahead(tx, 5, 0.5)),
    "masked": Around(lambda tx: optax.masked(tx, {"up": True, "norm": True})),
    "MultiSteps": Around(
        lambda tx: optax.MultiSteps(tx, 2),
        "updates on each of k micro-steps, so a refresh costs k; inside, it accumulates cores",
    ),
    "named_chain": Around(lambda tx: optax.named_chain(("ours", tx))),
    "partition": Around(
        lambda tx: optax.partition({"a": tx, "b": optax.adam(0.1)}, {"up": "a", "norm": "b"})
    ),
    "contrib.mechanize": Around(lambda tx: optax.contrib.mechanize(tx, weight_decay=0.0)),
    "contrib.sam": Around(
        lambda tx: optax.contrib.sam(tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.01)))
    ),
    "contrib.schedule_free": Around(
        lambda tx: optax.contrib.schedule_free(natgalore.natural_galore(0.1, 4, b1=0.0), 0.1)
    ),
    "contrib.reduce_on_plateau": Around(
        lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()), extra_args=("value",)
    ),
    "adaptive_grad_clip": Around(
        lambda tx: optax.chain(optax.adaptive_grad_clip(1.0), tx), "in front"
    ),
    "scale_by_trust_ratio": Around(
        lambda tx: stages(after=[optax.scale_by_trust_ratio(), optax.scale(-0.1)]),
        "after `project_back()`, LAMB on the projected update",
    ),
    "scale_by_backtracking_linesearch": Around(
        lambda tx: stages(after=[optax.scale(-1.0), optax.scale_by_backtracking_linesearch(15)]),
        "after `project_back()`",
        ("value", "grad", "value_fn"),
    ),
}

# Stages and helpers that have no line of their own, by the lines that test them.
PARTS = {
    "GradientTransformation": "",
    "GradientTransformationExtraArgs": "",
    "add_decayed_weights": "adamw",
    "apply_updates": "",
    "chain": "clip",
    "identity": "sgd",
    "init_empty_state": "",
    "inject_stateful_hyperparams": "inject_hyperparams",
    "measure_with_ema": "snapshot",
    "monitor": "snapshot",
    "multi_transform": "partition",
    "optimistic_adam": "optimistic_adam_v2",
    "scale": "ema",
    "scale_by_adadelta": "adadelta",
    "scale_by_adam": "adam",
    "scale_by_adamax": "adamax",
    "scale_by_adan": "adan",
    "scale_by_amsgrad": "amsgrad",
    "scale_by_belief": "adabelief",
    "scale_by_factored_rms": "adafactor",
    "scale_by_lbfgs": "lbfgs",
    "scale_by_learning_rate": "adam",
    "scale_by_lion": "lion",
    "scale_by_novograd": "novograd",
    "scale_by_optimistic_gradient": "optimistic_adam_v2",
    "scale_by_polyak": "polyak_sgd",
    "scale_by_radam": "radam",
    "scale_by_rms": "rmsprop",
    "scale_by_rprop": "rprop",
    "scale_by_rss": "adagrad",
    "scale_by_schedule": "adam",
    "scale_by_sign": "sign_sgd",
    "scale_by_sm3": "sm3",
    "scale_by_stddev": "rmsprop, centred with momentum",
    "scale_by_yogi": "yogi",
    "selective_transform": "freeze",
    "stateless": "",
    "stateless_with_tree_map": "",
    "trace": "sgd, momentum",
    "with_extra_args_support": "",
    "contrib.differentially_private_aggregate": "contrib.dpsgd",
    "contrib.hutchinson_estimator_diag_hessian": "contrib.sophia",
    "contrib.scale_by_acprop": "contrib.acprop",
    "contrib.scale_by_ademamix": "contrib.ademamix",
    "contrib.scale_by_adopt": "contrib.adopt",
    "contrib.scale_by_cocob": "contrib.cocob",
    "contrib.scale_by_galore": "contrib.galore",
    "contrib.scale_by_madgrad": "contrib.madgrad",
    "contrib.scale_by_muon": "contrib.muon",
    "contrib.scale_by_simplified_ademamix": "contrib.simplified_ademamix",
}


def page() -> str:
    """docs/partners.md."""
    return PROSE.format(
        inside=table(
            ("state of a core", "optimizers"),
            sorted(grouped(OPTIMIZERS, "state"), key=lambda row: numbers(row[0], r=4, n=20)),
        ),
        notes="".join(
            f"- `{name}`: {line.note}.\n" for name, line in OPTIMIZERS.items() if line.note
        ),
        stages=", ".join(f"`{name}`" for name in sorted(VARIANTS) if name in vars(optax)),
        refused=table(("instead", "refused"), grouped(REFUSED, "instead")),
        late=", ".join(f"`{k}`" for k, line in REFUSED.items() if line.when == "update"),
        ruleless=", ".join(f"`{k}`" for k, line in REFUSED.items() if line.error is TypeError),
        around=", ".join(f"`{k}`" for k, line in AROUND.items() if not line.note),
        noted="".join(f"- `{k}`: {line.note}.\n" for k, line in AROUND.items() if line.note),
    )


def numbers(state: str, r: int, n: int) -> int:
    """`2 r n + n` and the like, in numbers."""
    return eval("+".join("*".join(term.split()) for term in state.split("+")), {"r": r, "n": n})


def grouped(lines: dict[str, Any], field: str) -> list[tuple[str, str]]:
    """The names of the lines that have each value of a field."""
    groups: dict[str, list[str]] = {}
    for name, line in lines.items():
        alias, *rest = name.split(", ")
        shown = name if " " in alias else ", ".join([f"`{alias}`", *rest])
        groups.setdefault(getattr(line, field), []).append(shown)
    return [(value, "; ".join(names)) for value, names in groups.items()]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---",) * len(head)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


PROSE = """\
# Optax's optimizers with natgalore

Optimizers of Optax 0.2.8 as `inner` of `natgalore.project`, or between `project(...)` and \
`project_back()` of a `natgalore.chain`. [A test](../tests/integration/test_partners.py) covers \
every name; `python -m tests.helpers.partners` writes this page.

## Inside

Numbers of state per core, r x n, or r x r with both sides projected; the basis adds m r. At a \
refresh `transport="rotate"` transforms the state, exactly for a change of signs or order of the \
directions except with `noisy_sgd`, `rprop` and `sm3`. `transport="keep"` leaves it unchanged.

{inside}
{notes}
Also: {stages}. Norms are those of the cores. Decoupled weight decay, as in `optax.adamw`, acts on \
the whole weight.

## Refused

These optimizers read the weights, or have state without a transport rule. {ruleless} lack only a \
rule: they run with `transport="keep"`. The error comes at `init`, at the first update for {late} \
and for an inner with required extra arguments other than Optax's `value`, `grad`, `value_fn`, \
`obj_fn` and `grad_fn`.

{refused}
## Around

Without conditions: {around}.

{noted}"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
