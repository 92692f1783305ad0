"""The shipped embedding model: the script makes exactly these bytes, and its vectors mean the little they can mean."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: the model's own tests cannot run")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: the model's own tests cannot run")
pytest.importorskip("safetensors", reason="safetensors is not installed: the model's own tests cannot run")

from tests.model.embedder import DIMENSIONS, GOLDEN, MAGPIE, SHAPE, embed, weights, write

FILES = {
    "1_Pooling/config.json",
    "config.json",
    "model.safetensors",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_the_script_makes_the_committed_bytes(tmp_path: Path) -> None:
    write(tmp_path / "magpie", tmp_path / "golden.json")
    made = {str(f.relative_to(tmp_path / "magpie")) for f in (tmp_path / "magpie").rglob("*") if f.is_file()}
    assert made == FILES == {str(f.relative_to(MAGPIE)) for f in MAGPIE.rglob("*") if f.is_file()}
    for name in FILES:
        assert (tmp_path / "magpie" / name).read_bytes() == (MAGPIE / name).read_bytes(), name


def test_golden_vectors_are_those_of_the_weights() -> None:
    drawn = weights()
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(golden) == 3
    for one in golden:
        assert one["embedding"] == pytest.approx(embed(drawn, one["input"]), abs=1e-4)
        assert sum(v * v for v in one["embedding"]) == pytest.approx(1, abs=1e-3)
        assert len(one["embedding"]) == SHAPE.hidden == max(DIMENSIONS)


def test_texts_that_share_words_are_near_and_others_are_not() -> None:
    drawn = weights()

    def near(one: str, other: str) -> float:
        return sum(a * b for a, b in zip(embed(drawn, one), embed(drawn, other), strict=True))

    assert near("What can the host see?", "What can the host of the machine see?") > 0.7
    assert near("yellow bananas", "bananas are yellow") > 0.6
    assert abs(near("What can the host see?", "bananas are yellow")) < 0.4
