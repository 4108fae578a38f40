"""Submits a job file to AWS Batch.

    python cluster/aws_batch/submit.py s3://bucket/asset/training/job.json --queue Q --image IMAGE
    ... --seeds 3        an array: a seed a task, a folder of results each
    ... --nodes 2        one job of two nodes (computeConfig.numNodes: 2): a seed a node
    ... --dry-run        print the requests, checked against the service's own model; no network

The job definition is registered first (cluster/aws_batch/*.json with your image). What AWS needs to
know of you comes from its usual places (environment, ~/.aws, an instance's role).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def problems(operation: str, request: dict[str, Any]) -> list[str]:
    """What the service's model of an operation has against a request: botocore checks types and
    required fields, and leaves the allowed values of a field to the server, so they are looked at
    here."""
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    service = ServiceModel(Loader().load_service_model("batch", "service-2"), "batch")
    shape = service.operation_model(operation).input_shape
    report = ParamValidator().validate(request, shape)
    found = report.generate_report().splitlines() if report.has_errors() else []
    return found + list(_values(shape, request, ""))


def _values(shape: Any, value: Any, path: str) -> list[str]:
    kind = shape.type_name
    if kind == "structure" and isinstance(value, dict):
        inside = [
            (shape.members[k], v, f"{path}.{k}") for k, v in value.items() if k in shape.members
        ]
    elif kind == "list" and isinstance(value, list):
        inside = [(shape.member, v, f"{path}[{i}]") for i, v in enumerate(value)]
    elif kind == "string" and shape.enum and value not in shape.enum:
        return [f"{path[1:]}: {value!r} is not one of {', '.join(shape.enum)}"]
    else:
        inside = []
    return [line for each in inside for line in _values(*each)]


def requests(a: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """RegisterJobDefinition's and SubmitJob's."""
    name = "job_definition_nodes.json" if a.nodes > 1 else "job_definition.json"
    definition = json.loads((HERE / name).read_text())
    if a.nodes > 1:
        properties = definition["nodeProperties"]
        properties["numNodes"] = a.nodes
        container = properties["nodeRangeProperties"][0]["container"]
    else:
        container = definition["containerProperties"]
    container["image"] = a.image
    for key in ("job_role", "execution_role"):
        if getattr(a, key):
            container[{"job_role": "jobRoleArn", "execution_role": "executionRoleArn"}[key]] = (
                getattr(a, key)
            )
    job: dict[str, Any] = {
        "jobName": a.name, "jobQueue": a.queue, "jobDefinition": definition["jobDefinitionName"],
    }  # fmt: skip
    overrides = {"command": [f"job={a.job}"]}
    if a.nodes > 1:
        job["nodeOverrides"] = {"numNodes": a.nodes, "nodePropertyOverrides": [
            {"targetNodes": "0:", "containerOverrides": overrides},
        ]}  # fmt: skip
    else:
        job["containerOverrides"] = overrides
    if a.seeds > 1:
        job["arrayProperties"] = {"size": a.seeds}
    return definition, job


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("job", help="s3://bucket/path/to/job.json")
    parser.add_argument("--queue", required=True)
    parser.add_argument(
        "--image", required=True, help="docker/Dockerfile.isaaclab in your registry"
    )
    parser.add_argument("--name", default="dreamer-isaac")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--job-role", default="", help="ARN; needs to read and write the bucket")
    parser.add_argument("--execution-role", default="", help="ARN")
    parser.add_argument("--region", default=None)
    parser.add_argument("--dry-run", action="store_true")
    a = parser.parse_args(argv)
    if not a.job.startswith("s3://"):
        parser.error(f"{a.job}: a container sees no file of this machine; put it into a bucket")
    if a.seeds > 1 and a.nodes > 1:
        parser.error("--seeds and --nodes exclude each other: AWS Batch has no arrays of nodes")
    definition, job = requests(a)
    found = problems("RegisterJobDefinition", definition) + problems("SubmitJob", job)
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    if a.dry_run:
        print(json.dumps({"RegisterJobDefinition": definition, "SubmitJob": job}, indent=2))
        return 0
    import boto3

    client = boto3.client("batch", region_name=a.region)
    # By this revision, not by name: somebody else may register another one now.
    job["jobDefinition"] = client.register_job_definition(**definition)["jobDefinitionArn"]
    print(client.submit_job(**job)["jobId"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
