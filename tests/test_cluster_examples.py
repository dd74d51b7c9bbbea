"""The examples for SLURM and Kubernetes without a cluster: real scripts, stand-ins for its commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tiny_runs import ROOT, environment, flags, log, read
from torch.distributed.run import get_args_parser

from adaptkit import errors
from adaptkit.cli import main

pytestmark = pytest.mark.long

SLURM, KUBERNETES = ROOT / "examples" / "slurm", ROOT / "examples" / "kubernetes"
SCRIPTS, MANIFESTS = ("one_node.sbatch", "several_nodes.sbatch"), ("job.yaml", "several_nodes.yaml")
DEADLINE_S = 120.0

SRUN = """#!/usr/bin/env bash
# One task for each "node", all of them here; what it is signalled goes to them, as srun does it. The highest code.
while [[ $1 == --* ]]; do shift 2; done
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_STEP_NUM_TASKS=$SLURM_NNODES "$@" &
    tasks+=($!)
done
for name in USR1 TERM; do trap "kill -$name ${tasks[*]} 2>/dev/null" "$name"; done
worst=0
for task in "${tasks[@]}"; do
    while :; do
        code=0 && wait "$task" || code=$?
        kill -0 "$task" 2>/dev/null || break
    done
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) echo localhost ;;
*) echo "$*" >> "$OUT/scontrol" ;;
esac
"""
STAND_IN = """#!/usr/bin/env bash
# Instead of adaptkit and torchrun: notes its words, ends with CODE, or with 75 at a signal if CODE is "wait".
printf '%s\\n' "$(basename "$0")" "$@" > "$OUT/words"
run=$RUN
end() {
    mkdir -p "$run"
    echo "{\\"state\\": \\"ended\\", \\"exit_code\\": $1}" > "$run/status.json"
    [[ $0 != *torchrun || $1 == 0 ]] || exit 1 # launchers hide exit codes
    exit "$1"
}
trap 'sleep 1; end 75' USR1 TERM # saving takes its time
touch "$OUT/ready"
while [ "$CODE" = wait ]; do sleep 0.05; done
end "$CODE"
"""


def path_with(folder: Path, **commands: str) -> str:
    """PATH with those commands in front."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def slurm(out: Path, nodes: int, **commands: str) -> dict[str, str]:
    """What SLURM gives a batch script, and stand-ins for its commands."""
    path = path_with(out / "bin", srun=SRUN, scontrol=SCONTROL, **commands)
    variables = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "n[1-2]"}
    variables |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_NTASKS": str(nodes)}
    return environment(PATH=path, OUT=str(out), RUN=str(out / "run"), **variables)


def nodes_of(script: str) -> int:
    return 1 if script == "one_node.sbatch" else 2


