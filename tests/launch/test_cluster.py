"""The manifests of launch/cluster, by the schemas of what reads them and by our own flags, config keys and addresses.

Kubernetes' own schemas come with the package kubernetes-validate. Those of JobSet and SkyPilot are in schemas/.
"""

import ast
import copy
import functools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ml_collections import ConfigDict

from launch import serve_rollouts
from launch.cluster import check_health
from tapojax.rewards import remote as rewards
from tapojax.rollout import remote
from tapojax.rpc import security
from tests.rewards import servers

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "launch" / "cluster"
GUIDE = ROOT / "docs" / "scale_out.md"
KUBERNETES = ("1.31", "1.37")
OF_SECRETS = {"token": "token", "certificate": "cert.pem", "key": "key.pem", "authority": "ca.pem"}


class Part(NamedTuple):
    """One kind of process of a run, as a manifest has it."""

    module: str
    arguments: list[str]
    hosts: list[str]  # names by which others reach its replicas
    secret: str  # name of the Secret at /secrets
    mounts: dict[str, bool]  # path -> whether it is read-only
    waits: list[list[str]]  # arguments of check_health before it starts


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def schema(name: str) -> dict:
    return json.loads((Path(__file__).parent / "schemas" / name).read_text())


(JOBSET,) = documents("jobset.yaml")
JOBS = {job["name"]: job for job in JOBSET["spec"]["replicatedJobs"]}
GROUP, *TASKS = documents("skypilot.yaml")


def pod(name: str) -> dict:
    return JOBS[name]["template"]["spec"]["template"]["spec"]


def container(name: str) -> dict:
    (only,) = pod(name)["containers"]
    return only


def part_of_jobset(name: str) -> Part:
    spec, metadata, program = pod(name), JOBSET["metadata"], container(name)
    command = program["command"]
    place = f"{JOBSET['spec']['network']['subdomain']}.{metadata['namespace']}.svc"
    hosts = [f"{metadata['name']}-{name}-{i}-0.{place}" for i in range(JOBS[name]["replicas"])]
    (secret,) = [volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in program["volumeMounts"]}
    return Part(command[command.index("-m") + 1], program["args"], hosts, secret, mounts, [])


def part_of_skypilot(name: str) -> Part:
    (task,) = [task for task in TASKS if task["name"] == name]
    lines = task["run"].replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.removeprefix("exec ")) for line in lines if "python -m" in line]
    *waits, (_, _, module, *arguments) = commands
    assert all(wait[2] == "launch.cluster.check_health" for wait in waits)
    spec = task["config"]["kubernetes"]["pod_config"]["spec"]
    (volume,), ((mount,),) = spec["volumes"], [box["volumeMounts"] for box in spec["containers"]]
    mounts = {mount["mountPath"]: mount["readOnly"], **dict.fromkeys(task["volumes"], name != "trainer")}
    hosts = [f"{name}-{i}.{GROUP['name']}" for i in range(task.get("num_nodes", 1))]
    return Part(module, arguments, hosts, volume["secret"]["secretName"], mounts, [wait[3:] for wait in waits])


PARTS = {
    manifest: {name: read(name) for name in ("rollouts", "rewards", "trainer")}
    for manifest, read in (("jobset", part_of_jobset), ("skypilot", part_of_skypilot))
}
MANIFESTS = pytest.mark.parametrize("manifest", PARTS)


# ---- what reads them


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_reads_the_volume_and_the_jobs(version):
    (claim,) = documents("volume.yaml")
    kubernetes_validate.validate(claim, version, strict=True)
    for name, job in JOBS.items():
        as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job["template"]["spec"]}
        kubernetes_validate.validate(as_job, version, strict=True)
        as_job = copy.deepcopy(as_job)
        as_job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
        with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
            kubernetes_validate.validate(as_job, version, strict=True)


def test_jobset_reads_the_set():
    jsonschema.validate(JOBSET, schema("jobset.json"))
    before: set[str] = set()
    for name, job in JOBS.items():
        assert {other["name"] for other in job.get("dependsOn", ())} <= before, "only earlier jobs can be waited for"
        before.add(name)
    assert JOBSET["spec"]["successPolicy"]["targetReplicatedJobs"] == ["trainer"]
    for path, wrong in [("replicatedJobs", []), ("successPolicy", {"operator": "Some"}), ("replicas", 4)]:
        changed = copy.deepcopy(JOBSET)
        changed["spec"][path] = wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, schema("jobset.json"))


