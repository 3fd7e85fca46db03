"""Plants faults, one at a time, and reports which test fails: a nightly tool.

    make mutants                         all faults; writes docs/mutants.md
    make mutants ARGS="transport gate"   faults with one of these words in their name or module

Each fault replaces text in a copy of the repository. If all quick tests pass there, the fault has
survived, and a test is missing. Verdicts are appended to runs/mutants.jsonl as they come, and a
second run continues; `--again` starts over. The faults quote source text, so a change of such a
line changes its fault here too.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "mutants.md"
VERDICTS = ROOT / "runs" / "mutants.jsonl"
TIMEOUT = 1800  # seconds of one run of pytest; a fault may make a loop endless


class Mutant(NamedTuple):
    """A fault: in `module`, the text `old`, which occurs once, becomes `new`.

    Attributes:
        module: path in natgalore_jax/, or from examples/ or benchmarks/ on.
        name: what is wrong.
    """

    module: str
    name: str
    old: str
    new: str

    @property
    def file(self) -> str:
        outside = self.module.startswith(("examples/", "benchmarks/"))
        return f"{self.module}.py" if outside else f"natgalore_jax/{self.module}.py"

    @property
    def label(self) -> str:
        return f"{self.module}: {self.name}"


MUTANTS = [
    Mutant(
        "subspace/basis",
        "power step without the gradient",
        "from_product(gram_product(G, P), P)",
        "P",
    ),
    Mutant("subspace/basis", "no shift towards the old basis", "SHIFT = 1e-6", "SHIFT = 0.0"),
    Mutant(
        "subspace/basis",
        "trailing singular vectors",
        "full_matrices=False)[0][:, : P.shape[-1]]",
        "full_matrices=False)[0][:, -P.shape[-1] :]",
    ),
    Mutant(
        "subspace/basis",
        "P and Q from one key",
        "for part in (side, index, times)",
        "for part in (index, times)",
    ),
    Mutant(
        "subspace/refresh",
        "refresh one step late",
        "(count % self.every == phases)",
        "((count + 1) % self.every == phases)",
    ),
    Mutant(
        "subspace/refresh",
        "core on the old basis",
        "else to_core(G, *bases)",
        "else to_core(G, *olds)",
    ),
    Mutant("subspace/refresh", "C transposed", "matmul(new.mT, P) for", "matmul(P.mT, new) for"),
    Mutant(
        "subspace/refresh",
        "states rotated by an unusable gradient",
        "jnp.where(usable, x, old) for x",
        "x for x",
    ),
    Mutant(
        "subspace/refresh",
        "one key for all refreshes",
        "index, refreshed + 1, side",
        "index, 1, side",
    ),
    Mutant(
        "subspace/refresh_loop",
        "one index for all matrices of a stack",
        "_cut(spec, layout, G, i), order[i]",
        "_cut(spec, layout, G, i), order[0]",
    ),
    Mutant(
        "subspace/transport",
        "lost energy not replaced",
        "state_product(squares, v) + lost * v.mean",
        "state_product(squares, v) + 0 * v.mean",
    ),
    Mutant(
        "subspace/transport",
        "squares rotated as momentum",
        "return state_product(squares, v)",
        "return state_product(C, v)",
    ),
    Mutant(
        "subspace/transport",
        "Gram matrix of the old cores",
        "x = gram(rotated[-1].astype(x.dtype))",
        "pass",
    ),
    Mutant(
        "subspace/transport",
        "Fisher rotated on one side",
        "matmul(matmul(C, x), C.mT)",
        "matmul(C, x)",
    ),
    Mutant("subspace/transport", "D transposed", "D[0].mT) if D", "D[0]) if D"),
    Mutant(
        "subspace/refresh_loop",
        "first due matrix refreshed again",
        "jnp.argmax(due & (places > i))",
        "jnp.argmax(due)",
    ),
    Mutant(
        "subspace/residual",
        "float16 without units",
        "R = (R / unit).astype(jnp.float16)",
        "R = R.astype(jnp.float16)",
    ),
    Mutant(
        "subspace/residual",
        "mean over all coordinates",
        "(G.shape[a] for a in axes) - math.prod(",
        "(G.shape[a] for a in axes) or math.prod(",
    ),
    Mutant(
        "subspace/residual",
        "phi of the opposite sign",
        "U - phi * R, phi * G, None",
        "U + phi * R, -phi * G, None",
    ),
    Mutant(
        "subspace/residual",
        "polar factor without damping",
        "polar(X, DAMPING * jnp.square(of_G / unit))",
        "polar(X)",
    ),
    Mutant("subspace/residual", "size without damping", " + DAMPING * jnp.square(of_G / unit)", ""),
    Mutant(
        "subspace/learning_rate_check",
        "negative answer accepted",
        "np.vdot(R.value, answers[-1]) < 0",
        "False",
    ),
    Mutant(
        "subspace/weight_decay",
        "memory of weights from init accepted",
        "inputs[place] |= bits & (WEIGHT | READ)",
        "pass",
    ),
    Mutant(
        "subspace/projection",
        "nonfinite cores reach inner",
        "store(zero_where_not(x.finite, x.R), ",
        "store(x.R, ",
    ),
    Mutant(
        "subspace/projection",
        "answers to nonfinite gradients not masked",
        "U = zero_where_not(finite, U)",
        "pass",
    ),
    Mutant(
        "subspace/projection",
        "old basis at the lift",
        "bases[i] = expand_bases(specs[i].unnamed, dtypes[i], x.stored)",
        "pass",
    ),
    Mutant(
        "subspace/projection",
        "residual not scaled",
        "+ spec.from_view(S)",
        "+ spec.from_view(S) / scale",
    ),
    Mutant(
        "subspace/projection",
        "decay doubled",
        "finite_part(spec, finite, a * W",
        "finite_part(spec, finite, 2 * a * W",
    ),
    Mutant(
        "subspace/projection",
        "refresh_bases=False ignored",
        "if full and refresh_bases is not False:",
        "if full:",
    ),
    Mutant(
        "subspace/projection",
        "refresh_bases=True ignored",
        "            if refresh_bases\n",
        "            if not full\n",
    ),
    Mutant(
        "subspace/engine",
        "count not incremented",
        "count=optax.safe_increment(state.count)",
        "count=state.count",
    ),
    Mutant("subspace/engine", "state of another rank accepted", "        check_fits(state)\n", ""),
    Mutant(
        "subspace/engine",
        "gradients of another tree accepted",
        "        check_tree(updates, state)\n",
        "",
    ),
    Mutant("fisher/window", "slot off by one", "slot = count % size", "slot = (count + 1) % size"),
    Mutant(
        "fisher/window",
        "row of the Gram matrix not replaced",
        "gram = jnp.where(here[..., :, None], row[..., None, :], gram)",
        "pass",
    ),
    Mutant("fisher/window", "damping by the sum of the squares", "1.0) / filled", "1.0)"),
    Mutant(
        "fisher/window",
        "zero core takes a slot",
        "count + accepted.astype(count.dtype)",
        "count + 1",
    ),
    Mutant(
        "fisher/core",
        "no bias correction",
        "fisher / jnp.where(known, weight, 1.0)[..., None, None]",
        "fisher",
    ),
    Mutant(
        "fisher/core",
        "damping by the trace",
        "trace(L, axis1=-2, axis2=-1) / r",
        "trace(L, axis1=-2, axis2=-1)",
    ),
    Mutant(
        "util/orthonormalise", "QR without its reflections", "(state[2] <= 4)", "(state[2] < 4)"
    ),
    Mutant(
        "util/orthonormalise",
        "QR without sign convention",
        "< 0, -1.0, 1.0).astype(Q.dtype)",
        "< 0, 1.0, 1.0).astype(Q.dtype)",
    ),
    Mutant(
        "util/linalg",
        "largest entry hides NaN",
        "return lax.bitcast_convert_type(bits.max(axis=axes), X.dtype)",
        "return jnp.nanmax(jnp.abs(X), axis=axes)",
    ),
    Mutant(
        "util/linalg",
        "columns of two blocks counted twice",
        "jnp.where(first + columns < j * width, 0, block)",
        "block",
    ),
    Mutant(
        "util/orthonormalise",
        "panels without sign convention",
        "jnp.where(diagonal < 0, -1.0, 1.0)",
        "jnp.where(diagonal < 0, 1.0, 1.0)",
    ),
    Mutant(
        "sharding/distributed",
        "layers first in the leaf",
        "jnp.moveaxis(stack, 0, place)",
        "stack",
    ),
    Mutant(
        "sharding/distributed",
        "overlapping groups of layers",
        "dynamic_slice_in_dim(x, i * at_once, at_once, at)",
        "dynamic_slice_in_dim(x, i, at_once, at)",
    ),
    Mutant(
        "sharding/distributed",
        "repeated layers in place of the last",
        "[parts[0], parts[2]]",
        "parts[:2]",
    ),
    Mutant(
        "sharding/distributed",
        "divided layers one by one",
        " or entries[spec.batch[0]] or not known",
        " or not known",
    ),
    Mutant("util/control_flow", "default branch on ROCm", '"rocm": gpu', '"rocm": None'),
    Mutant("util/orthogonalize", "no ridge", "(trace + ridge) * ratio", "trace * ratio"),
    Mutant(
        "util/orthogonalize",
        "Frobenius norm in place of the Schatten norm",
        "square = (trace + ridge) * ratio",
        "square = trace + ridge",
    ),
    Mutant(
        "util/orthogonalize",
        "Gram form not divided by the norm",
        "jnp.where(i == last, s, 1.0)",
        "1.0",
    ),
    Mutant(
        "util/orthogonalize",
        "bfloat16 on GPUs",
        "gpu = functools.partial(own, dtype=jnp.float16)",
        "gpu = functools.partial(own, dtype=jnp.bfloat16)",
    ),
    Mutant(
        "util/orthogonalize",
        "result rounded to float16",
        "return jnp.matmul(Q, X, preferred_element_type=wide)",
        "return (Q @ X).astype(wide)",
    ),
    Mutant(
        "selection/select",
        "long side in place of the short side",
        '"short": spec.m > spec.n',
        '"short": spec.m < spec.n',
    ),
    Mutant(
        "sharding/partitioning",
        "basis sharded as the other side",
        'sides = {"m": rows, "n": cols,',
        'sides = {"m": cols, "n": cols,',
    ),
    Mutant(
        "sharding/partitioning",
        "state replicated along the other side's axes",
        "    return add_axes(partition, names, shape, leaf.mesh, len(spec.batch), alone)\n",
        "    return partition\n",
    ),
    Mutant(
        "sharding/partitioning",
        "cores multiplied as they are stored",
        "    return _constrain(x, aligned_partition(role, spec, leaf), leaf)\n",
        "    return x\n",
    ),
    Mutant(
        "sharding/boxed_state",
        "names that may not divide kept",
        "    sizes = {name: math.gcd(size, devices) for",
        "    sizes = {name: 1 for",
    ),
    Mutant(
        "subspace/refresh",
        "matrices refreshed with another instance's under vmap",
        "        usable &= due\n",
        "",
    ),
    Mutant(
        "quantization/dynamic_8bit",
        "squares encoded without their root",
        "code.nearest(jnp.sqrt(y) if code.squares else y)",
        "code.nearest(y)",
    ),
    Mutant("quantization/quantized", "one key for all arrays", "jax.random.fold_in(key, i)", "key"),
    Mutant(
        "quantization/stochastic_rounding",
        "half of the noise",
        "jnp.uint16).astype(jnp.uint32)",
        "jnp.uint8).astype(jnp.uint32)",
    ),
    Mutant(
        "lowrank_grads/loss", "sum over micro-batches in place of the mean", "(t / number)", "t"
    ),
    Mutant(
        "lowrank_grads/refresh", "products without D", "x.value.mT * D[x.spec.path]", "x.value.mT"
    ),
    Mutant(
        "lowrank_grads/interpreter",
        "reverse scan run forwards",
        '("length", "reverse", "unroll")',
        '("length", "unroll")',
    ),
    Mutant(
        "examples/common/roberta",
        "gradients of embeddings in bfloat16",
        "embedding_init=init, rngs=rngs",
        "embedding_init=init, dtype=config.dtype, rngs=rngs",
    ),
    Mutant(
        "examples/common/roberta",
        "one dropout for all layers",
        "jax.random.split(rngs.dropout(), self.config.layers)",
        "jnp.repeat(rngs.dropout()[None], self.config.layers)",
    ),
    Mutant(
        "examples/common/bert",
        "separator in the second segment",
        "axis=1) - is_separator",
        "axis=1)",
    ),
    Mutant(
        "examples/finetuning/settings",
        "classifier at the rate of the encoder",
        '"head" if name == "classifier" else "rest"',
        '"rest"',
    ),
    Mutant(
        "examples/finetuning/training",
        "one order of records in all epochs",
        "default_rng((seed, epoch))",
        "default_rng(seed)",
    ),
    Mutant(
        "examples/finetuning/finetune_text",
        "last weights in place of the best",
        "if score > self.score:",
        "if True:",
    ),
    Mutant(
        "benchmarks/learning/bench_finetune_text",
        "classifier at the searched rate",
        'head if name == "classifier" else state.peak',
        "state.peak",
    ),
    Mutant(
        "benchmarks/learning/bench_finetune_text",
        "rate chosen after the first epoch",
        'np.mean([run["validation"][-1]',
        'np.mean([run["validation"][0]',
    ),
]

FIRST = {  # test files in which a module's faults show soonest; all other quick tests follow
    "subspace/basis": ["subspace/test_basis", "integration/test_trajectory"],
    "subspace/refresh": [
        "integration/test_trajectory",
        "subspace/test_engine",
        "lowrank_grads/test_refresh",
        "sharding/test_state_shardings",
        "integration/test_vmap",
    ],
    "subspace/refresh_loop": ["subspace/test_refresh_loop", "integration/test_trajectory"],
    "subspace/transport": [
        "subspace/test_transport",
        "integration/test_trajectory",
        "integration/test_partners",
    ],
    "subspace/residual": ["subspace/test_residual", "integration/test_trajectory"],
    "subspace/learning_rate_check": ["subspace/test_residual"],
    "subspace/weight_decay": [
        "subspace/test_weight_decay",
        "integration/test_partners",
        "sharding/test_shard_map",
    ],
    "subspace/engine": [
        "integration/test_trajectory",
        "subspace/test_engine",
        "integration/test_flax",
        "sharding/test_state_shardings",
    ],
    "subspace/projection": [
        "integration/test_trajectory",
        "subspace/test_engine",
        "subspace/test_residual",
        "subspace/test_refresh",
        "quantization/test_quantized",
    ],
    "fisher/window": ["fisher/test_window", "fisher/test_both_forms"],
    "fisher/core": ["fisher/test_core", "fisher/test_both_forms"],
    "util/orthonormalise": ["util/test_orthonormalise", "subspace/test_basis"],
    "util/linalg": [
        "util/test_linalg",
        "subspace/test_basis",
        "fisher/test_window",
        "subspace/test_residual",
        "subspace/test_engine",
        "sharding/test_shard_map",
    ],
    "util/control_flow": ["util/test_control_flow", "util/test_orthogonalize"],
    "util/orthogonalize": ["util/test_orthogonalize"],
    "selection/select": ["selection/test_select"],
    "sharding/distributed": ["sharding/test_distributed"],
    "sharding/partitioning": ["sharding/test_state_shardings", "sharding/test_shard_map"],
    "sharding/boxed_state": ["sharding/test_boxed_state"],
    "quantization/dynamic_8bit": ["quantization/test_quantized"],
    "quantization/quantized": ["quantization/test_quantized", "quantization/test_quantized_roles"],
    "quantization/stochastic_rounding": ["quantization/test_stochastic_rounding"],
    "lowrank_grads/interpreter": [
        "lowrank_grads/test_interpreter",
        "lowrank_grads/test_primitive_rules",
        "lowrank_grads/test_explain",
    ],
    "lowrank_grads/loss": [
        "lowrank_grads/test_loss",
        "lowrank_grads/test_value_and_grad",
        "lowrank_grads/test_refresh",
    ],
    "lowrank_grads/refresh": ["lowrank_grads/test_refresh", "lowrank_grads/test_value_and_grad"],
    "examples/common/roberta": ["examples/test_pretrained"],
    "examples/common/bert": ["examples/test_pretrained"],
    "examples/finetuning/settings": ["examples/test_finetune_text"],
    "examples/finetuning/training": ["examples/test_finetune_glue"],
    "examples/finetuning/finetune_text": ["examples/test_finetune_text"],
    "benchmarks/learning/bench_finetune_text": ["benchmarks/test_finetune_text"],
}


def planted(mutant: Mutant, text: str) -> str:
    """The module's text with the fault in it."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.module}, {mutant.name}: {mutant.old!r} does not occur once")
    return text.replace(mutant.old, mutant.new)