def begin(script: str, variables: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    words = ["bash", str(SLURM / script), *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=variables, text=True, **pipes)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (path.exists() and (path.stat().st_size or path.name == "ready")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def adaptkit_words(out: Path) -> list[str]:
    """What adaptkit was called with, behind a launcher or not."""
    name, *words = (out / "words").read_text().splitlines()
    if name == "adaptkit":
        return words
    parsed = get_args_parser().parse_args(words)
    assert (parsed.module, parsed.training_script) == (True, "adaptkit")
    return list(parsed.training_script_args)


def parsed(words: list[str]) -> dict[str, Any]:
    """What adaptkit's own parser makes of the words."""
    name, *rest = words
    command = main.commands[name]
    assert isinstance(command, click.Command)
    return command.make_context(name, rest).params | {"command": name}


# --- SLURM


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("code", [0, 3, 5, 75])
def test_a_batch_script_ends_with_the_code_of_adaptkit_and_requeues_nothing(
    script: str, code: int, tmp_path: Path
) -> None:
    """75 without a signal at the time limit: somebody cancelled the job."""
    variables = slurm(tmp_path, nodes_of(script), adaptkit=STAND_IN, torchrun=STAND_IN) | {"CODE": str(code)}
    script_process = begin(script, variables, "nano", "my images", tmp_path / "run", "--epochs", "5")
    output, problems = script_process.communicate(timeout=DEADLINE_S)
    assert (script_process.returncode, output, problems) == (code, "", "")
    assert not (tmp_path / "scontrol").exists()
    options = parsed(adaptkit_words(tmp_path))
    expected = {"command": "adapt", "backbone": "nano", "data": ("my images",), "output": str(tmp_path / "run")}
    assert {name: options[name] for name in (*expected, "epochs")} == expected | {"epochs": 5}


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_its_time_limit_a_batch_script_requeues_and_then_resumes(script: str, tmp_path: Path) -> None:
    commands = {"adaptkit": STAND_IN, "torchrun": STAND_IN}
    variables = slurm(tmp_path, nodes_of(script), **commands) | {"CODE": "wait"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    script_process = begin(script, variables, "nano", "images", tmp_path / "run", "--epochs", "5")
    wait_for(tmp_path / "ready", script_process)
    script_process.send_signal(signal.SIGUSR1)
    output, problems = script_process.communicate(timeout=DEADLINE_S)
    assert (script_process.returncode, output, problems) == (75, "", "")
    assert (tmp_path / "scontrol").read_text() == f"requeue {variables['SLURM_JOB_ID']}\n"
    options = parsed(adaptkit_words(tmp_path))
    assert (options["command"], options["run"]) == ("resume", str(tmp_path / "run"))


def test_a_run_whose_node_failed_ends_with_the_code_of_srun(tmp_path: Path) -> None:
    """Nobody could write how it ended."""
    lost = '#!/bin/sh\necho \'{"state": "running", "exit_code": null}\' > "$RUN/status.json"\nexit 1\n'
    variables = slurm(tmp_path, 2, torchrun=lost)
    (tmp_path / "run").mkdir()
    script_process = begin("several_nodes.sbatch", variables, "nano", "images", tmp_path / "run")
    assert (script_process.communicate(timeout=DEADLINE_S)[1], script_process.returncode) == ("", 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_script_asks_for_what_it_relies_on(script: str, tmp_path: Path) -> None:
    lines = (SLURM / script).read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH --") and "=" in line
    )
    assert asked["signal"].startswith("B:USR1@")  # to the script, which passes it on
    assert (asked["ntasks-per-node"], asked["open-mode"], "#SBATCH --requeue" in lines) == ("1", "append", True)
    assert asked["nodes"] == str(nodes_of(script))
    assert os.access(SLURM / script, os.X_OK)
    done = begin(script, slurm(tmp_path, 1), "nano")
    assert "BACKBONE DATA RUN" in done.communicate(timeout=DEADLINE_S)[1]
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_script_carries_out_a_real_run_in_two_parts(
    script: str, vit: Path, images: Path, tmp_path: Path
) -> None:
    python = f'#!/bin/sh\nexec "{sys.executable}" -m {{}} "$@"\n'
    commands = {"adaptkit": python.format("adaptkit"), "torchrun": python.format("torch.distributed.run")}
    variables, run = slurm(tmp_path, nodes_of(script), **commands), tmp_path / "run"
    settings = flags({"steps": 40, "probe.every": "100%", "checkpoint_every": "100%"})
    first = begin(script, variables, vit, images, run, *settings, "--quiet")
    wait_for(run / "metrics.jsonl", first)
    first.send_signal(signal.SIGUSR1)
    _, problems = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 75, problems
    assert (tmp_path / "scontrol").exists()
    assert log(run)[-1]["step"] < 40
    second = begin(script, variables, vit, images, run)
    _, problems = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 0, problems
    assert read(run, "report.json")["training"]["steps"] == 40
    assert read(run, "manifest.json")["num_processes"] == nodes_of(script)


# --- Kubernetes


def job_of(manifest: str) -> dict[str, Any]:
    documents = list(yaml.safe_load_all((KUBERNETES / manifest).read_text(encoding="utf-8")))
    (job,) = (document for document in documents if document["kind"] == "Job")
    return dict(job["spec"])


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["template"]["spec"]["containers"]
    return dict(container)


def variables_of(container: dict[str, Any], out: Path) -> dict[str, str]:
    """The container's variables, with its run in `out`, and stand-ins for the commands."""
    path = path_with(out / "bin", adaptkit=STAND_IN, torchrun=STAND_IN)
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    return environment(**given | {"PATH": path, "OUT": str(out), "RUN": str(out / "run"), "JOB_COMPLETION_INDEX": "1"})


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_job_retries_by_adaptkit_s_exit_codes(manifest: str) -> None:
    job = job_of(manifest)
    ignored, disrupted, fatal = job["podFailurePolicy"]["rules"]
    assert (ignored["action"], disrupted["action"], fatal["action"]) == ("Ignore", "Ignore", "FailJob")
    assert ignored["onExitCodes"]["values"] == [errors.Interrupted.exit_code]
    final = (errors.UsageError, errors.DataError, errors.BackboneError, errors.GainNotMet, errors.Collapsed)
    assert fatal["onExitCodes"]["values"] == [error.exit_code for error in final]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    for rule in (ignored, fatal):
        assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["operator"]) == ("adaptkit", "In")
    assert container_of(job)["name"] == "adaptkit"
    assert job["template"]["spec"]["restartPolicy"] == "Never", "else there is no failure policy"


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_pod_has_shared_memory_time_to_save_and_no_root(manifest: str) -> None:
    pod = job_of(manifest)["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    for name in ("RUN", "DATA", "HOME"):
        assert variables[name].startswith("/storage/")
    assert "persistentVolumeClaim" in volumes[mounts["/storage"]]
    assert pod["terminationGracePeriodSeconds"] > int(variables.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0"))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_numbers_and_names_of_several_pods_agree() -> None:
    service, job = yaml.safe_load_all((KUBERNETES / "several_nodes.yaml").read_text(encoding="utf-8"))
    spec, container = job["spec"], container_of(job["spec"])
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(variables["PODS"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    name, subdomain = job["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert (service["kind"], service["metadata"]["name"], service["spec"]["clusterIP"]) == (
        "Service",
        subdomain,
        "None",
    )
    assert service["spec"]["selector"] == {"job-name": name}
    assert variables["FIRST"] == f"{name}-0.{subdomain}"
    assert spec["completionMode"] == "Indexed"


@pytest.mark.parametrize("manifest", MANIFESTS)
@pytest.mark.parametrize("code", ["0", "3", "75", "wait"])
def test_a_container_ends_with_the_code_of_adaptkit(manifest: str, code: str, tmp_path: Path) -> None:
    """`wait`: the pod is moved while it runs."""
    container = container_of(job_of(manifest))
    variables = variables_of(container, tmp_path) | {"CODE": code}
    words = [*container["command"], *container["args"]]
    pod = subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if code == "wait":
        wait_for(tmp_path / "ready", pod)
        pod.terminate()
    assert pod.communicate(timeout=DEADLINE_S) == ("", "")
    assert pod.returncode == (75 if code == "wait" else int(code))
    options = parsed(adaptkit_words(tmp_path))
    expected = {"command": "adapt", "data": (variables["DATA"],), "output": variables["RUN"]}
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_new_pod_goes_on(manifest: str, tmp_path: Path) -> None:
    container = container_of(job_of(manifest))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    words = [*container["command"], *container["args"]]
    subprocess.run(words, env=variables_of(container, tmp_path) | {"CODE": "0"}, check=True, timeout=DEADLINE_S)
    options = parsed(adaptkit_words(tmp_path))
    assert (options["command"], options["run"]) == ("resume", str(tmp_path / "run"))


def test_the_processes_of_several_pods_find_each_other(tmp_path: Path) -> None:
    container = container_of(job_of("several_nodes.yaml"))
    variables = variables_of(container, tmp_path) | {"CODE": "0"}
    subprocess.run([*container["command"], *container["args"]], env=variables, check=True, timeout=DEADLINE_S)
    launcher = get_args_parser().parse_args((tmp_path / "words").read_text().splitlines()[1:])
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.node_rank) == ("2", "8", 1)
    assert (launcher.master_addr, launcher.rdzv_backend) == ("adaptkit-0.adaptkit", "static")
