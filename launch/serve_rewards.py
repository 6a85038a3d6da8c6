"""A reward server: scores completions for trainers elsewhere, by the task (and judge) of a config.

    python -m launch.serve_rewards --config=configs/gsm8k.py --port=7788
    python -m launch.train --config=configs/gsm8k.py --config.reward.addresses=127.0.0.1:7788

Both sides read the same config file; the server is the one with the verifier's cores, or the judge's GPU, for what the
config's judges say comes from here, too (docs/judges.md). For more cores start more servers, and name them all:
"('big1:7788','big2:7788')".

A host that other machines can reach takes TLS and a token: --host=0.0.0.0 --token_file=token
--certificate_file=cert.pem --key_file=key.pem, and --authority_file=ca.pem for mutual TLS; the trainer's counterparts
are in its config section `reward`. SIGTERM lets the items under way finish, for at most --drain_s seconds. Logs are
JSON lines on stderr; "listening on host:port" on stdout says that the server is ready.
"""

import asyncio
import functools

from absl import flags

from launch import build, cli
from tapojax.rewards import remote, serving
from tapojax.rpc import limits, security, server, telemetry
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc
from tapojax.types import Task

HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
PORT = flags.DEFINE_integer("port", 7788, "0: any free one")
METRICS_PORT = flags.DEFINE_integer("metrics_port", 0, "Prometheus on loopback; 0: off")
TOKEN_FILE = flags.DEFINE_string("token_file", "", "with the token that every call must carry")
CERTIFICATE_FILE = flags.DEFINE_string("certificate_file", "", "of this server, PEM")
KEY_FILE = flags.DEFINE_string("key_file", "", "of the certificate, PEM")
AUTHORITY_FILE = flags.DEFINE_string("authority_file", "", "who signs clients' certificates, for mutual TLS")
BATCH_ROWS = flags.DEFINE_integer("batch_rows", 64, "scored in one call of the verifier", lower_bound=1)
BATCHES = flags.DEFINE_integer("batches", 4, "scored at a time", lower_bound=1)
BATCH_S = flags.DEFINE_float(
    "batch_s",
    None,
    "seconds that a call of the verifier may take until its rows go without a score and another thread takes its "
    "place; by default 600, or reward.deadline_s where that is longer",
    lower_bound=1e-3,
)
DRAIN_S = flags.DEFINE_float("drain_s", 60.0, "for the items under way, after SIGTERM", lower_bound=0)


def main():
    config = cli.checked_config()
    secrets = security.load_security(
        token_file=TOKEN_FILE.value,
        certificate_file=CERTIFICATE_FILE.value,
        key_file=KEY_FILE.value,
        authority_file=AUTHORITY_FILE.value,
    )
    security.check_bind(HOST.value, secrets)  # before a judge is loaded for nothing
    config.reward.addresses = ()  # they lead here
    task = build.task(config)
    telemetry.log_json()
    batch_s = BATCH_S.value or max(600.0, config.reward.deadline_s)
    asyncio.run(serve(config.task.name, task, secrets, batch_s))


async def serve(name: str, task: Task, secrets: security.Security, batch_s: float):
    """Listens until a signal comes."""
    numbers = telemetry.telemetry()
    examples = task.train if len(task.train) else task.evaluation
    if not len(examples):
        raise ValueError(
            f"the task {name!r} has no problem to try its scores on: give it task.train_path, as in training"
        )
    channels = serving.probe(task.score, examples[0])
    servicer = serving.Rewards(
        task.score,
        task=name,
        channels=channels,
        telemetry=numbers,
        max_batch=BATCH_ROWS.value,
        threads=BATCHES.value,
        batch_s=batch_s,
    )
    running = await server.start(
        [functools.partial(pb_grpc.add_RewardsServicer_to_server, servicer)],
        [remote.SERVICE],
        host=HOST.value,
        port=PORT.value,
        security=secrets,
        limits=limits.Limits(),
        telemetry=numbers,
    )
    stop_metrics = telemetry.serve_metrics(numbers, port=METRICS_PORT.value)
    print(f"listening on {HOST.value}:{running.port}", flush=True)
    try:
        await server.until_signal(running, seconds=DRAIN_S.value)
    finally:
        stop_metrics()


if __name__ == "__main__":
    cli.run(main)