def test_skypilot_reads_the_group():
    header, task = ({**schema("skypilot.json"), "$ref": f"#/$defs/{kind}"} for kind in ("header", "task"))
    jsonschema.validate(GROUP, header)
    for document in TASKS:
        jsonschema.validate(document, task)
        spec = copy.deepcopy(document["config"]["kubernetes"]["pod_config"]["spec"])
        spec["containers"][0]["name"] = "skypilot's"  # which merges these into its own
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": document["name"]}, "spec": spec}
        kubernetes_validate.validate(as_pod, KUBERNETES[-1], strict=True)
    assert GROUP["primary_tasks"] == ["trainer"] and set(JOBS) == {document["name"] for document in TASKS}
    with pytest.raises(jsonschema.ValidationError, match="node_count"):
        jsonschema.validate({**TASKS[0], "node_count": 4}, task)


# ---- our own flags and keys


@functools.cache
def config_of(module: str, *arguments: str) -> dict:
    """The config of a command, by the flags of its own module alone; a trainer's is checked as at its start."""
    code = f"""
import sys
from types import SimpleNamespace
from absl import flags
from launch import build, cli, {module.removeprefix("launch.")}
flags.FLAGS(sys.argv)
config = cli.checked_config()
if {module == "launch.train"}:
    build.check_rows(config)
    correct = build.mismatch_correction(config.train, config.mismatch)
    devices = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    run = SimpleNamespace(
        mesh=SimpleNamespace(size=devices), engine=SimpleNamespace(update=config.rollout.addresses or None),
        correct=correct, algorithm=build.algorithm(config, None),
    )
    build.check_asynchrony(config, run)
print(config.to_json())
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{module}: {done.stderr[-800:]}"
    return json.loads(done.stdout)


def trainer_config() -> dict:
    return config_of("launch.train", *PARTS["jobset"]["trainer"].arguments)


def option(part: Part, name: str) -> str:
    (value,) = [value for key, _, value in (argument.partition("=") for argument in part.arguments) if key == name]
    return value


@pytest.mark.parametrize("name", ["rollouts", "rewards", "trainer"])
def test_both_manifests_are_the_same_run(name):
    """All but where servers are, and what JobSet alone has a use for; so the tests below may parse one of them."""
    own = ("--config.rollout.addresses", "--config.reward.addresses", "--drain_s", "--metrics_port")
    jobset, skypilot = (
        {argument for argument in PARTS[manifest][name].arguments if argument.partition("=")[0] not in own}
        for manifest in PARTS
    )
    assert jobset == skypilot and PARTS["jobset"][name].module == PARTS["skypilot"][name].module


def test_rollout_servers_take_what_the_trainer_asks_for():
    part, config = PARTS["jobset"]["rollouts"], trainer_config()
    assert part.module == "launch.serve_rollouts"
    args, sampling = serve_rollouts.parse(part.arguments), config["sampling"]
    serve_rollouts.parse(PARTS["skypilot"]["rollouts"].arguments)
    budgets = {key: sampling[key] for key in ("max_prompt_tokens", "max_tokens", "dtype")}
    assert budgets == {key: getattr(args, key) for key in budgets}
    assert args.engine == "vllm" and args.model == config["model"]["path"]
    rows = config["group_size"] * config["rollout"]["prompts_per_request"]
    assert rows * len(part.hosts) <= config["prompts_per_step"] * config["group_size"], "every server has work"
    assert rows * config["rollout"]["requests_per_server"] >= args.max_num_seqs, "a server's batch is full"


def test_reward_servers_score_the_trainers_task():
    part, trainer = PARTS["jobset"]["rewards"], PARTS["jobset"]["trainer"]
    assert part.module == "launch.serve_rewards" and option(part, "--config") == option(trainer, "--config")
    mine, its = config_of(part.module, *part.arguments)["task"], trainer_config()["task"]
    assert mine == its | {"train_path": ""}, "the training problems come with each request"


@MANIFESTS
def test_addresses_are_the_names_and_ports_of_the_servers(manifest):
    parts = PARTS[manifest]
    addresses = {
        name: [f"{host}:{option(parts[name], '--port')}" for host in parts[name].hosts]
        for name in ("rollouts", "rewards")
    }
    for section, name in (("rollout", "rollouts"), ("reward", "rewards")):
        given = ast.literal_eval(option(parts["trainer"], f"--config.{section}.addresses"))
        assert list(given) == addresses[name]
        if manifest == "jobset":
            assert trainer_config()[section]["addresses"] == addresses[name]
        assert not security.is_loopback(option(parts[name], "--host")), "others can reach it"
    for wait in parts["trainer"].waits:
        asked = check_health.parse(wait).addresses.split(",")
        assert asked == [*addresses["rollouts"], addresses["rewards"][0]]


@MANIFESTS
def test_files_are_where_volumes_are_mounted(manifest):
    for name, part in PARTS[manifest].items():
        assert part.secret == ("rl-client" if name == "trainer" else "rl-server")
        assert part.mounts["/secrets"] and part.mounts["/files"] == (name != "trainer"), "who may write"
        paths = [value for value in re.split("[= ]", " ".join(part.arguments)) if value.startswith("/")]
        for path in paths:
            assert any(path.startswith(f"{mount}/") for mount in part.mounts), f"{name}: {path}"
        sections = ("--config.rollout.", "--config.reward.") if name == "trainer" else ("--",)
        for prefix in sections:
            for what, file in OF_SECRETS.items():
                assert option(part, f"{prefix}{what}_file") == f"/secrets/{file}"


def test_chips_of_the_slice_are_the_mesh():
    selector = pod("trainer")["nodeSelector"]
    chips = container("trainer")["resources"]["limits"]["google.com/tpu"]
    topology = [int(side) for side in selector["cloud.google.com/gke-tpu-topology"].split("x")]
    (task,) = [task for task in TASKS if task["name"] == "trainer"]
    mesh = trainer_config()["mesh"]
    assert topology[0] * topology[1] == chips == mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["context"]
    assert task["resources"]["accelerators"] == f"{selector['cloud.google.com/gke-tpu-accelerator']}:{chips}"
    gpus = serve_rollouts.parse(container("rollouts")["args"]).tensor_parallel_size
    assert container("rollouts")["resources"]["limits"]["nvidia.com/gpu"] == gpus


@pytest.mark.parametrize("name", ["rollouts", "rewards"])
def test_a_server_is_probed_drained_and_started_again(name):
    spec, program, part = JOBS[name]["template"]["spec"], container(name), PARTS["jobset"][name]
    assert pod(name)["terminationGracePeriodSeconds"] > float(option(part, "--drain_s"))
    assert program["command"][0] == "launch/cluster/serve.sh" and os.access(ROOT / program["command"][0], os.X_OK)
    assert pod(name)["restartPolicy"] == "OnFailure" and spec["backoffLimit"] >= 1000
    assert [port["containerPort"] for port in program["ports"]] == [int(option(part, "--port"))]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        python, m, module, *arguments = program[probe]["exec"]["command"]
        args = check_health.parse(arguments)
        assert (m, module, args.addresses) == ("-m", check_health.__spec__.name, f"127.0.0.1:{option(part, '--port')}")
        assert args.authority_file == "/secrets/ca.pem" and args.wait_s == 0
        assert program[probe]["timeoutSeconds"] > check_health.CALL_S


# ---- secrets, health, the shell


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    folder = tmp_path_factory.mktemp("cluster") / "secrets"
    names = re.search(r"make_secrets.sh secrets '(.*)'", (CLUSTER / "jobset.yaml").read_text())
    assert (
        names
        and "make_secrets.sh secrets {rollouts-{0..3},rewards-{0,1}}.rl" in (CLUSTER / "skypilot.yaml").read_text()
    )
    hosts = [host for name in ("rollouts", "rewards") for host in PARTS["skypilot"][name].hosts]
    make_secrets(folder, names.group(1), *hosts)
    return folder


def make_secrets(*arguments) -> str:
    command = ["sh", str(CLUSTER / "make_secrets.sh"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    return done.stdout


def identity(folder: Path) -> security.Security:
    return security.load_security(**{f"{what}_file": str(folder / file) for what, file in OF_SECRETS.items()})


@pytest.fixture(scope="module")
def served(secrets):
    """A reward server behind mutual TLS and a token, as the manifests start it."""
    with servers.served(servers.toy, secrets=identity(secrets / "server")) as (one,):
        yield one.address


def test_secrets_are_made_once_and_for_their_owner_alone(secrets, tmp_path):
    for path in secrets.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert path.is_dir() or path.stat().st_size
    server, client = identity(secrets / "server"), identity(secrets / "client")
    assert server.token == client.token and len(server.token or "") == 64
    assert sorted(path.name for path in secrets.iterdir()) == ["ca.key", "ca.pem", "client", "server"]
    for arguments, says in [((secrets, "a"), "exists: name a new folder"), ((tmp_path / "new",), "usage: ")]:
        with pytest.raises(ValueError, match=says):
            make_secrets(*arguments)
    assert not (tmp_path / "new").exists()


@MANIFESTS
def test_certificates_hold_for_the_names_in_the_manifests(manifest, secrets, served):
    mine = identity(secrets / "client")
    for host in PARTS[manifest]["rollouts"].hosts + PARTS[manifest]["rewards"].hosts:
        assert said_as(host, served, mine).task == "toy"
    with pytest.raises(grpc.RpcError, match="Hostname Verification Check failed"):
        said_as("rl-rollouts-0-0.elsewhere.tapojax.svc", served, mine)


def said_as(host: str, address: str, mine: security.Security):
    """What a server says of itself to a client that takes it for `host`."""
    credentials, override = security.channel_credentials(mine), [("grpc.ssl_target_name_override", host)]
    with grpc.secure_channel(address, credentials, override) as channel:
        stub, request = rewards.pb_grpc.RewardsStub(channel), rewards.pb.DescribeRequest()
        return stub.Describe(request, timeout=10, metadata=[security.authorization(mine.token or "")])


def test_health_is_told_to_who_has_a_certificate(secrets, served, tmp_path):
    make_secrets(tmp_path / "other", "localhost")
    for side, says in [("server", ""), ("client", "")]:
        assert health(served, secrets / side) == says
    assert "CERTIFICATE_VERIFY_FAILED" in health(served, tmp_path / "other" / "client")
    assert "UNAVAILABLE" in health(f"{served},127.0.0.1:1", secrets / "client")


def health(addresses: str, folder: Path, *options: str) -> str:
    files = [f"--{what}_file={folder / OF_SECRETS[what]}" for what in ("authority", "certificate", "key")]
    try:
        check_health.main(check_health.parse([f"--addresses={addresses}", *files, *options]))
    except ValueError as error:
        return str(error)
    return ""


def test_health_is_waited_for(monkeypatch):
    troubles = iter(["loading", "loading", ""])
    monkeypatch.setattr(check_health, "trouble", lambda address, secrets: next(troubles))
    monkeypatch.setattr(check_health, "PAUSE_S", 0)
    check_health.main(check_health.parse(["--addresses=127.0.0.1:1", "--wait_s=60"]))
    assert next(troubles, None) is None


@pytest.mark.parametrize("stop", [signal.SIGTERM, None])
def test_a_server_that_ended_well_is_a_failure_of_its_job(stop, tmp_path):
    """Status 0 would complete the Job, and nobody would start the server again."""
    code = f"""
