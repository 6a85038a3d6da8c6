"""Whether servers serve, by gRPC's health service: for a container's probe, and for a trainer that waits for them.

    python -m launch.cluster.check_health --addresses=127.0.0.1:7777 --authority_file=ca.pem
    python -m launch.cluster.check_health --addresses=gpu1:7777,gpu2:7777 --wait_s=1800 --authority_file=ca.pem

A kubelet's own gRPC probe speaks no TLS, so a probe runs this beside the server. It shows no token: health takes none.
"""

import argparse
import sys
import time

from grpc_health.v1 import health_pb2, health_pb2_grpc

from tapojax.rpc import client, limits, security

CALL_S = 5.0
PAUSE_S = 2.0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.cluster.check_health", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--addresses", required=True, help="host:port,...")
    add("--wait_s", type=float, default=0.0, help="asked again for so long, until all serve")
    add("--authority_file", default="", help="who signed the servers' certificates")
    add("--certificate_file", default="", help="of the asker, for mutual TLS")
    add("--key_file", default="")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace):
    """Returns when all serve.

    Raises:
      ValueError: one does not; the message says why.
    """
    files = {name: value for name, value in vars(args).items() if name.endswith("_file")}
    secrets, end = security.load_security(**files), time.monotonic() + args.wait_s
    for address in args.addresses.split(","):
        while problem := trouble(address, secrets):
            if time.monotonic() >= end:
                raise ValueError(f"{problem} (waited {args.wait_s:g} s)")
            time.sleep(PAUSE_S)


def trouble(address: str, secrets: security.Security) -> str:
    """Why a server does not serve; empty where it does."""
    request = health_pb2.HealthCheckRequest()
    try:
        with client.channel(address, security=secrets, limits=limits.Limits()) as channel, client.failures(address):
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_S).status
    except client.Failure as failure:
        return str(failure)
    return "" if status == health_pb2.HealthCheckResponse.SERVING else f"{address}: it is draining"


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
