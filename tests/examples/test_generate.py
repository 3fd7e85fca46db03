"""generate.py: key-value cache, sampling, streaming, command line."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.common import kv_cache, llama, sample
from examples.finetuning import tiny_assets
from examples.pretraining import generate, pretrain, settings
from tests.helpers.cases import slow
from tests.helpers.example_runs import refused


SMALL = llama.LlamaConfig(
    hidden=16, intermediate=44, heads=4, layers=2, vocabulary=50, kv_heads=2, theta=100.0
)


def model(config):
    return llama.Llama(config, nnx.Rngs(0))


class TestCache:
    @pytest.mark.slow
    @pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
    def test_cached_logits_equal_recomputed_logits(self, scan):
        net = model(replace(SMALL, scan=scan))
        tokens = np.random.default_rng(0).integers(50, size=(2, 9)).astype(np.int32)
        whole = jax.jit(lambda tokens: net(tokens))(tokens)
        extend = jax.jit(lambda tokens, past, start: kv_cache.extend(net, tokens, past, start))
        past, logits = kv_cache.empty(net.config, 2, 12), []
        for start, end in ((0, 5), (5, 6), (6, 9)):
            new, past = extend(tokens[:, start:end], past, jnp.int32(start))
            logits.append(new)
        # The same sums in another order.
        np.testing.assert_allclose(np.concatenate(logits, axis=1), whole, atol=1e-6, rtol=1e-5)
        assert past.keys.shape == (2, 2, 12, 2, 4)
        assert not np.any(past.keys[:, :, 9:])
        assert np.all(np.any(past.values[:, :, :9] != 0, axis=(-1, -2)))


recomputed = nnx.jit(lambda net, tokens: net(tokens))


def greedy(net, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, without a cache."""
    tokens = np.zeros((1, 16), np.int32)  # causal: later zeros have no effect
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + count):
        tokens[0, i] = recomputed(net, tokens)[0, i - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


def written(net, prompt, count, temperature=0.0, seed=0, end=None) -> list[int]:
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    return list(
        generate.generate(
            net.config,
            params,
            prompt,
            count=count,
            temperature=temperature,
            seed=seed,
            end=end,
        )
    )


class TestGenerate:
    @pytest.mark.parametrize(
        "prompt",
        [[7], *slow([1, 2, 3, 4], [9, 8, 7, 6, 5], [3, 41, 7], [31, 4, 15, 9, 26])],
    )
    def test_greedy_tokens_equal_those_without_a_cache(self, prompt):
        net = model(SMALL)
        net.head.kernel[...] = net.head.kernel[...] * 100  # no near ties
        expected = greedy(net, prompt, 6)
        assert written(net, prompt, 6) == expected
        assert len(set(expected)) > 1
        assert written(net, prompt, 6, end=expected[2]) == expected[: expected.index(expected[2])]

    def test_batch_equals_its_rows_alone(self, monkeypatch):
        drawn, continued = [], generate.continued
        keep = lambda *arguments: drawn.append(continued(*arguments)) or drawn[-1]
        monkeypatch.setattr(generate, "continued", keep)
        net = model(replace(SMALL, scan=True))
        net.head.kernel[...] = net.head.kernel[...] * 100  # no near ties
        params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
        prompts = [[1, 2, 3, 4, 5], [7], [3, 41, 7], [9, 8], [31, 4, 15, 9, 26, 5, 35]]
        together = partial(
            generate.generate_batches, net.config, params, prompts, count=6, batch_size=3
        )
        expected = [greedy(net, prompt, 6) for prompt in prompts]
        assert together(end=50) == expected  # never drawn
        assert len({tuple(tokens) for tokens in expected}) == len(prompts)
        end = expected[0][2]
        cut = lambda tokens: tokens[: tokens.index(end)] if end in tokens else tokens
        assert together(end=end) == [cut(tokens) for tokens in expected]
        rows = np.concatenate(drawn[2:])
        assert np.all(rows[np.cumsum(rows == end, axis=1) > 0] == end)  # filled up

    def test_draws_follow_the_softmax(self):
        logits = jnp.array([0.0, 1.0, 3.0])
        keys = jax.random.split(jax.random.key(0), 4000)
        drawn = jax.vmap(generate.draw, (None, None, 0))(logits, jnp.float32(2.0), keys)
        shares = np.bincount(drawn, minlength=3) / 4000
        # Standard deviation of a share is at most 0.008.
        np.testing.assert_allclose(shares, jax.nn.softmax(logits / 2), atol=0.03)
        assert generate.draw(logits, jnp.float32(0.0), keys[0]) == 2
        net = model(SMALL)
        seeds = [written(net, [1], 8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
        assert seeds[0] == seeds[1] != seeds[2]


def test_streamed_characters_are_complete():
    letters = "aé日\xff𝄞!".encode() + b"\xe6\x97"
    writer = generate.Writer(SMALL, None, list, lambda tokens: sample.printable(bytes(tokens)))
    parts = list(generate.stream_text(writer, list(letters[:1]), iter(letters[1:])))
    assert "".join(parts) == sample.printable(letters)
    assert len([part for part in parts if part]) > 4


@pytest.fixture
def call(monkeypatch, small):
    """Runs the command line of an example in a temporary folder; returns the exit status."""

    def call(example, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *arguments])
        try:
            example.main()
        except SystemExit as end:
            return end.code
        return 0

    return call


class TestCommandLine:
    @pytest.mark.slow
    def test_generates_from_a_pretraining_run(self, call, capsys, monkeypatch):
        Path("text").write_text("To be, or not to be, that is the question.\n" * 50)
        monkeypatch.setattr(pretrain, "SAMPLE_TOKENS", 1)
        given = "--text text --steps 2 --batch-size 2 --seq-len 16 --optimizer adamw --out here"
        assert call(pretrain, *given.split()) == 0
        capsys.readouterr()
        assert call(generate, "here", "--prompt", "To be", "--tokens", "9") == 0
        text = capsys.readouterr().out
        assert text.startswith("To be")
        writer = generate.read(Path("here"))
        tokens = generate.generate(
            writer.config, writer.params, list(b"To be"), count=9, temperature=0.8, seed=0
        )
        assert text == writer.decode(list(b"To be") + list(tokens)) + "\n"

    def test_generates_from_a_hugging_face_checkpoint(self, call, capsys):
        tokenizer = tiny_assets.train_tokenizer(["def of a def in the of the de"] * 9, 300)
        tiny_assets.save_llama(Path("run/model"), tokenizer)
        for folder in ("run", "run/model"):  # output of fine-tuning; Hugging Face's format
            assert call(generate, folder, "--prompt", "def in", "--tokens", "7") == 0
        one, other = capsys.readouterr().out.split("def in")[1:]
        assert one == other
        assert len(one) > 5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("nowhere", "nowhere has neither a run (log.jsonl) nor a model (config.json)"),
            (". --tokens 0", "--tokens must be at least 1"),
            (". --temperature -1", "--temperature must not be negative"),
            (". --prompt=", "--prompt must not be empty"),
            ("many", "many is a comparison: choose one of its folders adamw,galore"),
            ("one", "one has no checkpoint"),
            ("bad", "bad/log.jsonl is damaged"),
        ],
    )
    def test_invalid_input_gives_one_line(self, call, capsys, arguments, message):
        for name, compare in (("many", "adamw,galore"), ("one", None)):
            Path(name).mkdir()
            line = {"config": settings.Config(compare=compare).saved(), "data": {}}
            Path(name, "log.jsonl").write_text(json.dumps(line))
        Path("bad").mkdir()
        Path("bad/log.jsonl").write_text("{}\n")
        assert call(generate, *arguments.split()) == 2
        assert message in refused(capsys)
