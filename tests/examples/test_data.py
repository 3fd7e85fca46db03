"""Byte-level text data: files, split, digest and batches."""

import string
from pathlib import Path

import numpy as np
import pytest

from examples.common import data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of 40 bytes, each of one letter, a hidden one, and one in a folder within."""
    for letter in string.ascii_lowercase:
        (tmp_path / f"{letter}.txt").write_text(letter * 40)
    (tmp_path / ".hidden").write_text("?" * 40)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "z.txt").write_text("Z" * 40)
    return tmp_path


class TestData:
    def test_files_of_a_folder_are_split(self, folder):
        corpus = data.load(folder)
        train, validation = set(corpus.train.tobytes()), set(corpus.validation.tobytes())
        assert validation == set(b"at")  # every 20th, from the first on
        assert train == set(string.ascii_lowercase.encode() + b"Z") - validation
        assert corpus.files == 27
        assert len(corpus.train) + len(corpus.validation) == 27 * 40

    def test_single_file_is_split_by_position(self, folder):
        (folder / "one").write_bytes(bytes(range(200)))
        corpus = data.load(folder / "one")
        assert corpus.train.tolist() == list(range(190))
        assert corpus.validation.tolist() == list(range(190, 200))

    def test_digest_depends_on_contents_and_names(self, folder):
        digests = {data.load(folder).sha256}
        (folder / "m.txt").write_text("M" * 40)
        digests.add(data.load(folder).sha256)
        (folder / "m.txt").rename(folder / "m2.txt")
        digests.add(data.load(folder).sha256)
        assert len(digests) == 3

    def test_default_text_is_the_standard_library(self):
        files = data.standard_library()
        assert len(files) > 300
        assert {file.suffix for file in files} == {".py"}
        assert {"argparse.py", "decoder.py"} <= {file.name for file in files}
        assert not any("site-packages" in file.parts or "test" in file.parts for file in files)

    def test_batch_depends_on_seed_and_step(self):
        tokens = np.arange(100, dtype=np.uint8)

        def batch(seed, step):
            return data.training_batch(tokens, 4, 10, seed=seed, step=step)

        np.testing.assert_array_equal(batch(0, 7), batch(0, 7))
        assert not np.array_equal(batch(0, 7), batch(0, 8))
        assert not np.array_equal(batch(0, 7), batch(1, 7))
        assert batch(0, 7).shape == (4, 10)
        np.testing.assert_array_equal(np.diff(batch(0, 7)), 1)

    def test_batches_reach_the_first_and_the_last_token(self):
        tokens = np.arange(12, dtype=np.uint8)
        seen = data.training_batch(tokens, 100, 10, seed=0, step=0)
        assert (seen.min(), seen.max()) == (0, 11)
        first, last = data.validation_batches(tokens, 2, 10, batches=2)
        assert (first.min(), last.max()) == (0, 11)

    def test_text_of_one_batch_is_long_enough(self):
        corpus = data.Corpus(np.zeros(20, np.uint8), np.zeros(10, np.uint8), 1, "")
        data.check_length(corpus, 2, 10)
        with pytest.raises(ValueError, match="20 bytes for training, but 22"):
            data.check_length(corpus, 2, 11)
        with pytest.raises(ValueError, match="9 bytes for validation, but 10"):
            data.check_length(corpus._replace(validation=np.zeros(9, np.uint8)), 2, 10)
