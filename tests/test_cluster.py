"""Files for clusters and containers, held against the services' own rules as far as these can be
had without the services."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, embedded
from jinja2 import Environment
from jsonschema import Draft202012Validator

TEXT, NUMBER = {"type": "string"}, {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-zA-Z]([a-zA-Z0-9_-]*[a-zA-Z0-9])?$"}


def section(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties,
            "additionalProperties": False}  # fmt: skip


# What OSMO's service accepts of what is used here: its models refuse every other key.
OSMO = section(
    ["workflow"],
    workflow=section(
        ["name", "tasks"], name=NAME, timeout=section([], exec_timeout=TEXT, queue_timeout=TEXT),
        resources={"type": "object", "additionalProperties": section(
            [], cpu=NUMBER, gpu=NUMBER, memory=TEXT, storage=TEXT, platform=TEXT)},
        tasks={"type": "array", "items": section(
            ["name", "image", "command"], name=NAME, image=TEXT,
            command={"type": "array", "minItems": 1, "items": TEXT},
            args={"type": "array", "items": TEXT},
            environment={"type": "object", "additionalProperties": TEXT},
            files={"type": "array",
                   "items": section(["path", "contents"], path=TEXT, contents=TEXT)},
            outputs={"type": "array", "items": {"oneOf": [
                section(["url"], url=TEXT, regex=TEXT),
                section(["dataset"], dataset=section(["name"], name=NAME, path=TEXT)),
            ]}},
        )},
    ),
)  # fmt: skip


def module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


generate, submit = module("cluster/generate.py"), module("cluster/aws_batch/submit.py")


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_generated_files_are_what_the_description_gives() -> None:
    assert generate.slurm_differences() == []
    for path, text in generate.files().items():
        assert path.read_text() == text, f"python cluster/generate.py ({path.name})"


@pytest.mark.parametrize("name", ["train.yaml", "train_url.yaml"])
def test_osmo_workflow(name: str) -> None:
    text = (ROOT / "cluster" / "osmo" / name).read_text()
    own = re.compile(r"\{\{(output|workflow_id)\}\}")  # the service's; the rest is Jinja's
    kept = own.sub(r"@@\1@@", text)
    values = yaml.safe_load(kept)["default-values"] | {"repository": "https://host/project"}
    content = yaml.safe_load(Environment().from_string(kept).render(values))
    del content["default-values"]
    Draft202012Validator(OSMO).validate(content)
    (task,) = content["workflow"]["tasks"]
    assert task["environment"]["DREAMER_ISAAC_REPOSITORY"] == "https://host/project"
    assert task["environment"]["ACCEPT_EULA"] == "Y"
    script = task["files"][0]["contents"]
    assert task["args"] == [task["files"][0]["path"]] and "@@output@@/output" in script
    assert not re.search(r"\{[{%#]", script)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@embedded
def test_the_osmo_script_does_what_it_says(tmp_path: Path) -> None:
    """Its lines, with a stand-in for setup-and-run.sh that notes how it is called."""
    script = generate.entry(generate.description()).replace("{{output}}", str(tmp_path / "out"))
    script = script.replace("/tmp/dreamer_isaac", str(tmp_path / "project"))
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "setup-and-run.sh").write_text(
        f'echo "$@" >> {tmp_path}/calls\ncase "$1" in --python) exec sleep 60 ;; esac\n'
    )
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-qb", "main"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=origin, check=True)
    env = {"PATH": "/usr/bin:/bin", "DREAMER_ISAAC_REF": "main",
           "DREAMER_ISAAC_REPOSITORY": str(origin)}  # fmt: skip
    done = subprocess.run(["bash"], input=script, text=True, env=env, timeout=30, cwd=tmp_path)
    assert done.returncode == 0  # TensorBoard was ended
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "--build-only" and any("tensorboard.main" in c for c in calls)
    from dreamer_isaac.cli import compose

    train, play = (c.split() for c in calls if c.startswith("env.name="))
    assert compose(train).collector.kind == "thread"
    assert compose(play).mode == "evaluate"
    assert compose(play).checkpoint.path == compose(train).run.dir


@pytest.mark.parametrize("more", [[], ["--seeds", "3"], ["--nodes", "2"], ["--job-role", "arn:x"]])
def test_batch_requests_fit_the_services_model(more: list[str], capsys: Any) -> None:
    command = ["s3://b/job.json", "--queue", "gpu", "--image", "host/image:1", "--dry-run", *more]
    assert submit.main(command) == 0  # which checks them
    sent = json.loads(capsys.readouterr().out)
    text = json.dumps(sent)
    assert "host/image:1" in text and "REGISTRY" not in text and "job=s3://b/job.json" in text
    if "--seeds" in more:
        assert sent["SubmitJob"]["arrayProperties"] == {"size": 3}
    if "--nodes" in more:
        assert sent["RegisterJobDefinition"]["type"] == "multinode"
        assert sent["SubmitJob"]["nodeOverrides"]["numNodes"] == 2


def test_the_check_of_requests_can_fail() -> None:
    definition = generate.batch(generate.description())
    assert submit.problems("RegisterJobDefinition", definition) == []
    broken = json.loads(json.dumps(definition))
    broken["type"] = "gpu"
    broken["containerProperties"]["linuxParameters"]["sharedMemorySize"] = "8 GiB"
    broken["containerProperties"]["imagee"] = "x"
    found = "\n".join(submit.problems("RegisterJobDefinition", broken))
    assert "'gpu' is not one of container, multinode" in found
    assert "sharedMemorySize" in found and "imagee" in found
    assert "jobQueue" in "\n".join(submit.problems("SubmitJob", {"jobName": "x"}))


def test_what_is_submitted(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import boto3
    from botocore.config import Config
    from botocore.session import UNSIGNED
    from botocore.stub import Stubber

    client: Any = boto3.client(
        "batch", region_name="us-east-1", config=Config(signature_version=UNSIGNED)
    )
    with Stubber(client) as stub:
        stub.add_response("register_job_definition", {
            "jobDefinitionName": "x", "jobDefinitionArn": "arn", "revision": 1})  # fmt: skip
        stub.add_response("submit_job", {"jobName": "x", "jobId": "the-id"})
        monkeypatch.setattr(boto3, "client", lambda *a, **k: client)
        assert submit.main(["s3://b/j.json", "--queue", "q", "--image", "i"]) == 0
    assert capsys.readouterr().out.strip() == "the-id"


@pytest.mark.parametrize("wrong", [["j.json"], ["s3://b/j.json", "--seeds", "2", "--nodes", "2"]])
def test_what_cannot_be_submitted(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        submit.main([*wrong, "--queue", "q", "--image", "i"])


@embedded
@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.isaaclab"])
def test_images_pass_the_linter(name: str) -> None:
    path = ROOT / "docker" / name
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert "USER 10001" in text and not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)\s*=", text)
    copied = re.findall(r"^COPY (?:--\S+ )?(.*)$", text, re.M)
    for source in (s for line in copied for s in line.split()[:-1]):
        assert (ROOT / source).exists(), source


@embedded
@pytest.mark.parametrize("profile", ["gpu", "two-gpus", "isaaclab", "evaluate", "tensorboard"])
def test_compose_file(profile: str) -> None:
    done = subprocess.run(
        [tool("docker-compose"), "-f", str(ROOT / "docker" / "compose.yaml"), "--profile", profile,
         "config", "--format", "json"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (service,) = json.loads(done.stdout)["services"].values()
    from dreamer_isaac.cli import compose

    if profile != "tensorboard":
        cfg = compose(service["command"])  # a command that the program understands
        assert cfg.run.dir.startswith("/outputs/")
        (gpus,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert gpus["count"] == (2 if profile in ("two-gpus", "isaaclab") else 1)
    licence = service.get("environment", {}).get("ACCEPT_EULA")
    assert licence == ("Y" if profile == "isaaclab" else None)


@embedded
def test_shell_scripts_pass_the_linter() -> None:
    scripts = [
        ROOT / "setup-and-run.sh",
        ROOT / "cluster" / "slurm" / "train.sbatch",
        ROOT / ".ci/run",
    ]
    done = subprocess.run([tool("shellcheck"), *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