import pathlib, signal, time
def drain(*_):
    time.sleep(0.5)
    pathlib.Path({str(tmp_path / "drained")!r}).touch()
    raise SystemExit(0)
signal.signal(signal.SIGTERM, drain)
print("listening", flush=True)
time.sleep(60 if {stop is not None} else 0)
"""
    command = ["sh", str(CLUSTER / "serve.sh"), sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shell:
        assert shell.stdout and shell.stdout.readline() == "listening\n"
        if stop is not None:
            time.sleep(0.2)
            shell.send_signal(stop)
        assert shell.wait(30) == 1
    assert (tmp_path / "drained").exists() == (stop is not None), "the drain is waited for"


# ---- the guide


def strings_of_the_code() -> list[str]:
    """Every string constant of ours; the parser has joined those that stand side by side."""
    files = [path for folder in ("tapojax", "launch") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_guide_quotes_messages_that_the_code_has():
    section = GUIDE.read_text().partition("## Troubleshooting")[2]
    quoted = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert len(quoted) >= 10
    known = strings_of_the_code()
    for message in quoted:
        for fragment in filter(None, (part.strip() for part in message.split("…"))):
            assert any(fragment in text for text in known), f"no message says {fragment!r}"


def test_the_guide_names_keys_commands_and_files_that_exist():
    text = GUIDE.read_text()
    config = ConfigDict(trainer_config())
    sections = "|".join(name for name in config if isinstance(config[name], ConfigDict))
    for section, key in re.findall(rf"`({sections})\.(\w+)", text):
        assert key in config[section], f"{section}.{key}"
    for module in re.findall(r"python3? -m (launch[.\w]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for path in re.findall(r"(?:launch|docs|configs)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    flags = {f"--{name}" for name in vars(serve_rollouts.parse(["--engine=jax"]))}
    assert set(re.findall(r"`(--\w+)", text)) <= flags, "options of serve_rollouts"
    assert {f"{name}_file" for name in OF_SECRETS} <= set(remote.Options._fields)
