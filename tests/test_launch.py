"""The launchers, with stand-ins for gcloud, xpk, srun and m3po on the PATH: nothing leaves this machine."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
RECIPE = "configs/llava15_7b_m3po.yaml"
OVERRIDES = ["name=a trial; it's $HOME", "score.claim_template=This is {claim}", "train.lora={lora_rank: 8}", "a=*"]
TPU = {"TPU_NAME": "slice", "ZONE": "zone-a", "ACCELERATOR_TYPE": "v6e-16", "RUNTIME_VERSION": "runtime"}
XPK = {"CLUSTER": "cluster", "TPU_TYPE": "v6e-16", "DOCKER_IMAGE": "registry/image:tag"}
SETTINGS = {"tpu_vm.sh": TPU, "gke_xpk.sh": XPK}

# A stand-in notes its arguments and the variables that launchers set, then does what its script says.
STUB = """#!/usr/bin/env bash
python3 - "$0" "$@" <<'NOTE'
import json, os, sys
note = {"argv": [os.path.basename(sys.argv[1]), *sys.argv[2:]]}
note["environment"] = {key: value for key, value in os.environ.items() if key.startswith("M3PO_")}
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(note) + "\\n")
NOTE
"""


@pytest.fixture
def sandbox(tmp_path):
    """Runs a launcher; `stub(name, script)` makes a stand-in, `calls()` gives what was called."""

    class Sandbox:
        calls_file = tmp_path / "calls"
        bin = tmp_path / "bin"

        def stub(self, name: str, script: str = "exit 0") -> None:
            self.bin.mkdir(exist_ok=True)
            (self.bin / name).write_text(STUB + script + "\n")
            (self.bin / name).chmod(0o755)

        def environment(self, **extra: str) -> dict[str, str]:
            kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
            kept["PATH"] = f"{self.bin}:{kept['PATH']}"
            return kept | {"CALLS": str(self.calls_file), "STATE": str(tmp_path)} | extra

        def run(self, script: str, *arguments: str, cwd: Path = ROOT, **environment: str):
            return subprocess.run(
                ["bash", str(LAUNCH / script), *arguments],
                env=self.environment(**environment),
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

        def notes(self) -> list[dict]:
            if not self.calls_file.exists():
                return []
            return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

        def calls(self) -> list[list[str]]:
            return [note["argv"] for note in self.notes()]

    box = Sandbox()
    for name in ("gcloud", "xpk", "srun", "scontrol", "m3po", "tar"):
        box.stub(name)
    return box


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck on the PATH")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_usage(path, sandbox):
    for arguments in ((), ("--help",), ("--dry-run",)):
        done = sandbox.run(path.name, *arguments, **SETTINGS.get(path.name, {}))
        assert done.returncode == 2
        assert f"launch/{path.name}" in done.stderr
        assert "set -euo" not in done.stderr
    assert sandbox.calls() == []


@pytest.mark.parametrize(("script", "missing"), [("tpu_vm.sh", "ZONE"), ("gke_xpk.sh", "CLUSTER")])
def test_missing_setting_is_named(sandbox, script, missing):
    settings = {key: value for key, value in SETTINGS[script].items() if key != missing}
    done = sandbox.run(script, RECIPE, **settings)
    assert done.returncode == 2 and f"{script}: set {missing}" in done.stderr
    assert sandbox.calls() == []


def printed(output: str) -> list[list[str]]:
    """The commands that a dry run shows, as a shell reads them."""
    return [shlex.split(line.removeprefix("+")) for line in output.splitlines() if line.startswith("+")]


def m3po_arguments(command: list[str]) -> list[str]:
    """What follows `m3po` in a command, or in the shell line that is one of its arguments."""
    for argument in command:
        if argument == "m3po":
            return command[command.index("m3po") + 1 :]
        if "bin/m3po " in argument or "exec env" in argument:
            # bash itself reads it back, as the far side will.
            line = argument.split("m3po run ", 1)[1]
            script = f"printf '%s\\0' {line}"
            return ["run", *subprocess.check_output(["bash", "-c", script], text=True).split("\0")[:-1]]
    raise AssertionError(command)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_dry_run_runs_nothing_and_keeps_every_argument_whole(path, sandbox):
    done = sandbox.run(path.name, "--dry-run", RECIPE, *OVERRIDES, **SETTINGS.get(path.name, {}))
    assert done.returncode == 0, done.stderr
    assert sandbox.calls() == []
    commands = printed(done.stdout)
    assert m3po_arguments(commands[-1]) == ["run", "--config", RECIPE, *OVERRIDES]


def test_verb(sandbox):
    done = sandbox.run("gpu_node.sh", "--dry-run", RECIPE, M3PO_VERB="train")
    assert printed(done.stdout) == [["m3po", "train", "--config", RECIPE]]


class TestTpuVm:
    # describe: absent, then waiting, then active; ssh: stopped at first, then well.
    STATES = """
