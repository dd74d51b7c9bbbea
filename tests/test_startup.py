"""What importing the training path loads: nothing a run does not use."""

from __future__ import annotations

import json
import subprocess
import sys

from tiny_runs import environment

UNUSED = {  # installed beside adaptkit, or pulled in easily, and not needed for a run
    *("jinja2", "kornia", "matplotlib", "mlflow", "onnx", "pandas", "pyarrow", "scipy", "sklearn", "tensorboard"),
    *("transformers", "wandb", "webdataset", "datasets"),
}
SCRIPT = """
import json, sys, time
start = time.process_time()
import torch
torch_alone = time.process_time() - start
import timm, torchvision, accelerate
start = time.process_time()
import adaptkit.train
own = time.process_time() - start
print(json.dumps({"torch": torch_alone, "own": own, "loaded": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def imported() -> dict[str, object]:
    """What importing the training path loads, in a fresh interpreter; CPU seconds of torch and of our own part."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment(), capture_output=True, text=True, check=True)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_a_run_loads_no_library_it_does_not_use_and_little_of_its_own() -> None:
    answer = imported()
    loaded = answer["loaded"]
    assert isinstance(loaded, list)
    assert "torch" in loaded, "the check itself works"
    assert set(loaded) & UNUSED == set()
    assert float(str(answer["own"])) < float(str(answer["torch"])), "adaptkit's modules cost less than torch"