def rounds(mutant: Mutant, known: list[str]) -> list[list[str]]:
    """What to run, in order: the tests known to fail, the files in FIRST, all other files."""
    first = [f"tests/{name}.py" for name in FIRST[mutant.module]]
    every = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    skipped = ("tests/examples/", "tests/docs/", "tests/benchmarks/", "tests/test_mutants")
    others = [name for name in every if name not in first and not name.startswith(skipped)]
    return [known, first, others] if known else [first, others]


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """The exit code of pytest, and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "not slow", "--tb=no"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    try:
        run = subprocess.run(
            [*command, "-p", "no:cacheprovider", *tests],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return 1, f"FAILED {tests[0]} (no end)"
    return run.returncode, run.stdout


def verdict(mutant: Mutant, known: list[str]) -> str:
    """The test that failed with the fault, or `survived`, or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("natgalore_jax", "tests", "examples", "docs", "benchmarks"):
            ignore = shutil.ignore_patterns("__pycache__", "runs")
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, folder)
        path = folder / mutant.file
        path.write_text(planted(mutant, path.read_text()))
        for tests in rounds(mutant, known):
            code, output = run_tests(folder, tests)
            if code == 1 and (failed := re.search(r"^FAILED (.+?)(?: - |$)", output, re.MULTILINE)):
                return failed[1]
            if code in (1, 2, 3):  # a fault that cannot be imported, say, which is no verdict
                return f"error: {output.strip().splitlines()[-1:]}"
    return "survived"