case "$*" in
  *queued-resources\\ describe*)
    count=$(cat "$STATE/describes" 2>/dev/null || echo 0); echo $((count + 1)) > "$STATE/describes"
    set -- $SEQUENCE; state=${@:$((count < $# ? count + 1 : $#)):1}
    [[ $state == ABSENT ]] && exit 1
    echo "$state" ;;
  *m3po\\ run*)
    [[ -e "$STATE/started" ]] && exit ${SECOND:-0}
    touch "$STATE/started"; exit ${FIRST:-0} ;;
esac
"""

    def run(self, sandbox, sequence: str, **environment: str):
        sandbox.stub("gcloud", self.STATES)
        done = sandbox.run("tpu_vm.sh", RECIPE, *OVERRIDES, **TPU, POLL_SECONDS="0", SEQUENCE=sequence, **environment)
        verbs = [" ".join(call[3:5]) for call in sandbox.calls() if call[0] == "gcloud"]
        return done, [verb for verb in verbs if verb != "queued-resources describe"]

    def test_creates_waits_installs_and_runs_on_all_hosts(self, sandbox):
        done, verbs = self.run(sandbox, "ABSENT WAITING_FOR_RESOURCES ACTIVE", SPOT="1", PROJECT="mine")
        assert done.returncode == 0, done.stderr
        assert verbs == ["queued-resources create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
        calls = [call for call in sandbox.calls() if call[0] == "gcloud"]
        assert all(call[call.index("--zone") + 1] == "zone-a" for call in calls)
        assert all(call[call.index("--project") + 1] == "mine" for call in calls)
        create = next(call for call in calls if "create" in call)
        assert "--spot" in create and create[create.index("--accelerator-type") + 1] == "v6e-16"
        assert "--worker=all" in calls[-1]
        line = calls[-1][-1]
        assert "M3PO_MULTI_HOST=1" in line
        assert m3po_arguments(calls[-1]) == ["run", "--config", RECIPE, *OVERRIDES]

    def test_an_existing_slice_is_used(self, sandbox):
        done, verbs = self.run(sandbox, "ACTIVE")
        assert done.returncode == 0
        assert verbs == ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]

    def test_a_stopped_run_is_started_again(self, sandbox):
        done, verbs = self.run(sandbox, "ACTIVE", FIRST="75")
        assert done.returncode == 0
        assert verbs.count("tpu-vm ssh") == 4

    def test_a_preempted_slice_is_made_anew(self, sandbox):
        done, verbs = self.run(sandbox, "ACTIVE SUSPENDED SUSPENDED ABSENT ACTIVE", FIRST="255")
        assert done.returncode == 0
        assert verbs[3:5] == ["queued-resources delete", "queued-resources create"]

    def test_an_error_is_not_repeated(self, sandbox):
        done, verbs = self.run(sandbox, "ACTIVE", FIRST="2")
        assert done.returncode == 2
        assert verbs.count("tpu-vm ssh") == 2

    def test_restarts_are_bounded(self, sandbox):
        done, verbs = self.run(sandbox, "ACTIVE", FIRST="75", SECOND="75", MAX_RESTARTS="2")
        assert done.returncode == 75
        assert verbs.count("tpu-vm ssh") == 6

    def test_recipe_outside_the_repository(self, sandbox, tmp_path):
        recipe = tmp_path / "r.yaml"
        recipe.write_text("name: x\n")
        done = sandbox.run("tpu_vm.sh", "--dry-run", str(recipe), **TPU)
        assert done.returncode == 2 and "must lie under" in done.stderr


class TestXpk:
    def test_submits_with_restarts(self, sandbox):
        done = sandbox.run("gke_xpk.sh", RECIPE, *OVERRIDES, **XPK)
        assert done.returncode == 0, done.stderr
        listing, create = sandbox.calls()
        assert listing[:3] == ["xpk", "workload", "list"]
        assert create[:3] == ["xpk", "workload", "create"]
        assert create[create.index("--workload") + 1] == "llava15-7b-m3po"
        assert create[create.index("--restart-on-exit-codes") + 1] == "75"
        assert m3po_arguments(create) == ["run", "--config", RECIPE, *OVERRIDES]
        assert "M3PO_MULTI_HOST=1" in create[-1]

    def test_an_existing_workload_is_left_alone(self, sandbox):
        sandbox.stub("xpk", "echo llava15-7b-m3po 2026-01-01")
        done = sandbox.run("gke_xpk.sh", RECIPE, **XPK)
        assert done.returncode == 0
        assert [call[2] for call in sandbox.calls()] == ["list"]


class TestSlurm:
    def test_options_for_the_queue(self):
        lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
        assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@120"} <= set(lines)
        first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command

    @pytest.mark.parametrize(("tasks", "several"), [("1", "0"), ("16", "1")])
    def test_runs_a_step(self, sandbox, tasks, several):
        done = sandbox.run("slurm.sbatch", RECIPE, *OVERRIDES, SLURM_JOB_ID="7", SLURM_NTASKS=tasks)
        assert done.returncode == 0, done.stderr
        (note,) = sandbox.notes()
        assert note["argv"][0] == "srun"
        assert m3po_arguments(note["argv"]) == ["run", "--config", RECIPE, *OVERRIDES]
        assert note["environment"]["M3PO_MULTI_HOST"] == several

    @pytest.mark.parametrize("status", [75, 137])
    def test_stopped_or_killed_goes_back_into_the_queue(self, sandbox, status):
        sandbox.stub("srun", f"exit {status}")
        assert sandbox.run("slurm.sbatch", RECIPE, SLURM_JOB_ID="7").returncode == status
        assert sandbox.calls()[-1] == ["scontrol", "requeue", "7"]

    def test_not_for_ever(self, sandbox):
        sandbox.stub("srun", "exit 75")
        job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}
        assert sandbox.run("slurm.sbatch", RECIPE, **job).returncode == 75
        assert [call[0] for call in sandbox.calls()] == ["srun"]

    def test_an_error_does_not(self, sandbox):
        sandbox.stub("srun", "exit 2")
        assert sandbox.run("slurm.sbatch", RECIPE, SLURM_JOB_ID="7").returncode == 2
        assert [call[0] for call in sandbox.calls()] == ["srun"]

    def test_outside_a_job(self, sandbox):
        done = sandbox.run("slurm.sbatch", RECIPE)
        assert done.returncode == 2 and "submit it with sbatch" in done.stderr
        assert sandbox.calls() == []


SAVES_AND_EXITS = """
trap 'sleep 0.3; touch "$STATE/saved"; exit 75' TERM
touch "$STATE/ready"
for _ in $(seq 200); do sleep 0.05; done
exit 9
"""


@pytest.mark.parametrize(("script", "stub"), [("gpu_node.sh", "m3po"), ("slurm.sbatch", "srun")])
def test_sigterm_is_passed_on_and_the_save_awaited(sandbox, tmp_path, script, stub):
    sandbox.stub(stub, SAVES_AND_EXITS)
    process = subprocess.Popen(
        ["bash", str(LAUNCH / script), RECIPE], env=sandbox.environment(SLURM_JOB_ID="7"), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "saved").exists()
    assert [call[0] for call in sandbox.calls()] == [stub] + (["scontrol"] if script == "slurm.sbatch" else [])


def test_gpu_node_starts_a_stopped_run_again(sandbox):
    sandbox.stub("m3po", '[[ -e "$STATE/again" ]] && exit 0; touch "$STATE/again"; exit 75')
    assert sandbox.run("gpu_node.sh", RECIPE).returncode == 0
    assert len(sandbox.calls()) == 2
    sandbox.stub("m3po", "exit 2")
    assert sandbox.run("gpu_node.sh", RECIPE).returncode == 2
    sandbox.stub("m3po", "exit 75")
    assert sandbox.run("gpu_node.sh", RECIPE, MAX_RESTARTS="1").returncode == 75


class TestSkyPilot:
    TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())

    def run(self, sandbox, **environment: str):
        (sandbox.bin / "home/m3po-venv/bin").mkdir(parents=True)
        return subprocess.run(
            ["bash", "-c", self.TASK["run"]],
            env=sandbox.environment(**self.TASK["envs"] | {"HOME": str(sandbox.bin / "home")} | environment),
            capture_output=True,
            text=True,
            check=False,
        )

    def test_overrides_by_line(self, sandbox):
        done = self.run(sandbox, OVERRIDES="\n".join(OVERRIDES), RECIPE=RECIPE)
        assert done.returncode == 0, done.stderr
        (note,) = sandbox.notes()
        assert note["argv"] == ["m3po", "run", "--config", RECIPE, *OVERRIDES]
        assert "M3PO_COORDINATOR" not in note["environment"]

    def test_several_nodes(self, sandbox):
        nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
        assert self.run(sandbox, **nodes).returncode == 0
        (note,) = sandbox.notes()
        assert note["argv"] == ["m3po", "run", "--config", self.TASK["envs"]["RECIPE"]]
        found = {key: note["environment"][f"M3PO_{key}"] for key in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")}
        assert found == {"COORDINATOR": "10.0.0.1:8476", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}

    def test_task(self):
        assert 75 in self.TASK["resources"]["job_recovery"]["recover_on_exit_codes"]
        assert (ROOT / self.TASK["envs"]["RECIPE"]).is_file()
        subprocess.run(["bash", "-n", "-c", self.TASK["setup"]], check=True)
