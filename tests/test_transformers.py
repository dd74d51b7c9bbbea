"""The exported folder in transformers, as its users load it: the same embeddings, and the model card says how."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from formats_matrix import NETWORKS, build_network, by_transformers, finished_run, own, prepared_by_transformers

from adaptkit.backbones import save_backbone

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", NETWORKS)
def test_every_readout_is_the_pooled_output(name: str, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_backbone(build_network(NETWORKS[name]), run / "backbone")
    files = sorted(images.rglob("*.jpg"))[::40]
    pixels, expected = own(run, files)
    theirs = prepared_by_transformers(run / "backbone", files)
    assert (theirs - pixels).abs().max() < 1e-6
    with torch.inference_mode():
        found = by_transformers(run / "backbone")(theirs)
    assert expected.std(0).max() > 0.01 * expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_snippets_of_the_model_card_run_and_agree(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path, vit)
    picture = min((tmp_path / "images").rglob("*.jpg"))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "image.jpg").write_bytes(picture.read_bytes())
    (alone / "RUN").symlink_to(run)
    monkeypatch.chdir(alone)
    (expected,) = own(run, [alone / "image.jpg"])[1].numpy()
    snippets = re.findall(r"^```python\n(.*?)^```$", (run / "report.md").read_text(), re.DOTALL | re.MULTILINE)
    assert ["timm" in snippets[0], "transformers" in snippets[1]] == [True, True]
    for snippet in snippets:
        names: dict[str, object] = {}
        exec(snippet, names)
        embedding = names["embedding"]
        assert isinstance(embedding, torch.Tensor)
        assert embedding.shape == (1, len(expected))
        assert f"(1, {len(expected)})" in snippet
        assert np.abs(embedding[0].numpy() - expected).max() < 1e-4
