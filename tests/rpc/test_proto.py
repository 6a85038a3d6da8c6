"""The committed stubs are what the contract makes, and they say what the servers and clients count on."""

import subprocess
import sys
from pathlib import Path

import pytest

from tapojax.rpc import tapojax_pb2 as pb

ROOT = Path(__file__).parents[2]
PROTO = "tapojax/rpc/tapojax.proto"
STUBS = ["tapojax_pb2.py", "tapojax_pb2.pyi", "tapojax_pb2_grpc.py"]


@pytest.mark.parametrize("stub", STUBS)
def test_the_committed_stubs_are_generated_from_the_contract(stub, tmp_path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools, which makes the stubs, is not installed")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, PROTO], cwd=ROOT, check=True)
    made = (tmp_path / "tapojax/rpc" / stub).read_text()
    committed = (ROOT / "tapojax/rpc" / stub).read_text()
    assert made == committed, f"{stub} is stale: make it anew as tapojax/rpc/__init__.py says and commit it"


def test_the_command_that_makes_the_stubs_is_the_one_that_is_told():
    told = (ROOT / "tapojax/rpc/__init__.py").read_text()
    command = (
        "python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. tapojax/rpc/tapojax.proto"
    )
    assert command in told


def test_no_field_number_is_ever_used_twice_and_enums_begin_unspecified():
    """proto3 has no presence for enums: zero must mean that nothing was said."""
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), enum.name
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        numbers = [field.number for field in message.fields]
        assert len(set(numbers)) == len(numbers), message.name


def test_the_services_are_those_of_the_contract():
    methods = {
        f"{service.name}.{method.name}": ("stream " * method.client_streaming, "stream " * method.server_streaming)
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods["Rollouts.Generate"] == ("", "stream ")
    assert methods["Rollouts.LoadWeights"] == ("stream ", "")
    assert methods["Rewards.Score"] == ("stream ", "stream ")
    unary = {"Logprobs", "CommitWeights", "Status", "Pause", "Resume", "Abort"}
    assert all(methods[f"Rollouts.{name}"] == ("", "") for name in unary)
    assert len(methods) == 10
