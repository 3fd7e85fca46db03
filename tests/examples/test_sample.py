"""Text sampled with a sliding window."""

import numpy as np
import pytest

from examples.common import sample
from tests.examples.test_llama import SMALL, Net


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(SMALL)


@pytest.fixture(scope="module")
def params(net):
    return net.init()


class TestSample:
    @pytest.mark.slow
    @pytest.mark.parametrize("given", [3, 8, 11], ids="{} bytes".format)
    def test_cold_sample_is_the_argmax_of_the_window(self, net, params, given):
        prompt = bytes(range(given))
        # So cold that the likeliest token is drawn each time.
        written = sample.generate(
            SMALL, params, prompt, count=9, length=8, seed=0, temperature=1e-6
        )
        text = prompt
        for _ in range(9):
            seen = np.frombuffer(text[-8:], np.uint8).astype(np.int32)
            text += bytes([int(net.logits(params, seen[None])[0, -1].argmax())])
        assert bytes(written) == text[given:]

    def test_sample_depends_on_the_seed_only(self, params):
        def written(seed):
            return sample.generate(SMALL, params, b"!", count=30, length=8, seed=seed)

        assert written(0) == written(0) != written(1)
        assert len(set(written(0))) > 5

    def test_control_characters_are_escaped(self):
        escaped = sample.printable(b"a\tb\nc\r\x00\xe2\x80\xae\xc2\x9b")
        assert escaped == "a\tb\nc\\r\\x00\\u202e\\x9b"
        assert sample.printable("naïve 日本".encode()) == "naïve 日本"
