# Makes the virtual environment of the repository once: sourced by tools/test and tools/demo.
# A changed pyproject.toml or constraints.txt makes it anew.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
# the root must not be importable: `kernels` there would hide other packages of that name
export PYTHONSAFEPATH=1
export PIP_DISABLE_PIP_VERSION_CHECK=1

make_environment() {
  local python="${PYTHON:-python3.11}" stamp="$venv/.xformopt-stamp" wanted
  command -v "$python" >/dev/null || python=python3
  wanted="$(cat "$root/pyproject.toml" "$root/setup.py" "$root/constraints.txt" | cksum)"
  if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  echo "making the environment in .venv (once; a few minutes, mostly downloads)"
  "$python" -m venv "$venv"
  # torch first and exactly: a looser requirement would bring the CUDA build
  "$venv/bin/pip" install --quiet --constraint "$root/constraints.txt" "torch==2.13.0"
  "$venv/bin/pip" install --quiet --constraint "$root/constraints.txt" --editable "$root[ort,openvino,tvm,triton,hf,demo,tasks,dev]"
  echo "$wanted" >"$stamp"
}
