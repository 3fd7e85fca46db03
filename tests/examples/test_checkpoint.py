"""Checkpoints: announcement of large ones, runs without any."""

from pathlib import Path

import jax
import pytest

from examples.common import checkpoint, command_line, llama
from examples.pretraining import pretrain, seven_billion


GB = 10**9


def bytes_of(size: float):
    return jax.ShapeDtypeStruct((int(size),), "uint8")


class TestDiskNotice:
    def config(self, save_every: int) -> command_line.Run:
        return command_line.Run(out=Path("runs/mine"), save_every=save_every)

    def test_large_checkpoint(self):
        notice = checkpoint.disk_notice(self.config(1000), bytes_of(15.2 * GB))
        assert notice.startswith("disk space: 15.2 GB per checkpoint in runs/mine/checkpoints")
        assert "every 1,000 steps" in notice
        assert "--save-every 0" in notice

    def test_large_export(self):
        notice = checkpoint.disk_notice(self.config(0), bytes_of(9 * GB), bytes_of(4.4 * GB))
        assert notice == "disk space: 4.4 GB of weights in runs/mine/model at the end"

    def test_sum_of_checkpoint_and_export_counts(self):
        parts = bytes_of(0.6 * GB), bytes_of(0.6 * GB)
        notice = checkpoint.disk_notice(self.config(9), *parts)
        assert "0.6 GB per checkpoint" in notice
        assert "0.6 GB of weights" in notice

    @pytest.mark.parametrize(("save_every", "size"), [(9, 0.9 * GB), (0, 90 * GB)])
    def test_no_notice(self, save_every, size):
        assert checkpoint.disk_notice(self.config(save_every), bytes_of(size)) is None

    @pytest.mark.slow
    def test_llama_7b_needs_15_gb(self):
        (config,) = seven_billion.Config(vocabulary=32_000, out=Path("runs/7b")).runs()
        state = jax.eval_shape(pretrain.make_functions(config).init, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(state.params)) == sum(
            x.size for x in jax.tree.leaves(llama.abstract_params(llama.CONFIGS["7b"]))
        )
        notice = checkpoint.disk_notice(config, state)
        assert notice.startswith("disk space: 15.1 GB per checkpoint in runs/7b/checkpoints")