def recorded() -> dict[str, str]:
    """Earlier verdicts, by fault."""
    lines = VERDICTS.read_text().splitlines() if VERDICTS.exists() else []
    return {entry["fault"]: entry["verdict"] for entry in map(json.loads, lines)}


def tests_in_report() -> dict[str, list[str]]:
    """The tests that failed in the last report, by fault."""
    text = REPORT.read_text() if REPORT.exists() else ""
    rows = re.findall(r"^\| (\S+) \| (.*) \| `(tests/.*)` \|$", text, re.MULTILINE)
    return {f"{module}: {name}": [test] for module, name, test in rows}


def write_report(verdicts: dict[Mutant, str]) -> None:
    """Writes the table of docs/mutants.md."""
    survivors = sum(verdict == "survived" for verdict in verdicts.values())
    lines = [
        "# Planted faults",
        "",
        "Do the tests fail when the code is wrong? Each row is one fault, planted alone in a copy "
        "of the repository, and the first quick test that failed there. A fault without a failing "
        "test survives: a test is missing. A module is a path in `natgalore_jax/`, or from "
        "`examples/` or `benchmarks/` on; the changes are in [tests/mutants.py]"
        "(../tests/mutants.py). `make mutants` plants the faults again and "
        "writes this page.",
        "",
        f"Faults: {len(verdicts)}. Killed: {len(verdicts) - survivors}. Survived: {survivors}.",
        "",
        "| module | fault | killed by |",
        "|---|---|---|",
    ]
    for mutant, verdict in verdicts.items():
        killer = f"`{verdict.split('[')[0]}`" if verdict.startswith("tests/") else verdict
        lines.append(f"| {mutant.module} | {mutant.name} | {killer} |")
    REPORT.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only faults whose name or module has one of them")
    parser.add_argument("--jobs", type=int, default=2, help="faults at the same time")
    parser.add_argument("--again", action="store_true", help="also faults with a verdict in runs/")
    args = parser.parse_args()
    os.nice(10)
    chosen = [
        m for m in MUTANTS if not args.words or any(w in f"{m.module} {m.name}" for w in args.words)
    ]
    verdicts = {} if args.again else recorded()
    known = tests_in_report()
    VERDICTS.parent.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            pool.submit(verdict, mutant, known.get(mutant.label, [])): mutant
            for mutant in chosen
            if mutant.label not in verdicts
        }
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            label = futures[future].label
            verdicts[label] = future.result()
            with VERDICTS.open("a") as file:
                file.write(json.dumps({"fault": label, "verdict": verdicts[label]}) + "\n")
            print(f"{done}/{len(futures)}  {label}  {verdicts[label]}", flush=True)
    killers = sorted({verdicts[m.label] for m in chosen if verdicts[m.label].startswith("tests/")})
    code, output = run_tests(ROOT, killers) if killers else (0, "")
    if code:
        sys.exit(f"a test fails without a fault, so its verdicts are void:\n{output}")
    if not args.words:
        write_report({mutant: verdicts[mutant.label] for mutant in MUTANTS})
    remaining = [m.label for m in chosen if not verdicts[m.label].startswith("tests/")]
    sys.exit("not killed:\n" + "\n".join(remaining) if remaining else 0)


if __name__ == "__main__":
    main()
